"""What the processes of a run do together: agree on a flag, share weights, sum, stop, end."""

import functools
import os
import pickle
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store

from lib.errors import UserError, first_line
from lib.runtime.atomic import NFS_SECONDS
from lib.runtime.launch_checks import read_sharding
from lib.runtime.lock import is_locked_by
from lib.runtime.network import (
    Member,
    choose_interfaces,
    digest,
    master,
    meet,
    open_store,
    processes_per_machine,
    rank_and_size,
)
from lib.runtime.signals import REQUEST, Stopped, check_stop
from lib.runtime.watchdog import waiting_for_others

PROCESS_TIMEOUT = timedelta(days=1)
"""Timeout of collectives: the first process may tokenize for hours while others wait. Training has the watchdog."""
BUCKET_BYTES = 25 * 2**20
"""Weights are shared and gradients summed in buckets of at most this size, as in DDP."""
Tensor = TypeVar("Tensor", bound=torch.Tensor)
Result = TypeVar("Result")


NETWORKS: list[str] = []
"""The network interface over which each machine talks to the others; none on one machine."""


def join(backend: str, timeout: float) -> None:
    """Start the process group with all processes of the launch, or say who did not come within `timeout` seconds.

    Several machines use the network interface that leads to the first one, see `choose_interfaces`. The launcher keeps the
    store in which processes find each other when it restarts them, and PyTorch uses the same keys in it each time: they would
    wait for the addresses of processes that died. Hence keys of their own for each attempt.
    """
    rank, size = rank_and_size()
    store = open_store(timeout, or_leave=True)
    try:
        members = meet(store, timeout)
    except RuntimeError as error:  # the store is gone
        raise UserError(
            f"the first process, or its launcher, ended before all processes had met at {master()}; the log of its machine says "
            "why"
        ) from error
    attempt = torch.distributed.PrefixStore(f"attempt/{digest(members)}", store)
    trial = None
    if size > processes_per_machine():
        os.environ.update(choose_interfaces(members))
        trial = connect(attempt, members, timeout)
    store.set_timeout(PROCESS_TIMEOUT)
    torch.distributed.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=PROCESS_TIMEOUT)
    del trial


def connect(store: Any, members: list[Member], timeout: float) -> Any:
    """A process group that connects every process with every other one: behind a firewall the run's own would wait for a day.

    It returns when all processes have used the group, so that each may drop it.
    Raises UserError if not all can be reached within `timeout` seconds, or 25 if that is more.
    """
    rank, size = rank_and_size()
    name = os.environ["GLOO_SOCKET_IFNAME"]
    try:
        trial = torch.distributed.PrefixStore("trial", store)
        patience = timedelta(seconds=max(5.0, timeout / 5))  # gloo waits for a connection five times as long
        group: Any = torch.distributed.ProcessGroupGloo(trial, rank, size, patience)
        group.allreduce([torch.zeros(1)]).wait()
        store.set(f"network/{rank}", f"{name} of {members[rank].host}")
        found = store.multi_get([f"network/{number}" for number in range(size)])  # waits for all
    except RuntimeError as error:
        others = dict.fromkeys(f"{member.host} ({member.address})" for member in members)
        raise UserError(
            f"{members[rank].host} found the processes on {', '.join(others)}, but cannot connect with all of them over the "
            f"network interface {name}: {first_line(error)}\nLet firewalls pass all ports between the machines, or name another "
            "interface of `ip addr` in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, on each machine its own"
        ) from error
    of_machine = {member.machine: text.decode() for member, text in zip(members, found, strict=True)}
    NETWORKS[:] = of_machine.values()
    return group


@functools.cache
def control_group() -> Any:
    """A process group on the CPU, so that agreeing on a flag does not wait for a GPU.

    Its keys in the store are new each time, for the reason given in `join`.
    """
    if torch.distributed.get_backend() == "gloo":
        return torch.distributed.group.WORLD
    name = broadcast_object_list([secrets.token_hex(8)])[0]
    store = torch.distributed.PrefixStore(f"control/{name}", _get_default_store())
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return torch.distributed.ProcessGroupGloo(store, rank, size, PROCESS_TIMEOUT)


@functools.cache
def side_group() -> Any:
    """A process group on the CPU of its own, for `tell_all` and for what writes together: no other sum waits for it."""
    return torch.distributed.new_group(backend="gloo", timeout=PROCESS_TIMEOUT)


def tell_all(value: Any) -> list[Any]:
    """What each process gives, in the order of processes; every process must call this at the same place."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    with waiting_for_others():
        torch.distributed.all_gather_object(found, value, group=side_group())
    return found


def on_first(work: Callable[[], Result]) -> Result:
    """What `work` returns on the first process, on every process; so is what it raises. Every process must call this."""
    outcome = attempt(work) if torch.distributed.get_rank() == 0 else None
    found: Result | Exception = tell_all(outcome)[0]
    if isinstance(found, Exception):
        raise found
    return found


def together(work: Callable[[], Result]) -> Result:
    """What `work` returns on this process; what it raises on any process is raised on every one, which must call this."""
    found = attempt(work)
    for error in tell_all(found if isinstance(found, Exception) else None):
        if error is not None:
            raise error
    assert not isinstance(found, Exception)
    return found


def attempt(work: Callable[[], Result]) -> Result | Exception:
    """What `work` returns or raises; an error that cannot be sent to other processes as a RuntimeError with its first line."""
    try:
        return work()
    except Exception as error:
        return error if can_be_sent(error) else RuntimeError(f"{type(error).__name__}: {first_line(error)}")


def can_be_sent(error: Exception) -> bool:
    """Whether an error arrives at another process: many cannot be read there, as those whose `__init__` takes other arguments."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


