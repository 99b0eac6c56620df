"""Which evaluation is the best, and which log lines stand when a run resumes."""

import dataclasses
import json
import math

import pytest

from lib.training.state import State


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [("accuracy", [0.5, 0.7, 0.7, 0.6], [1, 1, 0, 0]), ("loss", [0.9, 1.0, 0.8, math.nan], [1, 0, 1, 0])],
)
def test_best_evaluation_is_the_first_of_the_best_ones(metric: str, values: list[float], best: list[int]) -> None:
    state, found = State(), []
    for step, value in enumerate(values, 1):
        state.step = step
        found.append(state.update_best({"loss": 1.0} | {metric: value}, metric))
    assert found == list(map(bool, best))
    assert state.best_metric == [value for value, is_best in zip(values, best, strict=True) if is_best][-1]
    assert state.evals_since_best == len(values) - state.best_step


def test_evaluation_whose_loss_is_not_finite_is_never_the_best() -> None:
    state = State(step=1)
    assert not state.update_best({"loss": math.nan, "accuracy": 1.0}, "accuracy")
    assert (state.best_metric, state.evals_since_best) == (None, 1)


def test_log_line_of_a_pending_step_is_written_again() -> None:
    assert State(step=4).last_logged == 4
    assert State(step=4, pending=True).last_logged == 3


@pytest.mark.parametrize(
    ("values", "losses", "best"),
    [
        ([math.nan, math.nan, math.nan], [1.0, 0.5, 0.7], [1, 1, 0]),
        ([math.nan, 0.1, math.nan, 0.2], [0.5, 0.9, 0.1, 0.8], [1, 1, 0, 1]),
        ([math.nan, math.nan], [math.nan, 2.0], [0, 1]),
    ],
    ids=["never defined", "defined later", "diverged first"],
)
def test_loss_chooses_while_the_metric_is_not_defined_also_after_a_resume(
    values: list[float], losses: list[float], best: list[int]
) -> None:
    state, found = State(), []
    for step, (value, loss) in enumerate(zip(values, losses, strict=True), 1):
        state = State(**json.loads(json.dumps(dataclasses.asdict(state))))
        state.step = step
        found.append(state.update_best({"loss": loss, "pearson": value}, "pearson"))
    assert found == list(map(bool, best))
    assert state.best_step == max(step for step, is_best in enumerate(best, 1) if is_best)
    assert state.evals_since_best == len(values) - state.best_step
    assert state.best_metric == max((value for value in values if not math.isnan(value)), default=None)
