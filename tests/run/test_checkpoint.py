"""Checkpoints restore what they saved, never hold numbers that are not finite, and cannot run code."""

import contextlib
import os
import pickle
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from lib.errors import UserError
from lib.run.checkpoint import list_checkpoints, rotate
from lib.runtime.atomic import find_damage, write_manifest
from lib.runtime.memory import StartAgain
from tests.resuming import build, checkpointer, equal_weights, make_checkpoints


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_checkpoint_restores_weights_state_and_schedule(
    accelerator: Accelerator, roberta: Path, tmp_path: Path
) -> None:
    one = checkpointer(accelerator, tmp_path, build(roberta, seed=1))
    one.save("run-7")
    two = checkpointer(accelerator, tmp_path, build(roberta, seed=2))
    two.learner.state.step = 0
    assert two.load(tmp_path / "checkpoints" / "step-3") == "run-7"
    assert equal_weights(one.learner.model, two.learner.model)
    assert two.learner.state == one.learner.state
    assert two.learner.optimizer.param_groups[0]["lr"] == one.learner.optimizer.param_groups[0]["lr"] < 1e-3


def test_batch_size_learned_from_out_of_memory_is_kept_until_it_means_something_else(
    accelerator: Accelerator, roberta: Path, tmp_path: Path
) -> None:
    checkpointer(accelerator, tmp_path, build(roberta)).save(None)
    others: list[dict[str, float]] = [{name: 4} for name in ("per_device_train_batch_size", "feature_cache_gib")]
    others.append({"no_cache_features": True})  # a sample has one position on cached features, and many without
    for settings, kept in (({}, (2, 16)), *((other, (None, 16)) for other in others)):
        later = checkpointer(accelerator, tmp_path, build(roberta), **settings)
        later.learner.state.micro_batch_positions, later.learner.state.eval_batch_size = None, 64
        later.load(tmp_path / "checkpoints" / "step-3")
        assert (later.learner.state.micro_batch_positions, later.learner.state.eval_batch_size) == kept


def test_sizes_noted_where_memory_was_too_short_are_used_by_the_next_start_until_they_mean_something_else(
    accelerator: Accelerator, roberta: Path, tmp_path: Path
) -> None:
    for value in (12, 8):
        checkpointer(accelerator, tmp_path, build(roberta)).note_smaller(
            StartAgain("eval_batch_size", value, "--per_device_eval_batch_size")
        )
        checkpointer(accelerator, tmp_path, build(roberta)).note_smaller(UserError("something else"))
    (tmp_path / "memory" / "9-micro_batch_positions.json").write_text('{"state": {"micro_ba')
    later = checkpointer(accelerator, tmp_path, build(roberta))
    assert later.read_smaller() == {"eval_batch_size": 8}
    later.use_smaller(later.read_smaller())
    assert (later.learner.state.eval_batch_size, later.learner.state.micro_batch_positions) == (8, 2)
    other = checkpointer(accelerator, tmp_path, build(roberta), per_device_eval_batch_size=32)
    assert other.read_smaller() == {}


def test_checkpoint_does_not_overwrite_hyper_parameters(
    accelerator: Accelerator, roberta: Path, tmp_path: Path
) -> None:
    checkpointer(accelerator, tmp_path, build(roberta)).save(None)
    later = checkpointer(accelerator, tmp_path, build(roberta))
    later.learner.optimizer.param_groups[0] |= {"initial_lr": 1.0, "weight_decay": 0.5}
    later.load(tmp_path / "checkpoints" / "step-3")
    group = later.learner.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.9, 0.5)


def test_weights_that_are_not_finite_are_never_saved(accelerator: Accelerator, roberta: Path, tmp_path: Path) -> None:
    model = build(roberta)
    one = checkpointer(accelerator, tmp_path, model)
    one.save(None)
    model.classifier.out_proj.bias.data[0] = float("inf")
    one.learner.state.step = 4
    with pytest.raises(UserError, match=r"step 4 .*classifier\.out_proj\.bias"):
        one.save(None)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil-was-here",))


def test_checkpoint_cannot_run_code(
    accelerator: Accelerator, roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saver = checkpointer(accelerator, tmp_path, build(roberta))
    saver.save(None)
    torch.save({"optimizer": Evil()}, tmp_path / "checkpoints" / "step-3" / "optimizer.pt")
    with pytest.raises(pickle.UnpicklingError):
        saver.load(tmp_path / "checkpoints" / "step-3")
    assert not (tmp_path / "evil-was-here").exists()


def test_parts_that_the_manifest_does_not_list_are_not_read(
    accelerator: Accelerator, roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saver = checkpointer(accelerator, tmp_path, build(roberta))
    saver.save(None)
    checkpoint = tmp_path / "checkpoints" / "step-3"
    for name in ("frozen.shards", "model.shards", "optimizer.shards"):
        (checkpoint / name).mkdir()
        (checkpoint / name / ".metadata").write_bytes(pickle.dumps(Evil()))
    other = checkpointer(accelerator, tmp_path, build(roberta, seed=1))
    other.load(checkpoint)
    assert equal_weights(saver.learner.model, other.learner.model)
    assert not (tmp_path / "evil-was-here").exists()


def test_of_parts_that_have_lost_a_file_nothing_goes_into_the_next_checkpoint(
    accelerator: Accelerator, roberta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saver = checkpointer(accelerator, tmp_path, build(roberta))
    last, fresh = tmp_path / "checkpoints" / "step-1", tmp_path / "fresh"
    for folder in ("frozen.shards", "ingredients/step-1.shards", "ingredients/step-2.shards"):
        (last / folder).mkdir(parents=True)
        for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
            (last / folder / name).write_text(name)
    write_manifest(last, {})
    with contextlib.ExitStack() as stack:
        saver.last = last
        draft, linked = saver.open_draft(stack)
        assert linked
        assert len(list((draft / "frozen.shards").iterdir())) == 3
        (last / "frozen.shards" / "__1_0.distcp").unlink()
        draft, linked = saver.open_draft(stack)
        assert not linked
        assert not (draft / "frozen.shards").exists()
    saver.learner.state.ingredients = [{"step": step, "scores": {}} for step in (1, 2)]
    saver.kept = {step: (last, f"ingredients/step-{step}.safetensors") for step in (1, 2)}
    (last / "ingredients" / "step-1.shards" / "__1_0.distcp").unlink()
    entries = saver.keep_ingredients(fresh, saver.learner.state)
    write_manifest(fresh, {}, last, entries)
    assert find_damage(fresh) is None
    saver.kept = {step: (fresh, name) for step, (_, name) in saver.kept.items()}
    assert saver.find_ingredients() == {2: fresh / "ingredients" / "step-2.shards"}
    assert "the weights of step 1 are not averaged: they are gone" in capsys.readouterr().out


def test_checkpoints_are_listed_newest_first_and_done_before_pending(tmp_path):
    make_checkpoints(tmp_path, "step-9", "step-10-pending", "step-10", "step-100")
    for name in ("latest", "step-x", ".tmp-step-200", "step-7.old"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-300").write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-100", "step-10", "step-10-pending", "step-9"]


def test_old_checkpoints_and_those_ahead_of_the_step_are_removed(tmp_path):
    make_checkpoints(tmp_path, "step-1", "step-2", "step-3-pending", "step-3", "step-9", ".tmp-step-2")
    (tmp_path / "notes").mkdir()
    rotate(tmp_path, step=3, limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-3", "step-3-pending"]
    rotate(tmp_path, step=3, limit=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-3"]