def lowest_of_each(accelerator: Accelerator, values: Sequence[int]) -> list[int]:
    """The minimum of each of `values` over all processes; every process must call this at the same place."""
    if accelerator.num_processes == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.int64)
    options = torch.distributed.AllreduceOptions()
    options.reduceOp = torch.distributed.ReduceOp(torch.distributed.ReduceOp.MIN)
    control_group().allreduce([tensor], options).wait()
    return tensor.tolist()


def lowest(accelerator: Accelerator, value: int) -> int:
    """The minimum of `value` over all processes; every process must call this at the same place."""
    return lowest_of_each(accelerator, [value])[0]


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is True on any process; every process must call this at the same place."""
    return lowest(accelerator, int(not flag)) == 0


def is_alone() -> bool:
    """Whether no other process trains the same model."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def has_lost_another(error: BaseException | None) -> bool:
    """Whether an error only says that another process is gone: that one failed, or was ended."""
    while error is not None:
        if isinstance(error, torch.distributed.DistError) or "/gloo/transport/" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def describe_processes(accelerator: Accelerator) -> str:
    """`1`, or the number of processes with what connects them: `2 (gloo, CPU)`, `8 (nccl, GPUs; FSDP2: 8 shards)`.

    Of several machines also the network of each: `4 (gloo, CPU) on 2 machines, over eth0 of node1, eth0 of node2`.
    """
    if accelerator.num_processes == 1:
        return "1"
    devices = {"cpu": "CPU", "cuda": "GPUs"}.get(accelerator.device.type, accelerator.device.type)
    spread = f"; {sharding}" if (sharding := read_sharding()) else ""
    text = f"{accelerator.num_processes} ({torch.distributed.get_backend()}, {devices}{spread})"
    return f"{text} on {len(NETWORKS)} machines, over {', '.join(NETWORKS)}" if NETWORKS else text


def agree_to_stop(accelerator: Accelerator, failed: bool = False) -> None:
    """Raise Stopped on every process if one was asked to stop, or has `failed`; all must call this at the same place."""
    check_stop(lambda asked: any_process(accelerator, asked or failed))


def check_time(accelerator: Accelerator, max_minutes: float | None) -> None:
    """Count `--max_minutes` from the first start of the run under a launcher that restarts it (`torchrun --max-restarts`).

    Raises Stopped on every process if the time is over.
    """
    if max_minutes is None or is_alone() or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return
    store = _get_default_store()
    while isinstance(store, torch.distributed.PrefixStore):  # those of an attempt
        store = store.underlying_store
    start = time.time() - (time.monotonic() - REQUEST.started)
    first = float(store.compare_set("start", "", str(start)))  # of the first process that says it, on any machine
    REQUEST.started -= max(0.0, start - first)
    if any_process(accelerator, time.monotonic() - REQUEST.started > 60 * max_minutes):
        stopped = Stopped(f"--max_minutes {max_minutes:g} are over, counted from the first start by this launcher")
        stopped.outcome = "nothing was trained since; the same command goes on from the last checkpoint"
        raise stopped


def check_shared(accelerator: Accelerator, folder: Path, token: str) -> None:
    """Raise UserError on every process if a machine does not see the folder that process 0 has locked with `token`."""
    if accelerator.num_processes == int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        return
    deadline = time.monotonic() + NFS_SECONDS
    sees = accelerator.is_main_process
    while not (sees := sees or is_locked_by(folder, token)) and time.monotonic() < deadline:
        time.sleep(0.5)
    seen: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(seen, (sees, f"{socket.gethostname()}:{folder.absolute()}"))
    blind = sorted({place for sees, place in seen if not sees})
    if blind:
        raise UserError(
            f"--output_dir {folder} is not one folder for all machines: what process 0 wrote to {seen[0][1]} is not in "
            f"{', '.join(blind)}. Every process reads the checkpoint and the best model there; choose an --output_dir on a "
            "disk that all machines share"
        )


def start_sum(tensor: torch.Tensor) -> Any:
    """Begin to replace `tensor` by its sum over processes, which all must do in the same order; `wait()` waits for it."""
    return torch.distributed.all_reduce(tensor, async_op=True)


def share_weights(accelerator: Accelerator, model: nn.Module) -> None:
    """Give every process the parameters and buffers of the first one, as DDP does when it is built."""
    if accelerator.num_processes == 1:
        return
    for bucket in buckets([tensor.detach() for tensor in (*model.parameters(), *model.buffers())]):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).to(accelerator.device)
        torch.distributed.broadcast(flat, 0)
        if not accelerator.is_main_process:
            copy_from(flat, bucket)


def copy_from(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Fill `tensors` with the numbers of `flat`, in order: on a GPU with one kernel for many of them."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def buckets(tensors: Sequence[Tensor], first: int | None = None) -> Iterator[list[Tensor]]:
    """`tensors` in order, in groups of one dtype and at most BUCKET_BYTES, the first of at most `first` where given.

    A larger tensor is a group of its own.
    """
    group: list[Tensor] = []
    limit = first or BUCKET_BYTES
    for tensor in tensors:
        size = sum(member.nbytes for member in group) + tensor.nbytes
        if group and (size > limit or tensor.dtype != group[0].dtype):
            yield group
            group, limit = [], BUCKET_BYTES
        group.append(tensor)
    if group:
        yield group


def finish(accelerator: Accelerator, *objects: Any) -> None:
    """Release the model, then end the process group: the other order can deadlock at exit."""
    accelerator.wait_for_everyone()
    accelerator.free_memory(*objects)
    if not is_alone():
        torch.distributed.destroy_process_group()
