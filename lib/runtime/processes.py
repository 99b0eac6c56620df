"""What processes do together: agree on a host-side flag, add up gradients, end."""

import functools
import secrets
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.rendezvous import rendezvous

from lib.runtime.signals import check_stop

PROCESS_TIMEOUT = timedelta(days=1)
"""How long the libraries let processes wait for each other: the first may tokenise for hours. Training has its own limit."""


BUCKET_BYTES = 25 * 2**20


def join_again(attempt: str, backend: str) -> None:
    """Find the other processes after a restart by `torchrun --max-restarts`.

    It keeps the store in which processes find each other, but PyTorch uses the same names in it each time, so that they
    would wait for the addresses of processes that died.
    """
    store, rank, size = next(rendezvous("env://", timeout=PROCESS_TIMEOUT))
    store = torch.distributed.PrefixStore(f"attempt/{attempt}", store)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PROCESS_TIMEOUT)


@functools.cache
def control_group() -> Any:
    """Processes talk about flags through memory of the host, so that no GPU is waited for.

    A group of its own name each time, for the reason that `join_again` tells.
    """
    if torch.distributed.get_backend() == "gloo":
        return torch.distributed.group.WORLD
    name = broadcast_object_list([secrets.token_hex(8)])[0]
    store = torch.distributed.PrefixStore(f"control/{name}", _get_default_store())
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return torch.distributed.ProcessGroupGloo(store, rank, size, PROCESS_TIMEOUT)


def lowest(accelerator: Accelerator, value: int) -> int:
    """The smallest `value` of all processes; every process must call this at the same place."""
    if accelerator.num_processes == 1:
        return value
    tensor = torch.tensor(value)
    options = torch.distributed.AllreduceOptions()
    options.reduceOp = torch.distributed.ReduceOp(torch.distributed.ReduceOp.MIN)
    control_group().allreduce([tensor], options).wait()
    return int(tensor)


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is raised on some process; every process must call this at the same place, and waits for all."""
    return lowest(accelerator, int(not flag)) == 0


def is_alone() -> bool:
    """Whether no other process trains the same model."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def agree_to_stop(accelerator: Accelerator) -> None:
    """Raise Stopped on every process when one was asked to stop; every process must call this at the same place."""
    check_stop(functools.partial(any_process, accelerator))


def sum_gradients(accelerator: Accelerator, model: nn.Module) -> None:
    """Replace the gradients of every process by their sum.

    Done in the open, after all processes have agreed that their backward passes succeeded: DDP would exchange gradients
    from inside the last one, where a process that runs out of memory leaves the others waiting for ever.
    """
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    pending = []
    for bucket in buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        pending.append((bucket, flat, torch.distributed.all_reduce(flat, async_op=True)))
    for bucket, flat, work in pending:
        work.wait()
        parts = flat.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """`tensors` in order, in groups of one dtype of at most 25 MiB, or of one larger tensor."""
    group: list[torch.Tensor] = []
    for tensor in tensors:
        size = sum(member.nbytes for member in group) + tensor.nbytes
        if group and (size > BUCKET_BYTES or tensor.dtype != group[0].dtype):
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


def finish(accelerator: Accelerator, *objects: Any) -> None:
    """Release the model and end the process group, in this order: the other way round can deadlock at exit."""
    accelerator.wait_for_everyone()
    accelerator.free_memory(*objects)
    if not is_alone():
        torch.distributed.destroy_process_group()
