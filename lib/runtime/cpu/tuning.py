"""Threads, denormals and freed memory on a CPU."""

import ctypes
import os
import platform

import torch

FEW_PRODUCTS = 1_000_000
"""Multiplications that one thread makes in the time that others take to wake up, some tens of microseconds."""


def use_all_cores() -> None:
    """Share the cores among the processes of this machine where the launcher, finding no setting, allowed one each."""
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))


def use_one_core_for(products: int) -> None:
    """On a CPU, leave steps of so few multiplications to one thread: waking the others takes longer than the work."""
    if products <= FEW_PRODUCTS:
        torch.set_num_threads(1)


def flush_denormals() -> None:
    """Take numbers nearer to 0 than 1.2e-38, the least normal float32, for 0; threads started from here on do so as well.

    The moments of words that no batch had for 800 steps have shrunk to such numbers, and processors take many times as
    long for them: with 5,000 rows of them AdamW's step over a table of 30,522 words takes 29 ms instead of 5.7.
    """
    torch.set_flush_denormal(True)


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks instead of returning them: a step on the CPU otherwise faults its pages in anew."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
