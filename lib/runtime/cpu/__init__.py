"""Faster training on a CPU: kernels behind one switch, and the settings of threads, denormals and memory."""
