"""Faster CPU kernels for training."""
