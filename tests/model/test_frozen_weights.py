"""What is frozen is written once, and each checkpoint has it all the same."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from lib.config.train import TrainingConfig
from lib.errors import UserError
from lib.model import weights
from lib.model.layers import freeze
from lib.model.weights import load_weights, save_weights
from lib.run.checkpoint import Checkpointer
from lib.runtime import atomic
from lib.runtime.atomic import find_damage
from tests.run.test_checkpoint import build, checkpointer, equal_weights, publish


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def build_frozen(folder: Path, seed: int = 0) -> PreTrainedModel:
    model = build(folder, seed)
    freeze(model, "backbone")
    return model


def save_at(saver: Checkpointer, step: int) -> Path:
    """A checkpoint of another step, with other trained weights."""
    with torch.no_grad():
        for parameter in saver.model.parameters():
            if parameter.requires_grad:
                parameter.add_(step)
    saver.state.step = step
    saver.save(None)
    return saver.folder / "checkpoints" / f"step-{step}"


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_second_save_reads_and_writes_nothing_that_is_frozen(
    accelerator: Accelerator, roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_frozen(roberta)
    saver = checkpointer(accelerator, tmp_path, model)
    publish(accelerator, model, roberta, tmp_path / "model")
    saver.state.best_scores = {"loss": 1.0}
    seen: dict[str, set[str]] = {"hashed": set(), "written": set()}
    looked_at = []
    sha256, save, isfinite = atomic.sha256, weights.save_torch_state_dict, torch.isfinite

    def counted_sha256(path: Path) -> str:
        seen["hashed"].add(str(Path(*path.parts[path.parts.index("checkpoints") + 2 :])))
        return sha256(path)

    def counted_save(tensors: dict[str, torch.Tensor], *arguments: object, **options: object) -> None:
        seen["written"] |= tensors.keys()
        save(tensors, *arguments, **options)

    def counted_isfinite(tensor: torch.Tensor) -> torch.Tensor:
        looked_at.append(tensor.numel())
        return isfinite(tensor)

    monkeypatch.setattr(atomic, "sha256", counted_sha256)
    monkeypatch.setattr(weights, "save_torch_state_dict", counted_save)
    monkeypatch.setattr(torch, "isfinite", counted_isfinite)
    first = save_at(saver, 3)
    assert {"frozen.safetensors", "best/model.safetensors"} < seen["hashed"]
    assert seen["written"] == model.state_dict().keys()
    for record in (*seen.values(), looked_at):
        record.clear()
    second = save_at(saver, 6)
    assert (first / "frozen.safetensors").samefile(second / "frozen.safetensors")
    linked = {"frozen.safetensors", "best/model.safetensors"}
    files = {str(path.relative_to(second)) for path in second.rglob("*") if path.is_file()}
    assert seen["hashed"] == files - linked - {"manifest.json"}
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert seen["written"] == trained.keys() | dict(model.named_buffers()).keys() & model.state_dict().keys()
    assert sum(looked_at) == sum(trained.values())
    assert find_damage(first) is find_damage(second) is None


def test_what_was_linked_outlives_the_checkpoint_it_came_from(
    accelerator: Accelerator, roberta: Path, tmp_path: Path
) -> None:
    saver = checkpointer(accelerator, tmp_path, build_frozen(roberta, seed=1))
    saver.config = TrainingConfig(save_total_limit=1)
    save_at(saver, 3)
    second = save_at(saver, 6)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-6"]
    other = checkpointer(accelerator, tmp_path, build_frozen(roberta, seed=2))
    other.load(second)
    assert equal_weights(saver.model, other.model)
    shutil.rmtree(second)
    assert find_damage(save_at(saver, 9)) is None


def test_a_flipped_bit_of_a_linked_file_is_noticed_and_no_new_process_takes_it_over(
    accelerator: Accelerator, roberta: Path, tmp_path: Path
) -> None:
    model = build_frozen(roberta)
    saver = checkpointer(accelerator, tmp_path, model)
    flip_a_bit(save_at(saver, 3) / "frozen.safetensors")
    second = save_at(saver, 6)
    assert "frozen.safetensors was changed" in str(find_damage(second))
    later = checkpointer(accelerator, tmp_path, model)
    assert find_damage(save_at(later, 9)) is None


def test_without_links_frozen_weights_come_from_memory_and_not_from_a_damaged_file(
    accelerator: Accelerator, roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    saver = checkpointer(accelerator, tmp_path, build_frozen(roberta, seed=1))
    flip_a_bit(save_at(saver, 3) / "frozen.safetensors")
    second = save_at(saver, 6)
    assert find_damage(second) is None
    other = checkpointer(accelerator, tmp_path, build_frozen(roberta, seed=2))
    other.load(second)
    assert equal_weights(saver.model, other.model)


def test_after_a_load_what_is_frozen_is_written_anew(accelerator: Accelerator, roberta: Path, tmp_path: Path) -> None:
    for name in ("other", "run"):
        (tmp_path / name).mkdir()
    other = save_at(checkpointer(accelerator, tmp_path / "other", build_frozen(roberta, seed=2)), 1)
    saver = checkpointer(accelerator, tmp_path / "run", build_frozen(roberta, seed=1))
    save_at(saver, 3)
    saver.load(other)
    again = checkpointer(accelerator, tmp_path / "run", build_frozen(roberta, seed=3))
    again.load(save_at(saver, 6))
    assert equal_weights(saver.model, again.model)


def test_room_is_asked_only_for_what_will_be_written(
    accelerator: Accelerator, roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_frozen(roberta)
    trained, frozen = (sum(p.nbytes for p in model.parameters() if p.requires_grad is kind) for kind in (True, False))
    saver = checkpointer(accelerator, tmp_path, model)

    def leave(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))  # type: ignore[attr-defined]

    leave(2**20 + 3 * trained + frozen - 1)
    with pytest.raises(UserError, match="make room"):
        save_at(saver, 3)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    leave(2**20 + 3 * trained + frozen)
    save_at(saver, 3)
    leave(2**20 + 3 * trained)
    save_at(saver, 6)


def test_a_checkpoint_of_a_model_without_a_frozen_part_has_one_file_of_weights(
    accelerator: Accelerator, roberta: Path, tmp_path: Path
) -> None:
    saver = checkpointer(accelerator, tmp_path, build(roberta))
    for folder in (save_at(saver, 3), save_at(saver, 6)):
        names = {path.name for path in folder.iterdir()}
        assert names == {"manifest.json", "state.json", "optimizer.pt", "model.safetensors"}
        assert load_file(folder / "model.safetensors").keys() == saver.model.state_dict().keys()


class Tied(nn.Module):
    """Tied weights among what is frozen, among what is trained, and between both; buffers that training changes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.decoder = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.decoder.weight = self.table.weight
        self.table.weight.requires_grad_(False)
        self.low, self.high, self.view = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.high.weight = self.low.weight
        self.view.weight = nn.Parameter(self.low.weight.data, requires_grad=False)
        self.norm = nn.BatchNorm1d(4)
        self.norm(torch.randn(3, 4))


