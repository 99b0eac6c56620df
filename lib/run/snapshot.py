"""What a checkpoint takes from a learner at one step, and how its tensors become files."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lib.errors import UserError
from lib.model.weights import FROZEN, save_weights, split_weights
from lib.training.learner import Learner
from lib.training.state import State

OPTIMIZER = "optimizer.pt"
"""The file of a checkpoint with AdamW's moments, the schedule, and the loss scale of fp16."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The learner of one step, whole, as the main process writes it."""

    state: State
    record: dict[str, Any]
    """The content of state.json."""
    trained: dict[str, torch.Tensor]
    """Weights that training changes."""
    frozen: dict[str, torch.Tensor]
    """The other weights: always those of the model itself."""
    optimizer: dict[str, Any]
    """The content of optimizer.pt."""

    @property
    def name(self) -> str:
        """The name of the checkpoint's folder."""
        return f"step-{self.state.step}" + ("-pending" if self.state.pending else "")


def take_snapshot(learner: Learner, record: dict[str, Any], optimizer: dict[str, Any]) -> Snapshot:
    """The learner now; `optimizer` is the state of its optimizer, `record` what state.json holds besides the counters.

    The main process calls this where the weights are whole. Raises UserError if a trained weight is not finite.
    """
    check_finite(learner.inner_model)
    trained, frozen = split_weights(learner.inner_model)
    tensors = {"optimizer": optimizer, "scheduler": learner.scheduler.state_dict()}
    if (scaler := learner.accelerator.scaler) is not None:
        tensors["scaler"] = scaler.state_dict()
    record = {"state": dataclasses.asdict(learner.state)} | record
    return Snapshot(learner.state, record, trained, frozen, tensors)


def write_tensors(snapshot: Snapshot, folder: Path) -> None:
    """Write the weights and the optimizer of a checkpoint; a file of frozen weights in `folder` is kept as it is."""
    save_weights(snapshot.trained, snapshot.frozen, folder)
    with (folder / OPTIMIZER).open("wb") as file:  # by its path, errors of the disk would lose their cause
        torch.save(snapshot.optimizer, file)


def bytes_to_write(snapshot: Snapshot, folder: Path) -> int:
    """Bytes of the tensors that `write_tensors` would write to `folder`."""
    parts = [snapshot.trained, snapshot.optimizer, {} if (folder / FROZEN).exists() else snapshot.frozen]
    held = {storage._cdata: storage.nbytes() for storage in storages(parts)}
    return sum(held.values())


def storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """The memory of all tensors in nested containers."""
    return (leaf.untyped_storage() for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def check_finite(model: nn.Module) -> None:
    """Raise UserError if a trained weight is not finite."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise UserError(f"{name} holds numbers that are not finite; try a lower --learning_rate")
