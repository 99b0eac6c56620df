"""Frozen weights are written once; later checkpoints hold a hard link to them."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import PreTrainedModel

from lib.config.train import TrainingConfig
from lib.errors import UserError
from lib.model.layers import freeze
from lib.run.checkpoint import Checkpointer
from lib.runtime.atomic import find_damage
from tests.resuming import build, checkpointer, equal_weights, publish


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
        for parameter in saver.learner.model.parameters():
            if parameter.requires_grad:
                parameter.add_(step)
    saver.learner.state.step = step
    saver.save(None)
    return saver.folder / "checkpoints" / f"step-{step}"


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_frozen_weights_and_the_best_model_are_hard_links_to_the_previous_checkpoint(
    accelerator: Accelerator, roberta: Path, tmp_path: Path
) -> None:
    model = build_frozen(roberta)
    saver = checkpointer(accelerator, tmp_path, model)
    publish(accelerator, model, roberta, tmp_path / "model")
    saver.learner.state.best_scores = {"loss": 1.0}
    first, second = save_at(saver, 3), save_at(saver, 6)
    shared = {
        path.relative_to(first)
        for path in first.rglob("*.safetensors")
        if path.samefile(second / path.relative_to(first))
    }
    assert shared == {Path("frozen.safetensors"), Path("best/model.safetensors")}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained <= load_file(second / "model.safetensors").keys() <= trained | dict(model.named_buffers()).keys()
    assert find_damage(first) is find_damage(second) is None


def test_hard_link_outlives_the_checkpoint_it_came_from(
    accelerator: Accelerator, roberta: Path, tmp_path: Path
) -> None:
    saver = checkpointer(accelerator, tmp_path, build_frozen(roberta, seed=1))
    saver.config = TrainingConfig(save_total_limit=1)
    save_at(saver, 3)
    second = save_at(saver, 6)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-6"]
    other = checkpointer(accelerator, tmp_path, build_frozen(roberta, seed=2))
    other.load(second)
    assert equal_weights(saver.learner.model, other.learner.model)
    shutil.rmtree(second)
    assert find_damage(save_at(saver, 9)) is None


def test_flipped_bit_in_a_linked_file_is_noticed_and_not_passed_on(
    accelerator: Accelerator, roberta: Path, tmp_path: Path
) -> None:
    model = build_frozen(roberta)
    saver = checkpointer(accelerator, tmp_path, model)
    flip_a_bit(save_at(saver, 3) / "frozen.safetensors")
    second = save_at(saver, 6)
    assert "frozen.safetensors was changed" in str(find_damage(second))
    later = checkpointer(accelerator, tmp_path, model)
    assert find_damage(save_at(later, 9)) is None


def test_without_hard_links_frozen_weights_are_written_from_memory(
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
    assert equal_weights(saver.learner.model, other.learner.model)


def test_frozen_weights_are_written_anew_after_a_checkpoint_is_loaded(
    accelerator: Accelerator, roberta: Path, tmp_path: Path
) -> None:
    for name in ("other", "run"):
        (tmp_path / name).mkdir()
    other = save_at(checkpointer(accelerator, tmp_path / "other", build_frozen(roberta, seed=2)), 1)
    saver = checkpointer(accelerator, tmp_path / "run", build_frozen(roberta, seed=1))
    save_at(saver, 3)
    saver.load(other)
    again = checkpointer(accelerator, tmp_path / "run", build_frozen(roberta, seed=3))
    again.load(save_at(saver, 6))
    assert equal_weights(saver.learner.model, again.learner.model)


def test_disk_space_is_needed_only_for_the_files_that_are_written(
    accelerator: Accelerator, roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_frozen(roberta)
    trained, frozen = (sum(p.nbytes for p in model.parameters() if p.requires_grad is kind) for kind in (True, False))
    saver = checkpointer(accelerator, tmp_path, model)
    counts = 4 * sum(p.requires_grad for p in model.parameters())  # of AdamW's steps
    saved = 2**20 + 3 * trained + counts

    def leave(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))  # type: ignore[attr-defined]

    leave(saved + frozen - 1)
    with pytest.raises(UserError, match="make room"):
        save_at(saver, 3)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    leave(saved + frozen)
    save_at(saver, 3)
    leave(saved)
    save_at(saver, 6)


def test_checkpoint_without_a_frozen_part_has_one_file_of_weights(
    accelerator: Accelerator, roberta: Path, tmp_path: Path
) -> None:
    saver = checkpointer(accelerator, tmp_path, build(roberta))
    for folder in (save_at(saver, 3), save_at(saver, 6)):
        names = {path.name for path in folder.iterdir()}
        assert names == {"manifest.json", "state.json", "optimizer.pt", "model.safetensors"}
        assert load_file(folder / "model.safetensors").keys() == saver.learner.model.state_dict().keys()
