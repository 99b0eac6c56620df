"""The door to our CPU kernels for training, and their switch."""

import contextlib

from lib.runtime.cpu.attention import fast_attention
from lib.runtime.cpu.casts import shared_casts
from lib.runtime.cpu.dropout import fast_dropout

IN_USE = contextlib.ExitStack()
"""Closing it restores PyTorch's and transformers' own functions."""


def use_cpu_kernels(wanted: bool = True) -> None:
    """Replace, for the whole process, what is slow in training on a CPU; with False restore the originals.

    Dropout masks are drawn with a faster generator, "sdpa" attention takes fewer passes over memory, and linear layers
    that read the same activations share one cast of them to bf16. An experiment gives the same numbers with either, but
    for rounding and for the dropout masks. What a kernel does not know it passes on to the function it replaces.
    """
    IN_USE.close()
    if wanted:
        for kernel in (fast_dropout, fast_attention, shared_casts):
            IN_USE.enter_context(kernel())
