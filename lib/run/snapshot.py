"""What a checkpoint takes from a learner at one step, and how its tensors become files."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from lib.errors import UserError
from lib.model.sharding import is_shard, is_sharded, own_part
from lib.model.stored_tensors import parts_of, write_parts
from lib.model.weights import FROZEN, WEIGHTS, save_weights, split_weights
from lib.runtime.atomic import Entries
from lib.runtime.memory import is_out_of_memory
from lib.runtime.watchdog import beat
from lib.training.learner import Learner
from lib.training.state import State

OPTIMIZER = "optimizer.pt"
"""The file of a checkpoint with AdamW's moments, the schedule, and the loss scale of fp16."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The learner of one step; its tensors are the learner's own until `copied`.

    The main process has it whole and writes it; or, of a large model in shards, every process has and writes its part.
    """

    state: State
    record: dict[str, Any]
    """The content of state.json."""
    trained: dict[str, torch.Tensor]
    """Weights that training changes."""
    frozen: dict[str, torch.Tensor]
    """The other weights; none where the checkpoint has them already."""
    optimizer: dict[str, Any]
    """The content of optimizer.pt."""
    moments: dict[str, torch.Tensor] | None = None
    """AdamW's moments, where every process has its part; None where they are in optimizer.pt."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, of those in shards the bytes of all processes."""
        if self.moments is not None:
            return sum(tensor.nbytes for part in (self.trained, self.frozen, self.moments) for tensor in part.values())
        parts = [self.trained, self.frozen, self.optimizer]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages(parts)}.values())

    def copied(self, learner: Learner) -> "Snapshot":
        """A snapshot in main memory that training on does not change; copies that a model in shards made of itself are kept.

        Frozen weights on a CPU are not copied: nothing changes them. Raises UserError if main memory is too short.
        """
        copies = Copies(changing(learner))
        try:
            trained, optimizer, moments = (copies.of(part) for part in (self.trained, self.optimizer, self.moments))
            frozen = self.frozen if learner.accelerator.device.type == "cpu" else copies.of(self.frozen)
            copies.wait()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"main memory is too short for a copy of what is trained, {self.nbytes / 2**20:,.0f} MiB; with "
                "--async_save False none is made, and training waits while a checkpoint is written"
            ) from error
        return dataclasses.replace(self, trained=trained, frozen=frozen, optimizer=optimizer, moments=moments)


def take_snapshot(
    learner: Learner,
    record: dict[str, Any],
    optimizer: dict[str, Any],
    frozen: bool,
    moments: dict[str, torch.Tensor] | None = None,
) -> Snapshot:
    """The learner now, where its weights are whole; with the `frozen` ones or without.

    `optimizer` is the state of its optimizer, `record` what state.json holds besides the counters. Given its `moments`, of
    what each process holds, which `optimizer` lacks then, it is the part of this process. Raises UserError if a trained
    weight is not finite.
    """
    check_finite(learner.inner_model)
    trained, fixed = split_weights(learner.inner_model)
    tensors = {"optimizer": optimizer, "scheduler": learner.scheduler.state_dict()}
    if (scaler := learner.accelerator.scaler) is not None:
        tensors["scaler"] = scaler.state_dict()
    state = copy.deepcopy(learner.state)
    record = {"state": dataclasses.asdict(state)} | record
    return Snapshot(state, record, trained, fixed if frozen else {}, tensors, moments)


def write_tensors(snapshot: Snapshot, folder: Path) -> None:
    """Write the weights and the optimizer of a checkpoint to `folder`, but for what `write_held` writes."""
    if snapshot.moments is None:
        beat(f"{snapshot_phase(snapshot.state)}, weights")
        save_weights(snapshot.trained, snapshot.frozen, folder)
    beat(f"{snapshot_phase(snapshot.state)}, optimizer")
    with (folder / OPTIMIZER).open("wb") as file:  # by its path, errors of the disk would lose their cause
        torch.save(snapshot.optimizer, file)


def write_held(snapshot: Snapshot, folder: Path) -> Entries:
    """Write what this process holds of weights and moments in shards to `folder`; every process must call this.

    Returns the files of all processes; an error of one is raised on all.
    """
    files = {WEIGHTS: snapshot.trained, FROZEN: snapshot.frozen, OPTIMIZER: snapshot.moments or {}}
    written: Entries = {}
    for file, tensors in files.items():
        if tensors:
            place = parts_of(folder / file)
            beat(f"{snapshot_phase(snapshot.state)}, {place.name}")
            written |= {f"{place.name}/{name}": entry for name, entry in write_parts(tensors, place).items()}
    return written


def snapshot_phase(state: State) -> str:
    """What the watchdog shows."""
    return f"checkpoint of step {state.step}"


class Copies:
    """Copies in main memory of tensors in `memory`, by its addresses; other tensors are kept as they are.

    Tensors that share memory share that of their copies, so that they are written as before. From a GPU they are copied
    into pinned memory, all at once: `wait` before they are read. Of tensors in shards what this process holds is copied.
    """

    def __init__(self, memory: set[int]) -> None:
        self.memory = memory
        self.made: dict[int, torch.UntypedStorage] = {}
        self.devices: set[torch.device] = set()

    def of(self, value: Any) -> Any:
        """Nested containers with copies of their tensors and of all else."""
        return tree_map(lambda leaf: self.copy(leaf) if isinstance(leaf, torch.Tensor) else copy.deepcopy(leaf), value)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if is_shard(tensor):
            return tensor.detach().to("cpu", copy=True)
        storage = tensor.untyped_storage()
        address, on_gpu = storage.data_ptr(), storage.device.type == "cuda"
        if address not in self.memory:
            return tensor
        if address not in self.made:
            source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            target = torch.empty(len(source), dtype=torch.uint8, pin_memory=on_gpu)
            self.made[address] = target.copy_(source, non_blocking=on_gpu).untyped_storage()
            self.devices.add(storage.device)
        view = torch.empty(0, dtype=tensor.dtype)
        return view.set_(self.made[address], tensor.storage_offset(), tensor.size(), tensor.stride())

    def wait(self) -> None:
        """Wait until the copies are there."""
        for device in self.devices:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)


def changing(learner: Learner) -> set[int]:
    """The addresses of the memory that a step changes, and of frozen weights; of a model in shards only what is no shard.

    Its parameters and moments were gathered, into memory that nothing else uses.
    """
    tensors = [*learner.inner_model.buffers(), *tree_leaves(learner.optimizer.state_dict()["state"])]
    tensors += [] if is_sharded(learner.model) else learner.inner_model.parameters()
    return {storage.data_ptr() for storage in storages(tensors)}


def storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """The memory of all tensors in nested containers, of those in shards that of this process."""
    return (own_part(leaf).untyped_storage() for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def check_finite(model: nn.Module) -> None:
    """Raise UserError if what this process holds of a trained weight is not finite. A GPU is waited for once."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    finite = torch.stack([torch.isfinite(own_part(parameter)).all() for parameter in trained.values()]).tolist()
    for name, good in zip(trained, finite, strict=True):
        if not good:
            raise UserError(f"{name} holds numbers that are not finite; try a lower --learning_rate")
