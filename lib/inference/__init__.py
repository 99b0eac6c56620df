"""Answers to new text."""
