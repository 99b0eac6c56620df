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


def test_weights_of_the_best_evaluations_are_kept_of_equal_ones_the_earlier() -> None:
    for metric, values, kept in (
        ("accuracy", [0.5, 0.7, 0.7, 0.6, math.nan, 0.7], [2, 3, 6]),
        ("mse", [0.5, 0.7, 0.7, 0.4], [4, 1, 2]),
        ("pearson", [math.nan, 0.1, math.nan], [2, 3, 1]),
    ):
        state = State()
        for step, value in enumerate(values, 1):
            state = State(**json.loads(json.dumps(dataclasses.asdict(state))))
            state.step, scores = step, {"loss": 3.0 - step / 10, metric: value}
            state.update_best(scores, metric)
            state.update_ingredients(scores, metric, 3)
            assert state.is_ingredient() == (step in [item["step"] for item in state.ingredients])
        assert [item["step"] for item in state.ingredients] == kept
        assert state.best_step == kept[0]
    state.update_ingredients({"loss": math.inf, "pearson": 1.0}, "pearson", 3)
    assert [item["step"] for item in state.ingredients] == kept


def test_mean_is_the_best_model_only_if_the_metric_rises_or_is_equal_at_a_lower_loss() -> None:
    def accepts(metric: str, scores: dict[str, float]) -> bool:
        state = State(step=2)
        state.update_best({"loss": 1.0, "accuracy": 0.5, "mse": 0.5}, metric)
        better = state.update_average([2, 1], scores, metric)
        assert state.averaged_steps == ([2, 1] if better else [])
        assert (state.best_scores == scores) == better
        assert state.best_step == 2
        return better

    found = [
        accepts("accuracy", {"loss": loss, "accuracy": value}) for value in (0.4, 0.5, 0.6) for loss in (0.9, 1, 2)
    ]
    assert found == [False, False, False, True, False, False, True, True, True]
    assert not accepts("accuracy", {"loss": math.nan, "accuracy": 1.0})
    assert not accepts("accuracy", {"loss": 0.1, "accuracy": math.nan})
    assert accepts("mse", {"loss": 2.0, "mse": 0.4})
    assert not accepts("loss", {"loss": 1.0})


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
