"""Damage to the best model, or its loss, costs the best model and not the training; a lost folder is a clear end."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from lib.errors import UserError
from lib.run.best_model import restore_model
from lib.run.checkpoint import Checkpointer, read_best_steps
from lib.runtime.atomic import find_damage
from tests.conftest import results_of, sentences, write_csv
from tests.resuming import build, checkpointer, equal_weights, publish


def flip(*files: Path) -> None:
    for path in files:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def test_damage_to_the_best_model_costs_the_best_model_and_not_the_training(
    call, roberta: Path, tmp_path: Path
) -> None:
    train = write_csv(tmp_path / "train.csv", sentences(24))
    flags = [
        "--model",
        roberta,
        "--train_file",
        train,
        "--report_to",
        "none",
        "--mixed_precision",
        "no",
        "--lr",
        "1e-2",
    ]
    flags += ["--output_dir", "run", "--save_steps", 1, "--bs", 8, "--max_steps", 4, "--eval_steps", 1]
    flags += ["--save_total_limit", 9, "--metric_for_best_model", "loss"]
    run, results = tmp_path / "run", results_of(call("train.py", *flags))
    whole, newest = weights(run / "model").read_bytes(), run / "checkpoints" / "step-4"
    (run / "results.json").unlink()
    shutil.copytree(run, tmp_path / "kept")
    bests = [weights(path / "best") for path in (run / "checkpoints").iterdir()]

    def again(*damaged: Path, without: str = "nothing", code: int = 0) -> Any:
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "kept", run)
        shutil.rmtree(run / "checkpoints" / without, ignore_errors=True)
        flip(*(path for path in damaged if path.exists()))
        return call("train.py", *flags, code=code)

    # Damage in the checkpoint or in model/: the other copy is taken, and the result is the same.
    for damaged in (weights(newest / "best"), weights(run / "model")):
        found = results_of(again(damaged))
        assert {key: found[key] for key in ("eval/loss", "best_step")} == {
            key: results[key] for key in ("eval/loss", "best_step")
        }
        assert weights(run / "model").read_bytes() == whole
    # Every copy is damaged: the next evaluation makes another one; at the end of training there is none.
    done = again(*bests, weights(run / "model"), without="step-4")
    assert "is lost" in done.stdout
    assert "never stopped" not in done.stdout
    assert results_of(done)["best_step"] == 4
    assert find_damage(newest) is None
    done = again(*bests, weights(run / "model"), code=2)
    assert "is lost" in done.stderr
    assert "--resume_from_checkpoint" in done.stderr


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def saver(accelerator: Accelerator, roberta: Path, tmp_path: Path) -> Checkpointer:
    """A run in `tmp_path/run` that evaluated at step 3, saved its best model, and checkpoints."""
    (tmp_path / "run").mkdir()
    saver = checkpointer(accelerator, tmp_path / "run", build(roberta, seed=1))
    saver.learner.state.best_step, saver.learner.state.best_scores = 3, {"loss": 1.0}
    publish(accelerator, saver.learner.model, roberta, saver.folder / "model")
    saver.save(None)
    return saver


def save_next(saver: Checkpointer) -> Path:
    saver.learner.state.step += 1
    saver.save(None)
    return saver.folder / "checkpoints" / f"step-{saver.learner.state.step}"


def test_what_people_change_in_model_changes_no_checkpoint(saver: Checkpointer) -> None:
    flip(weights(saver.folder / "model"), saver.folder / "model" / "config.json")
    later = save_next(saver)
    assert find_damage(later) is None
    assert weights(later / "best").samefile(weights(saver.folder / "checkpoints" / "step-3" / "best"))


def test_deleted_model_is_restored_and_without_a_copy_nothing_is_published(saver: Checkpointer) -> None:
    shutil.rmtree(saver.folder / "model")
    assert find_damage(save_next(saver)) is None
    assert find_damage(saver.folder / "model") is None
    shutil.rmtree(saver.folder / "model")
    saver.learner.state.best_step = 5  # an evaluation whose model nobody has
    with pytest.raises(UserError, match="best model, of step 5"):
        save_next(saver)
    assert not (saver.folder / "checkpoints" / "step-5").exists()


@pytest.mark.parametrize("again", [False, True])
def test_folder_that_was_renamed_is_a_clear_end_and_is_not_made_again(
    saver: Checkpointer, roberta: Path, tmp_path: Path, again: bool
) -> None:
    saver.folder.rename(tmp_path / "renamed")
    if again:  # the same command, started a second time
        saver.folder.mkdir()
    with pytest.raises(UserError, match="deleted or renamed"):
        save_next(saver)
    assert not list(saver.folder.glob("*"))
    if not again:
        with pytest.raises(UserError, match="gone"):
            publish(saver.learner.accelerator, saver.learner.model, roberta, saver.folder / "model")
        assert not saver.folder.exists()


@pytest.mark.parametrize("harm", ["damaged", "deleted"])
def test_final_test_takes_the_best_model_from_a_checkpoint(
    accelerator: Accelerator, roberta: Path, saver: Checkpointer, harm: str
) -> None:
    if harm == "deleted":
        shutil.rmtree(saver.folder / "model")
    else:
        flip(weights(saver.folder / "model"))
    later = build(roberta, seed=2)
    checkpoints = list(read_best_steps(saver.folder / "checkpoints"))
    restore_model(accelerator, later, saver.folder / "model", saver.learner.state, checkpoints)
    assert equal_weights(later, saver.learner.model)
    assert find_damage(saver.folder / "model") is None
    flip(weights(saver.folder / "model"), weights(checkpoints[0][0] / "best"))
    with pytest.raises(UserError, match="no checkpoint has a copy"):
        restore_model(accelerator, later, saver.folder / "model", saver.learner.state, checkpoints)


def test_checkpoint_of_an_earlier_version_restores_its_best_model(saver: Checkpointer, roberta: Path) -> None:
    """Its model/ has no manifest, and its manifests look as they did."""
    (saver.folder / "model" / "manifest.json").unlink()
    found = json.loads((saver.folder / "checkpoints" / "step-3" / "manifest.json").read_text())
    assert found["format"] == 1
    shutil.rmtree(saver.folder / "model")
    later = checkpointer(saver.learner.accelerator, saver.folder, build(roberta, seed=2))
    later.load(saver.folder / "checkpoints" / "step-3")
    assert find_damage(saver.folder / "model") is None
    assert equal_weights(later.learner.model, saver.learner.model)
