"""Predictions for new text: nine tasks, from inputs to outputs."""
