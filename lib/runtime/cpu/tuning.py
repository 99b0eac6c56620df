"""Settings of the process for a CPU: threads, denormals, freed memory."""

import contextlib
import ctypes
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from lib.runtime.launcher import threads_are_chosen

FEW_PRODUCTS = 1_000_000
"""Multiplications that one thread does in the time it takes to wake the others, some tens of microseconds."""


def tune_cpu() -> None:
    """Set threads, denormals and the allocator for the whole process, for training as for answering."""
    use_all_cores()
    flush_denormals()
    keep_freed_memory()


def use_all_cores() -> None:
    """Share the cores that may be used among the processes of this machine, unless the user set OMP_NUM_THREADS."""
    if not threads_are_chosen():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, allowed_cores() // local))


def allowed_cores() -> int:
    """The cores that this process may use: by its affinity, and by the limits of its control groups, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(math.ceil, cgroup_limits())]))


def cgroup_limits(root: Path = Path("/")) -> Iterator[float]:
    """The limits in cores of the control groups that this process is in, as containers have them; version 2 and 1."""
    path = root / "proc/self/cgroup"
    for line in path.read_text().splitlines() if path.exists() else ():
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in (
            ("sys/fs/cgroup", "sys/fs/cgroup/unified")
            if not controllers
            else (f"sys/fs/cgroup/{controllers}", "sys/fs/cgroup/cpu")
        ):
            group = root / mount / name.lstrip("/")
            for folder in (group, *group.parents[: len(group.parents) - len((root / mount).parents)]):
                with contextlib.suppress(OSError, ValueError):
                    if controllers:
                        quota, period = ((folder / f"cpu.cfs_{part}_us").read_text() for part in ("quota", "period"))
                    else:
                        quota, period = (folder / "cpu.max").read_text().split()
                    if float(quota) > 0:
                        yield float(quota) / float(period)


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
    if keeps_freed_memory():
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def keeps_freed_memory() -> bool:
    """Whether `keep_freed_memory` does anything here."""
    set_by_user = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    return platform.libc_ver()[0] == "glibc" and not set_by_user
