"""Memory: how much is free, how running out of it is recognized, and the next smaller batch."""

import contextlib
import logging
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from lib.errors import UserError

logger = logging.getLogger(__name__)


def has_own_memory(device: torch.device) -> bool:
    """Whether running out of memory raises an error; out of main memory, the system kills the process instead."""
    return device.type != "cpu"


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the machine."""
    return isinstance(error, MemoryError) or should_reduce_batch_size(error)


def halve(size: int, flag: str) -> int:
    """Free unused memory and return half as many samples per forward, rounded down; raises UserError if `size` is 1."""
    clear_device_cache(garbage_collection=True)
    if size == 1:
        raise UserError(
            "out of memory with a single sample per forward; try a shorter --max_length, --mixed_precision bf16, "
            "--freeze, a smaller --model, or a device with more free memory"
        )
    logger.warning("out of memory with %d samples per forward: going on with %d (%s)", size, size // 2, flag)
    return size // 2


def available_memory() -> int:
    """Bytes of main memory, swap included, that this process can still take; a container's limit counts."""
    import psutil

    free = psutil.virtual_memory().available + psutil.swap_memory().free
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.stat"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.stat"),
    ):
        with contextlib.suppress(OSError, ValueError, KeyError):
            most = int(Path(limit).read_text())
            lines = (line.split() for line in Path(used).read_text().splitlines())
            stat = {name: int(value) for name, value in lines}
            free = min(free, most - (stat["anon"] if "anon" in stat else stat["rss"]))
    return free
