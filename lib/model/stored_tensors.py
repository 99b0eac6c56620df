"""Tensors on disk by their names: in a file of safetensors, or in a folder to which every process wrote what it holds.

Either is read by parts: a process reads what it is to hold, whatever number of processes wrote it.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lib.errors import UserError
from lib.model.sharding import is_sharded, own_part, own_slices
from lib.runtime.atomic import Entries, describe_file
from lib.runtime.processes import side_group, tell_all, together

LARGE = 2_000_000_000
"""Parameters, frozen ones included, from which a model in shards is saved in parts: before, one process has room for all."""


def is_saved_in_parts(model: nn.Module) -> bool:
    """Whether every process writes what it holds of the model, instead of the first one writing all."""
    return is_sharded(model) and sum(parameter.numel() for parameter in model.parameters()) >= LARGE


def parts_of(file: Path) -> Path:
    """The folder that stands in the place of a file of tensors: model.shards for model.safetensors."""
    return file.with_suffix(".shards")


def stored_at(file: Path) -> Path:
    """The file of tensors, or the folder of parts where that is in its place."""
    return parts_of(file) if parts_of(file).is_dir() else file


def write_parts(tensors: Mapping[str, torch.Tensor], folder: Path) -> Entries:
    """Write tensors that lie in shards to the new `folder`, each process what it holds; every process must call this.

    Returns the files with size and sha256, on every process; each hashes its own. What replicas hold is written once. An
    error of any process is raised on all.
    """
    writer = together(lambda: checkpoint.FileSystemWriter(folder, overwrite=False))
    try:
        checkpoint.save(dict(tensors), storage_writer=writer, process_group=side_group())
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None  # the same on all processes
    rank = torch.distributed.get_rank()
    patterns = [f"__{rank}_*", *([".metadata"] if rank == 0 else [])]
    own = together(lambda: {file.name: describe_file(file) for name in patterns for file in folder.glob(name)})
    found = tell_all(own)
    return {name: entry for entries in found for name, entry in entries.items()}


class StoredTensors:
    """The tensors in a file of safetensors, or in a folder that `write_parts` wrote; reading sends nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = None if path.is_dir() else safe_open(path, framework="pt")
        self.shapes: dict[str, torch.Size] = {}
        """By name."""
        self.dtypes: dict[str, torch.dtype] = {}
        """By name, in a folder."""
        if self.file is not None:
            self.shapes = {name: torch.Size(self.file.get_slice(name).get_shape()) for name in self.file.keys()}  # noqa: SIM118
            return
        for name, found in checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata.items():
            if isinstance(found, TensorStorageMetadata):
                self.shapes[name], self.dtypes[name] = found.size, found.properties.dtype

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Read tensors of these names into what this process holds of them. Raises UserError where shapes differ."""
        if self.file is not None:
            for name, tensor in tensors.items():
                own_part(tensor.detach()).copy_(self.read(name, tensor))
            return
        for name, tensor in tensors.items():
            self.check(name, tensor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it takes this for a run of one process, since nothing is sent
            checkpoint.load(
                {name: tensor.detach() for name, tensor in tensors.items()}, checkpoint_id=self.path, no_dist=True
            )

    def read(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """What this process is to hold of a tensor in the shards of `like`, in the dtype that it was saved in.

        Raises UserError where shapes differ.
        """
        self.check(name, like)
        if self.file is None:
            tensor = torch.empty_like(like, dtype=self.dtypes[name])
            self.fill({name: tensor})
            return own_part(tensor)
        return self.file.get_slice(name)[own_slices(like)] if like.ndim else self.file.get_tensor(name)

    def check(self, name: str, like: torch.Tensor) -> None:
        if like.shape != self.shapes[name]:
            raise UserError(
                f"{self.path}: {name} has the shape {tuple(self.shapes[name])}, and {tuple(like.shape)} in this model"
            )
