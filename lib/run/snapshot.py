"""What a checkpoint takes from a learner at one step, and how its tensors become files."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lib.errors import UserError
from lib.model.sharding import own_part
from lib.model.stored_tensors import parts_of, write_parts
from lib.model.weights import FROZEN, WEIGHTS, save_weights, split_weights
from lib.runtime.atomic import Entries
from lib.training.learner import Learner
from lib.training.state import State

OPTIMIZER = "optimizer.pt"
"""The file of a checkpoint with AdamW's moments, the schedule, and the loss scale of fp16."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The learner of one step, whole, as the main process writes it; or in shards, of which each process writes its own."""

    state: State
    record: dict[str, Any]
    """The content of state.json."""
    trained: dict[str, torch.Tensor]
    """Weights that training changes."""
    frozen: dict[str, torch.Tensor]
    """The other weights: always those of the model itself."""
    optimizer: dict[str, Any]
    """The content of optimizer.pt."""
    moments: dict[str, torch.Tensor] | None = None
    """AdamW's moments, where every process has its snapshot: of what it holds of tensors. None where one has all."""

    @property
    def name(self) -> str:
        """The name of the checkpoint's folder."""
        return f"step-{self.state.step}" + ("-pending" if self.state.pending else "")


def take_snapshot(
    learner: Learner, record: dict[str, Any], optimizer: dict[str, Any], moments: dict[str, torch.Tensor] | None = None
) -> Snapshot:
    """The learner now; `optimizer` is the state of its optimizer, `record` what state.json holds besides the counters.

    The main process calls this where the weights are whole; or every process, with `moments` of the optimizer in shards,
    which its state lacks then. Raises UserError if a trained weight is not finite.
    """
    check_finite(learner.inner_model)
    trained, frozen = split_weights(learner.inner_model)
    tensors = {"optimizer": optimizer, "scheduler": learner.scheduler.state_dict()}
    if (scaler := learner.accelerator.scaler) is not None:
        tensors["scaler"] = scaler.state_dict()
    record = {"state": dataclasses.asdict(learner.state)} | record
    return Snapshot(learner.state, record, trained, frozen, tensors, moments)


def write_tensors(snapshot: Snapshot, folder: Path) -> None:
    """Write the weights and the optimizer of a checkpoint; a file of frozen weights in `folder` is kept as it is."""
    save_weights(snapshot.trained, snapshot.frozen, folder)
    write_optimizer(snapshot, folder)


def write_optimizer(snapshot: Snapshot, folder: Path) -> None:
    with (folder / OPTIMIZER).open("wb") as file:  # by its path, errors of the disk would lose their cause
        torch.save(snapshot.optimizer, file)


def write_held(snapshot: Snapshot, folder: Path, with_frozen: bool) -> Entries:
    """Write what this process holds of weights and moments, `with_frozen` also of the frozen ones.

    Every process must call this. Returns the files of all processes; an error of one is raised on all.
    """
    frozen = snapshot.frozen if with_frozen else {}
    files = {WEIGHTS: snapshot.trained, OPTIMIZER: snapshot.moments or {}, FROZEN: frozen}
    written: Entries = {}
    for file, tensors in files.items():
        if tensors:
            place = parts_of(folder / file)
            written |= {f"{place.name}/{name}": entry for name, entry in write_parts(tensors, place).items()}
    return written


def bytes_to_write(snapshot: Snapshot, folder: Path) -> int:
    """Bytes of the tensors that `write_tensors` would write to `folder`, or all processes together."""
    if snapshot.moments is not None:
        frozen = {} if parts_of(folder / FROZEN).exists() else snapshot.frozen
        return sum(tensor.nbytes for part in (snapshot.trained, snapshot.moments, frozen) for tensor in part.values())
    parts = [snapshot.trained, snapshot.optimizer, {} if (folder / FROZEN).exists() else snapshot.frozen]
    held = {storage._cdata: storage.nbytes() for storage in storages(parts)}
    return sum(held.values())


def storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """The memory of all tensors in nested containers."""
    return (leaf.untyped_storage() for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def check_finite(model: nn.Module) -> None:
    """Raise UserError if what this process holds of a trained weight is not finite."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(own_part(parameter)).all()):
            raise UserError(f"{name} holds numbers that are not finite; try a lower --learning_rate")
