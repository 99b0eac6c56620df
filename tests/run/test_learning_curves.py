"""The picture of a run's course has the numbers of metrics.jsonl, whatever lines that file holds."""

import json
import warnings

import pytest

from lib.run import learning_curves
from lib.run.learning_curves import NAME, build_figure, draw_learning_curves
from lib.run.tracking import read_log

LINES = [
    {"step": 1, "train/loss": 1.5, "train/learning_rate": 1e-5},
    {"step": 2, "train/loss": 1.0, "train/learning_rate": 2e-5, "eval/loss": 1.2, "eval/accuracy": 0.5},
    {"step": 4, "train/loss": "NaN", "train/learning_rate": 1e-5, "eval/loss": 1.1, "eval/accuracy": 0.7},
]


def curves(figure):
    """(label, points) of every line in the figure by the name of its panel."""
    return {
        axes.get_ylabel(): {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}
        for axes in figure.axes
    }


def test_losses_metric_rate_and_best_step_are_drawn():
    found = curves(build_figure(LINES, "accuracy", 4, "a run"))
    best = {"best model, step 4": [(4, 0), (4, 1)]}
    assert found["loss"] == {"training": [(1, 1.5), (2, 1.0)], "validation": [(2, 1.2), (4, 1.1)]} | best
    assert found["accuracy"] == {"validation": [(2, 0.5), (4, 0.7)]} | best
    assert found["learning rate"] == {"training": [(1, 1e-5), (2, 2e-5), (4, 1e-5)]} | best


def test_run_chosen_by_loss_has_no_second_panel_of_it():
    assert list(curves(build_figure(LINES, "loss", 2, "a run"))) == ["loss", "learning rate"]


@pytest.mark.parametrize("title", ["$x_1$ is no formula", "a" * 300, "a\x1b[2J\tb", "电影", "🤖\U000fabcd"])
def test_torn_lines_odd_names_and_no_evaluation_break_nothing(tmp_path, title):
    folder = tmp_path / title[:100]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(["", "{torn", "[1]", *map(json.dumps, LINES[:1])]))
    assert read_log(folder / "metrics.jsonl") == LINES[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw_learning_curves(folder, "accuracy", 0) == []
    assert (folder / NAME).read_bytes()[:4] == b"\x89PNG"


def test_picture_that_cannot_be_drawn_is_said_and_ends_no_run(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no \x1b[2J room")

    monkeypatch.setattr(learning_curves, "build_figure", broken)
    (note,) = draw_learning_curves(tmp_path, "accuracy", 0)
    assert NAME in note
    assert "\x1b" not in note
    assert not list(tmp_path.iterdir())
