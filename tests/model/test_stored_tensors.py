"""Tensors on disk are read as they were written, in a file or in parts, and errors of a process are those of all."""

import errno
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification

from lib.errors import UserError
from lib.model import sharding, stored_tensors
from lib.model.sharding import device_mesh, gathered_parts, own_slices, shard_model, tensors_of
from lib.model.stored_tensors import StoredTensors, carry_over, is_saved_in_parts, parts_of, stored_at, write_parts
from lib.model.weights import reload_model, save_model
from lib.run import best_model
from lib.runtime import processes
from lib.runtime.atomic import describe_file, file_names, find_damage, write_manifest
from lib.runtime.launch_checks import Sharding
from tests.tiny_models import build_from


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """A group of one process, over which tensors are spread."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    processes.side_group.cache_clear()
    yield device_mesh(1, 1, "cpu")
    processes.side_group.cache_clear()
    torch.distributed.destroy_process_group()


def spread(mesh: Any) -> dict[str, torch.Tensor]:
    shards = [sharding.Shard(0)]
    return {
        "a.weight": DTensor.from_local(torch.randn(5, 3), mesh, shards),
        "a.bias": DTensor.from_local(torch.randn(5).bfloat16(), mesh, shards),
        "count": torch.tensor(7),
    }


def test_parts_are_read_as_they_were_written_with_shards_and_without(mesh: Any, tmp_path: Path) -> None:
    tensors, folder = spread(mesh), parts_of(tmp_path / "model.safetensors")
    written = write_parts(tensors, folder)
    assert written == {file.name: describe_file(file) for file in folder.iterdir()}
    assert ".metadata" in written
    assert stored_at(tmp_path, "model.safetensors") == tmp_path / "model.safetensors"  # no manifest lists the parts
    write_manifest(tmp_path, {}, known={f"{folder.name}/{name}": entry for name, entry in written.items()})
    assert stored_at(tmp_path, "model.safetensors") == folder
    stored = StoredTensors(folder)
    assert stored.shapes == {name: tensor.shape for name, tensor in tensors.items()}
    for like in (tensors, {name: sharding.own_part(tensor) for name, tensor in tensors.items()}):
        found = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
        stored.fill(found)
        for name, tensor in found.items():
            assert type(tensor) is type(like[name])
            assert torch.equal(sharding.own_part(tensor), sharding.own_part(tensors[name]))
            assert torch.equal(stored.read(name, like[name]), sharding.own_part(tensors[name]))
    assert stored.read("a.bias", torch.zeros(5)).dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"a\.bias has the shape \(5,\), and \(4,\) in this model"):
        stored.fill({"a.bias": torch.zeros(4)})


def test_file_is_read_by_parts_too(mesh: Any, tmp_path: Path) -> None:
    tensors, file = spread(mesh), tmp_path / "model.safetensors"
    save_file({name: sharding.own_part(tensor) for name, tensor in tensors.items()}, file)
    write_manifest(tmp_path, {})
    (tmp_path / "model.shards").mkdir()
    (tmp_path / "model.shards" / ".metadata").write_text("put there later")
    assert stored_at(tmp_path, file.name) == file
    stored, found = StoredTensors(file), {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    stored.fill(found)
    for name, tensor in tensors.items():
        assert torch.equal(sharding.own_part(found[name]), sharding.own_part(tensor))
        assert torch.equal(stored.read(name, tensor), sharding.own_part(tensor))
    with pytest.raises(UserError, match=r"a\.weight has the shape \(5, 3\), and \(4, 3\) in this model"):
        stored.read("a.weight", torch.zeros(4, 3))


def test_what_is_read_is_in_main_memory_from_files_and_parts_alike(mesh: Any, tmp_path: Path) -> None:
    """Else their mean would mix devices."""
    tensors, file = spread(mesh), tmp_path / "model.safetensors"
    whole = {name: sharding.own_part(tensor) for name, tensor in tensors.items()}
    save_file(whole, file)
    write_parts(tensors, parts_of(file))
    for path in (file, parts_of(file)):
        stored = StoredTensors(path)
        for name, tensor in whole.items():
            assert torch.equal(stored.read(name, torch.empty_like(tensor, device="meta")), tensor)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil-was-here",)


@pytest.mark.parametrize("evil", [Evil(), os.getcwd, torch.load, Path.cwd, {"a": [Evil()]}])
def test_metadata_of_parts_cannot_run_code(
    mesh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evil: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model.shards"
    write_parts(spread(mesh), folder)
    stored = StoredTensors(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(evil))
    with pytest.raises(UserError, match=r"model\.shards/\.metadata cannot be read: .* does not belong there"):
        StoredTensors(folder)
    stored.fill({"a.weight": torch.zeros(5, 3)})  # it is not read again
    (folder / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(UserError, match=r"model\.shards/\.metadata cannot be read"):
        StoredTensors(folder)
    assert not (tmp_path / "evil-was-here").exists()


def test_parts_that_cannot_be_read_are_named(mesh: Any, tmp_path: Path) -> None:
    """The library raises an error that no `except Exception` would meet."""
    folder = tmp_path / "model.shards"
    write_parts(spread(mesh), folder)
    for file in folder.glob("*.distcp"):
        file.unlink()
    stored = StoredTensors(folder)
    with pytest.raises(UserError, match=r"model\.shards cannot be read: .*No such file"):
        stored.fill({"a.weight": torch.zeros(5, 3)})


@pytest.mark.parametrize("kind", ["file", "parts"])
def test_tensors_are_carried_over_as_the_manifest_lists_them_or_not_at_all(tmp_path: Path, kind: str) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    names = {"file": ["model.safetensors"], "parts": [f"model.shards/{n}" for n in (".metadata", "__0_0", "__1_0")]}
    for name in names[kind]:
        (first / name).parent.mkdir(parents=True, exist_ok=True)
        (first / name).write_text(name)
    write_manifest(first, {})
    (first / "model.shards").mkdir(exist_ok=True)
    (first / "model.shards" / "__9_0").write_text("put there later")
    carried = carry_over(first, "model.safetensors", second, "kept/step-1.safetensors", os.link)
    assert list(carried) == file_names(second)
    write_manifest(second, {}, known=carried)
    assert find_damage(second) is None
    assert stored_at(second, "kept/step-1.safetensors").exists()
    (second / list(carried)[-1]).unlink()
    with pytest.raises(FileNotFoundError):
        carry_over(second, "kept/step-1.safetensors", third, "kept/step-1.safetensors", os.link)
    assert file_names(third) == []
    assert carry_over(first, "frozen.safetensors", third, "frozen.safetensors", os.link) == {}


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 3, 4, 5, 12])
def test_parts_of_a_tensor_are_those_that_pytorch_gives_to_processes(
    monkeypatch: pytest.MonkeyPatch, shards: int, size: int
) -> None:
    class Mesh:
        rank = 0

        def size(self, _: int) -> int:
            return shards

        def get_local_rank(self, _: int) -> int:
            return self.rank

    class Spread:
        shape, device_mesh, placements = (size, 2), Mesh(), (sharding.Shard(0),)

    monkeypatch.setattr(sharding, "DTensor", Spread)
    whole = torch.arange(2 * size).view(size, 2)
    wanted = [*whole.chunk(shards), *[whole[:0]] * shards][:shards]
    for Spread.device_mesh.rank, part in enumerate(wanted):
        assert torch.equal(whole[own_slices(Spread())], part)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_error_of_the_disk_is_raised_as_it_is(
    mesh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The library raises one that no `except Exception` would meet."""

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        write_parts(spread(mesh), tmp_path / "parts")
    assert caught.value.errno == number


