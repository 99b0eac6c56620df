"""--average_checkpoints: the mean of the weights of the best evaluations, where that is better on validation."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from lib.run.checkpoint import list_checkpoints
from lib.run.run import Run
from lib.runtime.atomic import find_damage
from tests.conftest import Command, call_script, read_lines, results_of, sentences, write_csv
from tests.resuming import differences, play, run_flags

FLAGS = ["--average_checkpoints", 3, "--metric_for_best_model", "loss", "--epochs", 3]
FLAGS += ["--lr", "1e-1", "--lr_scheduler_type", "constant", "--adam_epsilon", "1e-2"]
"""Of a run whose weights jump about, so that means are better."""


def newest(folder: Path) -> Path:
    return list_checkpoints(folder / "checkpoints")[0]


def ingredient(folder: Path, step: int) -> Path:
    """The weights of a step in the newest checkpoint of a run."""
    checkpoint = newest(folder)
    own = checkpoint.name == f"step-{step}"
    return checkpoint / ("model.safetensors" if own else f"ingredients/step-{step}.safetensors")


def is_mean(folder: Path) -> bool:
    """Whether the best model of a run is the mean of the weights that its results name."""
    steps = json.loads((folder / "results.json").read_text())["averaged_steps"]
    parts = [load_file(ingredient(folder, step)) for step in steps]
    found = load_file(folder / "model" / "model.safetensors")
    means = {name: np.mean([part[name] for part in parts], axis=0, dtype=np.float64) for name in parts[0]}
    return all(np.array_equal(found[name], mean.astype(np.float32)) for name, mean in means.items())


@pytest.fixture(scope="module")
def averaged(roberta_without_dropout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A finished run in the folder `run`, and its flags."""
    folder = tmp_path_factory.mktemp("averaged")
    flags = [*run_flags(folder, roberta_without_dropout), *FLAGS, "--output_dir", "run"]
    call_script("train.py", *flags, cwd=folder)
    return folder, flags


def test_best_model_is_the_mean_of_weights_that_are_kept_and_everything_says_so(
    averaged: tuple[Path, list[Any]], call: Command
) -> None:
    folder = averaged[0] / "run"
    results, lines = json.loads((folder / "results.json").read_text()), read_lines(folder / "metrics.jsonl")
    steps, best = results["averaged_steps"], results["best_step"]
    assert len(steps) > 1
    assert steps[0] == best
    assert is_mean(folder)
    losses = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    assert results["eval/loss"] < results["before_averaging/loss"] == losses[best] == min(losses.values())
    kept = {int(path.stem.partition("-")[2]) for path in (newest(folder) / "ingredients").iterdir()}
    assert kept | {lines[-1]["step"]} >= set(sorted(losses, key=lambda step: losses[step])[:3])
    assert len({line["step"] for line in lines}) == len(lines)  # of the mean there is no second line
    assert json.loads((folder / "record.json").read_text())["averaged_steps"] == steps
    assert ", ".join(map(str, steps)) in (folder / "model" / "README.md").read_text()
    flags = ["--run", folder, "--split", "validation", "--output_dir", averaged[0] / "eval"]
    assert results_of(call("eval.py", *flags))["eval/loss"] == pytest.approx(results["eval/loss"], abs=1e-6)


def test_without_the_flag_the_same_steps_are_made_and_nothing_is_kept(
    averaged: tuple[Path, list[Any]], call: Command, tmp_path: Path
) -> None:
    folder, flags = averaged
    results = results_of(call("train.py", *flags, "--average_checkpoints", 0, "--output_dir", tmp_path / "off"))
    assert "averaged_steps" not in results
    assert not list((tmp_path / "off").rglob("ingredients"))
    found = set(differences(folder / "run", tmp_path / "off"))
    kept = {name for name in found if name.startswith("ingredients/")}
    assert kept
    assert found - kept == {"state.json", "results.json", "model"}


