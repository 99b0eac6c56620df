"""Settings of the process for a CPU: threads, denormals, freed memory."""

import ctypes
import os
import platform

import torch

FEW_PRODUCTS = 1_000_000
"""Multiplications that one thread does in the time it takes to wake the others, some tens of microseconds."""


def tune_cpu() -> None:
    """Set threads, denormals and the allocator for the whole process, for training as for answering."""
    use_all_cores()
    flush_denormals()
    keep_freed_memory()


def use_all_cores() -> None:
    """Share the cores of this machine among its processes, unless OMP_NUM_THREADS says otherwise.

    A launcher that finds no setting exports 1, which is therefore not taken as one.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))


def use_one_core_for(products: int) -> None:
    """Use one thread from here on if a step takes at most FEW_PRODUCTS multiplications: waking the others takes longer."""
    if products <= FEW_PRODUCTS:
        torch.set_num_threads(1)


def flush_denormals() -> None:
    """Flush denormals, float32 numbers below 1.2e-38, to zero; threads started from here on do so as well.

    AdamW moments of words unseen for 800 steps become denormal, and denormals are slow on CPUs: with 5,000 rows of them
    the step over an embedding table of 30,522 words takes 29 ms instead of 5.7 ms.
    """
    torch.set_flush_denormal(True)


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks: returned to the system, their pages would fault in again in every step.

    Settings of the user, in GLIBC_TUNABLES or MALLOC_*, are left alone.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    set_by_user = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if platform.libc_ver()[0] == "glibc" and not set_by_user:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