def same_state(one: nn.Module, two: nn.Module) -> bool:
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_tied_weights_and_the_buffers_of_trained_parts_are_loaded_again(tmp_path: Path) -> None:
    model, other = Tied(1), Tied(2)
    save_weights(model, tmp_path)
    assert len(load_file(tmp_path / "frozen.safetensors")) == 2
    with torch.no_grad():
        model.low.weight.add_(1)
        model.norm(torch.randn(3, 4))
    save_weights(model, tmp_path)
    assert not same_state(model, other)
    load_weights(other, tmp_path)
    assert same_state(model, other)
    assert other.high.weight is other.low.weight
    assert other.decoder.weight is other.table.weight


@pytest.mark.parametrize(("then", "now"), [(None, "backbone"), ("backbone", None), ("1", "embeddings")])
def test_weights_are_loaded_though_another_part_was_frozen(
    roberta: Path, tmp_path: Path, then: str | None, now: str | None
) -> None:
    model, other = build(roberta, seed=1), build(roberta, seed=2)
    freeze(model, then)
    freeze(other, now)
    save_weights(model, tmp_path)
    assert (tmp_path / "frozen.safetensors").exists() == (then is not None)
    load_weights(other, tmp_path)
    assert same_state(model, other)


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    model, less = Tied(1), Tied(1)
    less.norm = nn.BatchNorm1d(4, affine=False)
    save_weights(less, tmp_path)
    with pytest.raises(UserError, match=r"norm\.bias, norm\.weight is missing, nothing is unknown"):
        load_weights(model, tmp_path)
    save_weights(model, tmp_path)
    with pytest.raises(UserError, match=r"nothing is missing, norm\.bias, norm\.weight is unknown"):
        load_weights(less, tmp_path)
    (tmp_path / "frozen.safetensors").unlink()
    with pytest.raises(UserError, match=r"decoder\.weight|table\.weight"):
        load_weights(model, tmp_path)
