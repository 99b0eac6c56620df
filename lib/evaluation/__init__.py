"""Predictions, scores with intervals, reports."""
