"""A folder is whole or absent; what was changed in it is named."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from lib.config.sections import flatten
from lib.config.train import TrainConfig
from lib.errors import UserError
from lib.run.checkpoint import list_checkpoints, rotate
from lib.run.record import compare_settings, experiment_hash
from lib.run.resume import describe_promise, find_checkpoint
from lib.runtime import atomic
from lib.runtime.atomic import find_damage, link_tree, publish_folder, write_manifest
from tests.conftest import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "step-1"
    (folder / "best").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "best" / "config.json").write_text("{}")
    write_manifest(folder, {"step": 1})
    return folder


def test_a_folder_as_it_was_written_has_no_damage(folder):
    assert find_damage(folder) is None


def test_every_single_flipped_bit_is_noticed(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for bit in range(0, len(content) * 8, 37):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        weights.write_bytes(changed)
        assert "model.safetensors was changed" in find_damage(folder)


def test_what_is_missing_or_short_is_named(folder):
    os.truncate(folder / "model.safetensors", 100)
    assert find_damage(folder) == "model.safetensors has 100 bytes instead of 256"
    (folder / "best" / "config.json").unlink()
    assert find_damage(folder) == "best/config.json is missing"
    for text, words in (("{", "cannot be read"), ("[]", "cannot be read"), ('{"files": {"a": 1}}', "is missing")):
        (folder / "manifest.json").write_text(text)
        assert words in find_damage(folder)
    (folder / "manifest.json").unlink()
    assert find_damage(folder) == "manifest.json is missing"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_publishing_replaces_what_was_there(folder, tmp_path, monkeypatch, can_exchange):
    if not can_exchange:  # NFS
        monkeypatch.setattr(atomic, "exchange", lambda *_: False)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "new.txt").write_text("new")
    publish_folder(fresh, folder)
    assert [path.name for path in folder.iterdir()] == ["new.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_weights_are_linked_and_small_files_copied(folder, tmp_path):
    link_tree(folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").samefile(folder / "model.safetensors")
    assert not (tmp_path / "copy" / "best" / "config.json").samefile(folder / "best" / "config.json")
    assert find_damage(tmp_path / "copy") is None


def make(checkpoints: Path, *names: str) -> None:
    for name in names:
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "model.safetensors").write_text(name)
        write_manifest(checkpoints / name, {})


def test_checkpoints_are_ordered_by_number_and_pending_comes_before_done(tmp_path):
    make(tmp_path, "step-9", "step-10-pending", "step-10", "step-100")
    for name in ("latest", "step-x", ".tmp-step-200", "step-7.old"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-300").write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-100", "step-10", "step-10-pending", "step-9"]


def test_old_checkpoints_go_and_so_do_those_of_a_course_given_up(tmp_path):
    make(tmp_path, "step-1", "step-2", "step-3-pending", "step-3", "step-9", ".tmp-step-2")
    (tmp_path / "notes").mkdir()
    rotate(tmp_path, step=3, limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-3", "step-3-pending"]
    rotate(tmp_path, step=3, limit=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-3"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys):
    make(tmp_path, "step-1", "step-2")
    (tmp_path / "step-2" / "model.safetensors").write_text("step-3")
    assert find_checkpoint("auto", tmp_path) == tmp_path / "step-1"
    assert f"{tmp_path / 'step-2'} is damaged and is not used: model.safetensors was changed" in capsys.readouterr().out


def test_what_resume_from_checkpoint_takes(tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    assert find_checkpoint("auto", checkpoints) is None
    with pytest.raises(UserError, match="--resume_from_checkpoint must: no valid checkpoint in"):
        find_checkpoint("must", checkpoints)
    make(checkpoints, "step-1", "step-2")
    assert find_checkpoint(str(checkpoints / "step-1"), tmp_path / "other") == checkpoints / "step-1"
    assert find_checkpoint(str(tmp_path / "run"), tmp_path / "other") == checkpoints / "step-2"
    (checkpoints / "step-1" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no valid checkpoint there: model\.safetensors is missing"):
        find_checkpoint(str(checkpoints / "step-1"), tmp_path / "other")
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        find_checkpoint(str(tmp_path / "nowhere"), tmp_path / "other")
    assert find_checkpoint("never", checkpoints) is None
    assert not checkpoints.exists()


SETTINGS = {"learning_rate": 1e-3, "logging_steps": 5, "num_train_epochs": 2.0, "text_columns": ("a", "b")}
SETTINGS |= {"run/data_fingerprint": "f", "run/num_processes": 1, "run/version_torch": "2"}


def test_only_settings_that_change_the_result_make_another_experiment():
    same = SETTINGS | {"logging_steps": 9, "run/num_processes": 2, "text_columns": ["a", "b"]}
    assert compare_settings(SETTINGS, same) == []
    assert experiment_hash(SETTINGS) == experiment_hash(same)
    other = SETTINGS | {"learning_rate": 2e-3, "run/data_fingerprint": "g"}
    assert compare_settings(SETTINGS, other) == [
        "  learning_rate: 0.001 there, 0.002 now",
        "  data_fingerprint: f there, g now",
    ]
    assert experiment_hash(SETTINGS) != experiment_hash(other)
    assert (
        "changes the learning rate of every step" in compare_settings(SETTINGS, SETTINGS | {"num_train_epochs": 3})[-1]
    )


def test_an_option_that_came_after_a_run_began_was_at_its_default_then():
    now = json.loads(json.dumps(flatten(TrainConfig())))
    before = {name: value for name, value in now.items() if name != "compile"}
    assert compare_settings(before, now) == []
    assert compare_settings(before, now | {"compile": True}) == ["  compile: False there, True now"]


def test_a_checkpoint_of_another_order_of_batches_is_another_experiment():
    now = SETTINGS | {"run/batches_sorted_together": 100}
    assert compare_settings(now, now) == []
    assert compare_settings(SETTINGS, now) == ["  batches_sorted_together: None there, 100 now"]


def test_the_promise_says_what_remains():
    assert "bit by bit" in describe_promise(SETTINGS, dict(SETTINGS), [])
    assert "num_processes 1 -> 2" in describe_promise(SETTINGS, SETTINGS | {"run/num_processes": 2}, [])
    assert "version_torch 2 -> 3" in describe_promise(SETTINGS, SETTINGS | {"run/version_torch": "3"}, [])


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil-was-here",))


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    """The loader of Checkpointer.load on a file that would make a folder."""
    monkeypatch.chdir(tmp_path)
    torch.save({"optimizer": Evil()}, tmp_path / "optimizer.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "optimizer.pt", weights_only=True, map_location="cpu")
    assert not (tmp_path / "evil-was-here").exists()
    source = (ROOT / "lib" / "run" / "checkpoint.py").read_text()
    assert source.count("torch.load(") == source.count("weights_only=True") == 1
