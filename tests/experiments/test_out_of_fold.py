"""sweep.py --folds: every training row is predicted once, by a model that did not see it; wrong labels are found."""

import numpy as np
import pytest

from lib.config.cli import parse
from lib.config.sweep import SweepConfig, build_recipes
from lib.experiments.out_of_fold import NAME, SUSPECTS, find_suspects, merge, write_out_of_fold
from lib.experiments.sweep import Sweep
from tests.conftest import read_lines, sentences
from tests.resuming import run_flags


def test_folds_of_real_runs_predict_every_training_row_in_its_place(call, roberta, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared = [*map(str, run_flags(tmp_path, roberta)), "--max_steps", "2"]
    config = parse(SweepConfig, ["--folds", "2", "--seeds", "2", "--name", "folds", "--", *shared])
    sweep = Sweep(config, build_recipes(config))
    sweep.open()
    (jobs,) = list(sweep.stages())
    assert write_out_of_fold(sweep) == []  # not before all are finished
    for job in jobs:
        call("train.py", *job.run.flags)
    said = write_out_of_fold(sweep)
    rows = read_lines(tmp_path / "sweeps" / "folds" / NAME)
    expected = sentences(37)
    assert [(row["row"], row["text"], row["gold"]) for row in rows] == [(n, *pair) for n, pair in enumerate(expected)]
    for row in rows:
        mean = np.zeros(3)
        for job in jobs:
            lines = {line["text"]: line for line in read_lines(job.run.folder / "eval-test" / "predictions.jsonl")}
            in_fold = str(job.run.fold).startswith(str(row["fold"]))
            assert (row["text"] in lines) == in_fold
            mean += list(lines[row["text"]]["probabilities"].values()) if in_fold else np.zeros(3)
        assert list(row["probabilities"].values()) == pytest.approx(mean / 2, abs=1e-6)
        assert row["predicted"] == max(row["probabilities"], key=row["probabilities"].get)
    assert (tmp_path / "sweeps" / "folds" / SUSPECTS).exists()
    assert len(said) == 2


def test_label_that_its_predictions_contradict_is_the_first_suspect():
    rng, rows = np.random.default_rng(0), []
    for number in range(60):
        true = number % 3
        values = np.full(3, 0.05) + 0.85 * np.eye(3)[true] + rng.uniform(0, 0.02, 3)
        given = (true + 1) % 3 if number in (7, 20) else true
        rows.append(
            {"row": number, "gold": "abc"[given], "probabilities": dict(zip("abc", values / values.sum(), strict=True))}
        )
    assert {row["row"] for row in find_suspects(rows, list("abc"))} == {7, 20}


def test_without_cleanlab_the_predictions_are_written_and_the_package_is_named(call, roberta, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "cleanlab.filter", None)
    shared = [*map(str, run_flags(tmp_path, roberta)), "--max_steps", "1"]
    config = parse(SweepConfig, ["--folds", "2", "--name", "folds", "--", *shared])
    sweep = Sweep(config, build_recipes(config))
    sweep.open()
    for job in next(iter(sweep.stages())):
        call("train.py", *job.run.flags)
    assert any("pip install cleanlab" in line for line in write_out_of_fold(sweep))
    assert len((tmp_path / "sweeps" / "folds" / NAME).read_text().splitlines()) == 37


def test_answers_of_several_seeds_keep_their_tuned_thresholds():
    def answer(share, tuned):
        return {"text": "a", "gold": "no", "predicted": tuned, "probabilities": {"no": 1 - share, "yes": share}}

    def predicted(*answers):
        return merge(0, 1, [answer(*given) for given in answers])["predicted"]

    assert predicted((0.35, "yes")) == "yes"  # a threshold of 0.3
    assert predicted((0.35, "yes"), (0.4, "yes"), (0.1, "no")) == "yes"
    assert predicted((0.6, "no"), (0.7, "no")) == "no"  # thresholds of 0.8
    assert [predicted((0.6, "no"), (share, "yes")) for share in (0.3, 0.5)] == ["no", "yes"]  # the mean decides

    def labels(*answers):
        rows = [
            {"text": "a", "gold": [], "predicted": given, "probabilities": dict(zip("xy", shares, strict=True))}
            for given, *shares in answers
        ]
        return merge(0, 1, rows)["predicted"]

    assert labels((["y"], 0.6, 0.2)) == ["y"]
    assert labels((["y"], 0.6, 0.2), (["y"], 0.6, 0.3), (["x"], 0.9, 0.1)) == ["y"]
    assert labels((["y"], 0.6, 0.2), (["x"], 0.9, 0.3)) == ["x"]


def test_class_of_several_seeds_is_that_of_the_largest_mean_probability():
    rows = [
        {"text": "a", "gold": "u", "predicted": best, "probabilities": dict(zip("uvw", shares, strict=True))}
        for best, shares in (("u", (0.4, 0.3, 0.3)), ("u", (0.4, 0.3, 0.3)), ("v", (0.0, 0.9, 0.1)))
    ]
    assert merge(0, 1, rows)["predicted"] == "v"