def test_killed_while_means_are_evaluated_and_started_again_equals_undisturbed(
    averaged: tuple[Path, list[Any]], call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, flags = averaged
    save, averages = Run.save_best, Run.averages

    class Killed(BaseException):
        """As SIGKILL, which is handled nowhere."""

    def die_later(self: Run, learner: Any, tokenizer: Any) -> None:
        save(self, learner, tokenizer)  # the mean is the best model by now
        if learner.state.averaged_steps:
            raise Killed

    def die_at_the_end(self: Run, learner: Any) -> Any:
        yield from averages(self, learner)
        raise Killed

    out = ["--output_dir", tmp_path / "run"]
    for name, death in (("save_best", die_later), ("averages", die_at_the_end)):
        with monkeypatch.context() as patched:
            patched.setattr(Run, name, death)
            with pytest.raises(Killed):
                call("train.py", *flags, *out)
    call("train.py", *flags, *out)
    assert not differences(folder / "run", tmp_path / "run")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_stopped_at_any_time_and_resumed_equals_undisturbed_bit_by_bit(
    run: Command, roberta_without_dropout: Path, tmp_path: Path, processes: int
) -> None:
    flags = [*map(str, FLAGS), "--save_steps", "4"]
    calls: list[dict[str, Any]] = [{"folder": "whole"}]
    for step in (3, 7, 14) if processes == 1 else (2, 9):
        calls += [{"folder": f"after-{step}", "stop": step}, {"folder": f"after-{step}"}]
    calls += [{"folder": "twice", "stop": step} for step in (5, 8)] + [{"folder": "twice"}]
    calls += [{"folder": "in-6", "stop": 6, "during": "evaluation"}, {"folder": "in-6"}]
    play(run, tmp_path, roberta_without_dropout, [call | {"flags": flags} for call in calls], processes)
    assert is_mean(tmp_path / "whole")
    assert len(json.loads((tmp_path / "whole" / "results.json").read_text())["averaged_steps"]) > 1
    for call in calls[1:]:
        assert not differences(tmp_path / "whole", tmp_path / call["folder"]), call["folder"]


@pytest.mark.slow
def test_two_processes_average_the_same_weights(averaged: tuple[Path, list[Any]], run: Command, tmp_path: Path) -> None:
    folder, flags = averaged
    one = json.loads((folder / "run" / "results.json").read_text())
    two = results_of(run("train.py", *flags, "--output_dir", tmp_path / "two", processes=2))
    assert (one["run/num_processes"], two["run/num_processes"]) == (1, 2)
    assert one["averaged_steps"] == two["averaged_steps"]
    assert is_mean(tmp_path / "two")
    for key in ("eval/loss", "test/loss", "before_averaging/loss"):
        assert two[key] == pytest.approx(one[key], abs=1e-6)


def test_thresholds_and_scores_are_those_of_the_published_model(
    call: Command, roberta_without_dropout: Path, tmp_path: Path
) -> None:
    rows = [(text, label if index % 3 else f"{label},mixed") for index, (text, label) in enumerate(sentences(40))]
    files = [write_csv(tmp_path / f"{name}.csv", part) for name, part in (("train", rows), ("dev", rows[::2]))]
    flags = ["--model", roberta_without_dropout, "--train_file", files[0], "--validation_file", files[1]]
    flags += [
        "--problem_type",
        "multi_label_classification",
        "--mixed_precision",
        "no",
        "--report_to",
        "none",
        "--bs",
        8,
    ]
    results = results_of(call("train.py", *flags, *FLAGS, "--eval_steps", 1, "--output_dir", "run"))
    assert len(results["averaged_steps"]) > 1
    assert is_mean(tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert list(results["run/thresholds"].values()) == saved["thresholds"]
    scored = results_of(call("eval.py", "--run", "run", "--split", "validation"))
    for key in [key for key in scored if key.startswith("eval/")]:
        assert scored[key] == pytest.approx(results[key], abs=1e-6), key


@pytest.mark.parametrize("extra", [["--freeze", "backbone"], ["--adapter", "lora"], ["--freeze", "1"]])
def test_only_trained_weights_are_kept(call: Command, roberta: Path, tmp_path: Path, extra: list[str]) -> None:
    flags = [*run_flags(tmp_path, roberta), *FLAGS, *extra, "--output_dir", "run"]
    results = results_of(call("train.py", *flags))
    names = {name for step in results["averaged_steps"] for name in load_file(ingredient(tmp_path / "run", step))}
    assert names
    assert not any("embeddings" in name for name in names)
    assert results["eval/loss"] <= results["before_averaging/loss"]


def test_damage_to_kept_weights_costs_these_and_is_named(
    averaged: tuple[Path, list[Any]], call: Command, tmp_path: Path
) -> None:
    folder, flags = averaged
    results = json.loads((folder / "run" / "results.json").read_text())
    best = results["best_step"]
    for file in (newest(folder / "run") / "ingredients").iterdir():
        step = int(file.stem.partition("-")[2])
        run = tmp_path / str(step)
        shutil.copytree(folder / "run", run)
        (run / "results.json").unlink()
        ingredient(run, step).write_bytes(file.read_bytes()[:-1] + b"?")
        done = call("train.py", *flags, "--output_dir", run)
        found = results_of(done)
        assert f"step {step} are not averaged" in done.stdout
        assert step not in found.get("averaged_steps", [])
        assert ("averaged_steps" in found) == (step != best)
        assert found["eval/loss"] <= results["before_averaging/loss"]
        assert find_damage(run / "model") is None


def test_training_with_one_evaluation_has_nothing_to_average(call: Command, roberta: Path, tmp_path: Path) -> None:
    flags = [*run_flags(tmp_path, roberta), "--average_checkpoints", 2, "--output_dir", "run"]
    done = call("train.py", *flags, "--eval_steps", 100, code=2)
    assert "--average_checkpoints" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["its folder", "another folder"])
def test_run_that_is_trained_for_longer_averages_over_all_its_evaluations(
    averaged: tuple[Path, list[Any]], call: Command, tmp_path: Path, place: str
) -> None:
    folder, flags = averaged
    flags = [*flags, "--output_dir", tmp_path / "run", "--epochs", 4, "--allow_changes"]
    if place == "its folder":
        shutil.copytree(folder / "run", tmp_path / "run")
    else:
        flags += ["--resume_from_checkpoint", folder / "run"]
    results = results_of(call("train.py", *flags))
    assert results["steps"] == 20
    assert find_damage(newest(tmp_path / "run")) is None
    assert is_mean(tmp_path / "run")
    state = json.loads((newest(tmp_path / "run") / "state.json").read_text())["state"]
    assert any(item["step"] <= 15 for item in state["ingredients"])
    for item in state["ingredients"]:
        assert ingredient(tmp_path / "run", item["step"]).is_file()
    steps = [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert len(set(steps)) == len(steps)
