"""When memory is too short: fewer samples per forward, on all processes, and the same experiment."""

import logging

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from lib.errors import UserError

logger = logging.getLogger(__name__)


def has_own_memory(device: torch.device) -> bool:
    """Whether running out of memory raises an error; the machine's own memory ends the process instead."""
    return device.type != "cpu"


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or should_reduce_batch_size(error)


def halve(size: int, flag: str) -> int:
    """Free what is unused and return half as many samples per forward; raises UserError when one is too many already."""
    clear_device_cache(garbage_collection=True)
    if size == 1:
        raise UserError(
            "out of memory with a single sample per forward; try a shorter --max_length, --mixed_precision bf16, "
            "--freeze, a smaller --model, or a device with more free memory"
        )
    logger.warning("out of memory with %d samples per forward: going on with %d (%s)", size, size // 2, flag)
    return size // 2
