"""Predictions of a model, their scores with intervals, and reports."""
