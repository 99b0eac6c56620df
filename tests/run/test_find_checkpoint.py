"""Which checkpoints a folder holds, which one a run resumes from, and which ones are removed."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from lib.errors import UserError
from lib.run.checkpoint import list_checkpoints, rotate
from lib.run.resume import find_checkpoint
from lib.runtime.atomic import write_manifest
from tests.conftest import ROOT


def make(checkpoints: Path, *names: str) -> None:
    for name in names:
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "model.safetensors").write_text(name)
        write_manifest(checkpoints / name, {})


def test_checkpoints_are_listed_newest_first_and_done_before_pending(tmp_path):
    make(tmp_path, "step-9", "step-10-pending", "step-10", "step-100")
    for name in ("latest", "step-x", ".tmp-step-200", "step-7.old"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-300").write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-100", "step-10", "step-10-pending", "step-9"]


def test_old_checkpoints_and_those_ahead_of_the_step_are_removed(tmp_path):
    make(tmp_path, "step-1", "step-2", "step-3-pending", "step-3", "step-9", ".tmp-step-2")
    (tmp_path / "notes").mkdir()
    rotate(tmp_path, step=3, limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-3", "step-3-pending"]
    rotate(tmp_path, step=3, limit=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-3"]


def test_damaged_checkpoint_is_named_and_the_previous_one_is_used(tmp_path, capsys):
    make(tmp_path, "step-1", "step-2")
    (tmp_path / "step-2" / "model.safetensors").write_text("step-3")
    assert find_checkpoint("auto", tmp_path) == tmp_path / "step-1"
    assert f"{tmp_path / 'step-2'} is damaged and is not used: model.safetensors was changed" in capsys.readouterr().out


def test_resume_from_checkpoint_takes_auto_must_never_and_folders(tmp_path):
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


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil-was-here",))


def test_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    """The loader of Checkpointer.load on a file that would make a folder."""
    monkeypatch.chdir(tmp_path)
    torch.save({"optimizer": Evil()}, tmp_path / "optimizer.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "optimizer.pt", weights_only=True, map_location="cpu")
    assert not (tmp_path / "evil-was-here").exists()
    source = (ROOT / "lib" / "run" / "checkpoint.py").read_text()
    assert source.count("torch.load(") == source.count("weights_only=True") == 1
