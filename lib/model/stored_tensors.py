"""Tensors on disk by their names: in a file of safetensors, or in a folder to which every process wrote what it holds.

Either is read by parts: a process reads what it is to hold, whatever number of processes wrote it.
"""

import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path, PosixPath
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo

from lib.errors import UserError, first_line
from lib.model.sharding import is_sharded, own_part, own_slices
from lib.runtime.atomic import Entries, describe_file, listed_files
from lib.runtime.processes import side_group, tell_all, together
from lib.runtime.watchdog import beat

LARGE = 2_000_000_000
"""Parameters, frozen ones included, from which a model in shards is saved in parts: before, one process has room for all."""


def is_saved_in_parts(model: nn.Module) -> bool:
    """Whether every process writes what it holds of the model, instead of the first one writing all."""
    return is_sharded(model) and sum(parameter.numel() for parameter in model.parameters()) >= LARGE


def parts_of(file: Path) -> Path:
    """The folder that stands in the place of a file of tensors: model.shards for model.safetensors."""
    return file.with_suffix(".shards")


def stored_files(folder: Path, name: str) -> Entries:
    """What the manifest of `folder` lists of the tensors `name`: a file, or those of the folder in its place."""
    parts = parts_of(Path(name)).as_posix() + "/"
    return {file: entry for file, entry in listed_files(folder).items() if file == name or file.startswith(parts)}


def stored_at(folder: Path, name: str) -> Path:
    """Where the tensors `name` of `folder` are: in the parts that its manifest lists, else in the file.

    Parts that it does not list were not verified, and are not read.
    """
    return folder / name if stored_files(folder, name).keys() <= {name} else parts_of(folder / name)


def carry_over(source: Path, before: str, target: Path, name: str, put: Callable[[Path, Path], object]) -> Entries:
    """Have `put` link or copy what the manifest of `source` lists of the tensors `before` to `target`, as `name`.

    Returns the files with size and sha256; none if it lists none. After an error of one of them none is left.
    """
    old, new = parts_of(Path(before)).as_posix() + "/", parts_of(Path(name)).as_posix() + "/"
    carried: Entries = {}
    try:
        for file, entry in stored_files(source, before).items():
            beat()
            copy = name if file == before else new + file.removeprefix(old)
            (target / copy).parent.mkdir(parents=True, exist_ok=True)
            put(source / file, target / copy)
            carried[copy] = entry
    except OSError:
        (target / name).unlink(missing_ok=True)
        shutil.rmtree(target / new, ignore_errors=True)
        raise
    return carried


def write_parts(tensors: Mapping[str, torch.Tensor], folder: Path) -> Entries:
    """Write tensors that lie in shards to the new `folder`, each process what it holds; every process must call this.

    Returns the files with size and sha256, on every process; each hashes its own. What replicas hold is written once. An
    error of any process is raised on all.
    """
    writer = together(lambda: checkpoint.FileSystemWriter(folder, overwrite=False))
    try:
        checkpoint.save(dict(tensors), storage_writer=writer, process_group=side_group())
    except CheckpointException as error:
        raise cause_of(error) from None
    rank = torch.distributed.get_rank()
    patterns = [f"__{rank}_*", *([".metadata"] if rank == 0 else [])]
    own = together(lambda: {file.name: describe_file(file) for name in patterns for file in folder.glob(name)})
    found = tell_all(own)
    return {name: entry for entries in found for name, entry in entries.items()}


def cause_of(error: CheckpointException) -> BaseException:
    """The error of a process, the same on all, in the library's own, which no `except Exception` would meet."""
    return next(iter(error.failures.values()))[0]


class MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but what PyTorch writes to .metadata: shapes, dtypes, layouts, and where a tensor lies in which file."""

    CLASSES = (
        metadata.Metadata,
        metadata.TensorStorageMetadata,
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.TensorProperties,
        metadata._MEM_FORMAT_ENCODING,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        _StorageInfo,
    )
    KNOWN = {(known.__module__, known.__qualname__): known for known in CLASSES} | {
        ("torch", "Size"): torch.Size,
        ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
        ("pathlib", "PosixPath"): PosixPath,
        ("pathlib._local", "PosixPath"): PosixPath,  # of Python 3.13
    }

    def find_class(self, module: str, name: str) -> Any:
        if (known := self.KNOWN.get((module, name))) is not None:
            return known
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there; it was not written by this program")


class PartsReader(checkpoint.FileSystemReader):
    """Reads a folder that `write_parts` wrote, its .metadata once. Raises UserError if that cannot be read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        file = folder / ".metadata"
        try:
            with file.open("rb") as content:
                self.metadata: metadata.Metadata = MetadataUnpickler(content).load()
        except Exception as error:  # bytes that are no pickle raise almost anything
            raise UserError(f"{file} cannot be read: {first_line(error)}") from error

    def read_metadata(self, *_: Any, **__: Any) -> metadata.Metadata:
        return self.metadata


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
        self.reader = PartsReader(path)
        for name, found in self.reader.metadata.state_dict_metadata.items():
            if isinstance(found, metadata.TensorStorageMetadata):
                self.shapes[name], self.dtypes[name] = found.size, found.properties.dtype

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Read tensors of these names into what this process holds of them.

        Raises UserError where shapes differ, and where parts cannot be read.
        """
        if self.file is not None:
            for name, tensor in tensors.items():
                own_part(tensor.detach()).copy_(self.read(name, tensor))
            return
        for name, tensor in tensors.items():
            self.check(name, tensor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it takes this for a run of one process, since nothing is sent
            found = {name: tensor.detach() for name, tensor in tensors.items()}
            try:
                checkpoint.load(found, storage_reader=self.reader, no_dist=True)
            except CheckpointException as error:
                cause = cause_of(error)
                if not isinstance(cause, Exception):  # a signal
                    raise cause from None
                raise UserError(f"{self.path} cannot be read: {first_line(cause)}") from cause

    def read(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """What this process is to hold of a tensor in the shards of `like`, in main memory, in the dtype that it was saved in.

        Raises UserError where shapes differ.
        """
        self.check(name, like)
        if self.file is None:
            tensor = torch.empty_like(like, dtype=self.dtypes[name], device="cpu")
            self.fill({name: tensor})
            return own_part(tensor)
        return self.file.get_slice(name)[own_slices(like)] if like.ndim else self.file.get_tensor(name)

    def check(self, name: str, like: torch.Tensor) -> None:
        if like.shape != self.shapes[name]:
            raise UserError(
                f"{self.path}: {name} has the shape {tuple(self.shapes[name])}, and {tuple(like.shape)} in this model"
            )
