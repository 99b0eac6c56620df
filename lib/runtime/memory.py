"""Memory: how much is free, how running out of it is recognized, and the next smaller batch."""

import contextlib
import logging
import os
import re
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from lib.errors import UserError
from lib.runtime.processes import has_lost_another

logger = logging.getLogger(__name__)


def has_own_memory(device: torch.device) -> bool:
    """Whether running out of memory raises an error; out of main memory, the system kills the process instead."""
    return device.type != "cpu"


OUT_OF_MEMORY = re.compile(
    r"(CUDA|HIP|XPU|MPS)[^.]{0,40}out of memory"  # "CUDA error: out of memory" is the driver's, without the allocator
    r"|(CUBLAS|CUBLASLT|CUDNN|CUSOLVER|CUSPARSE|HIPBLAS|ROCBLAS|MIOPEN)_STATUS_(ALLOC_FAILED|MEMORY_ERROR)",
    re.IGNORECASE,
)
"""What libraries of a GPU say when they cannot allocate, beside what `should_reduce_batch_size` knows."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the machine.

    Not where processes exchange data: what one of them tries again alone would never be answered.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError) or has_lost_another(error):
        return False
    return should_reduce_batch_size(error) or OUT_OF_MEMORY.search(str(error)) is not None


class StartAgain(UserError):
    """Memory was too short on one process of a model in shards, where the others wait for it in a gather.

    It cannot tell them: the run ends, and its next start goes on with `value` for the size `name` of the state, below that
    of `flag`.
    """

    def __init__(self, name: str, value: int, flag: str) -> None:
        self.name, self.value = name, value
        super().__init__(
            f"out of memory; with a model in shards the other processes cannot be told, and the run ends. The same command "
            f"goes on from the last checkpoint with half the batch per forward, until another {flag} is set; a launcher with "
            "--max_restarts 3 runs it by itself"
        )


def halve(size: int, flag: str, unit: str = "samples", remedies: str = "") -> int:
    """Free unused memory and return half as many samples, or other units, per forward, rounded down.

    `flag` sets the number of samples, `remedies` are flags that would save memory as well: `--a, --b`. Raises UserError if
    `size` is below 2: there is nothing to halve.
    """
    clear_device_cache(garbage_collection=True)
    if size < 2:
        also = f"{remedies}, " if remedies else ""
        raise UserError(
            f"out of memory with a single sample per forward; try {also}a shorter --max_length, --mixed_precision bf16, "
            "a smaller --model, or a device with more free memory"
        )
    of = " (rows x padded length)" if unit == "positions" else ""
    hint = f"; {remedies} or a smaller {flag} takes less" if remedies else f" ({flag})"
    logger.warning(
        "out of memory with %d %s%s per forward: going on with %d at most%s", size, unit, of, size // 2, hint
    )
    return size // 2


def own_memory(device: torch.device) -> tuple[int, int | None]:
    """(bytes of a device's memory that this process holds, the most that it can hold; None if that is not known).

    For a CPU this is main memory, of which the processes of a machine share what is free.
    """
    if device.type == "cuda":
        held, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return held, reserved + torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return 0, None
    import psutil

    held = psutil.Process().memory_info().rss
    return held, held + available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


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