def test_process_that_cannot_read_what_it_wrote_is_heard(
    mesh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(stored_tensors, "describe_file", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_parts(spread(mesh), tmp_path / "parts")


def test_process_that_cannot_open_its_folder_is_heard(
    mesh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(stored_tensors.checkpoint, "FileSystemWriter", fail)
    monkeypatch.setattr(processes, "tell_all", lambda value: told.append(value) or [value])
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_parts(spread(mesh), tmp_path / "parts")
    assert [error.errno for error in told] == [errno.EIO]


def test_frozen_and_trained_parameters_count_for_the_size_from_which_parts_are_saved(
    mesh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    monkeypatch.setattr(stored_tensors, "LARGE", 26)
    assert not is_saved_in_parts(model)  # not in shards
    torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    assert is_saved_in_parts(model)
    monkeypatch.setattr(stored_tensors, "LARGE", 27)
    assert not is_saved_in_parts(model)


def test_tied_weights_are_saved_once(mesh: Any) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.table.weight
            self.register_buffer("count", torch.zeros(()))

    model = Tied()
    torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    assert list(tensors_of(model)) == ["count", "table.weight"]


def test_model_in_shards_is_exported_part_by_part_as_a_whole_one(
    mesh: Any, roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "PART", 4096)
    model, whole = build_from(roberta)[0], tmp_path / "whole"
    save_model(model, whole)
    weights = load_file(whole / "model.safetensors")
    shard_model(model, Sharding(1), torch.device("cpu"))
    parts = list(gathered_parts(model))
    assert len(parts) > 3
    for part in parts:
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 4096
    save_model(model, tmp_path / "parts", iter(parts))
    files = {path.name for path in (tmp_path / "parts").iterdir()}
    assert files - {path.name for path in whole.iterdir()} == {"model.safetensors.index.json"} | {
        f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)
    }
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "parts").state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    with torch.no_grad():
        for parameter in model.parameters():
            sharding.own_part(parameter).zero_()
    for folder in (whole, tmp_path / "parts"):
        reload_model(model, folder)
        for name, tensor in tensors_of(model).items():
            assert torch.equal(sharding.own_part(tensor), weights[name])
            sharding.own_part(tensor).zero_()


def test_every_part_is_gathered_where_the_first_process_cannot_write(
    roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for it in each."""
    gathered = []

    def parts(_: Any) -> Iterator[dict[str, torch.Tensor]]:
        for number in range(3):
            gathered.append(number)
            yield {}

    def fail(_: Any, folder: Path, parts: Iterator[Any]) -> None:
        next(parts)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(best_model, "gathered_parts", parts)
    monkeypatch.setattr(best_model, "save_model", fail)
    with pytest.raises(UserError, match="the best model could not be saved"):
        best_model.publish_model(Accelerator(cpu=True), build_from(roberta)[0], None, tmp_path / "model")
    assert gathered == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []
