"""What is reported of numbers and of several labels, by hand and against references."""

import numpy as np
import pytest
from datasets import Dataset
from sklearn.metrics import average_precision_score, f1_score

from lib.config.sections import MULTI_LABEL, REGRESSION
from lib.evaluation.intervals import bootstrap_intervals
from lib.evaluation.predictions import Predictions
from lib.evaluation.report import worst_rows
from lib.evaluation.scores import compute_metrics
from lib.evaluation.tables import format_tables, label_table, range_table

NAMES = ["rare", "half", "often"]


def numbers(samples: int, seed: int = 0, noise: float = 0.5) -> Predictions:
    rng = np.random.default_rng(seed)
    gold = rng.normal(size=samples).astype(np.float32)
    predicted = (gold + noise * rng.normal(size=samples)).astype(np.float32)
    return Predictions(predicted[:, None], gold, (predicted - gold) ** 2, problem_type=REGRESSION)


def several(samples: int, seed: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    gold = (rng.random((samples, 3)) < (0.1, 0.5, 0.8)).astype(np.int64)
    logits = (rng.normal(size=gold.shape) + 2 * gold - 1).astype(np.float32)
    losses = np.logaddexp(0, logits).mean(axis=1).astype(np.float32)
    return Predictions(logits, gold, losses, problem_type=MULTI_LABEL, thresholds=np.array([0.3, 0.5, 0.6]))


def test_ranges_by_hand() -> None:
    gold = np.array([0, 1, 5, 4.5, 10], dtype=np.float32)
    made = Predictions(gold[:, None] + np.float32(1), gold, np.ones(5), problem_type=REGRESSION)
    rows = range_table(made)
    assert [(row["from"], row["to"], row["samples"]) for row in rows] == [(0, 2, 2), (4, 6, 2), (8, 10, 1)]
    assert [(row["gold"], row["predicted"], row["mae"]) for row in rows] == [
        (0.5, 1.5, 1),
        (4.75, 5.75, 1),
        (10, 11, 1),
    ]


def test_numbers_that_are_all_equal_are_one_range() -> None:
    made = Predictions(np.zeros((3, 1), np.float32), np.ones(3, np.float32), np.ones(3), problem_type=REGRESSION)
    assert [row["samples"] for row in range_table(made)] == [3]


def test_the_table_of_labels_equals_scikit_learn() -> None:
    made = several(90)
    for number, row in enumerate(label_table(made, NAMES)):
        gold, probabilities = made.labels[:, number], made.probabilities[:, number]
        assert row["label"] == NAMES[number]
        assert row["f1"] == pytest.approx(f1_score(gold, probabilities >= row["threshold"]))
        assert row["average_precision"] == pytest.approx(average_precision_score(gold, probabilities))
        assert row["samples"] == gold.sum()


def test_the_table_agrees_with_the_macro_scores() -> None:
    made = several(90)
    scores = compute_metrics(made, ["f1_macro", "average_precision"])
    for name, key in (("f1_macro", "f1"), ("average_precision", "average_precision")):
        assert scores[name] == pytest.approx(np.mean([row[key] for row in label_table(made, NAMES)]))


def test_the_report_says_where_thresholds_come_from() -> None:
    assert "best F1 on validation" in format_tables(several(9), NAMES)[1]
    plain = Predictions(
        *(getattr(several(9), name) for name in ("logits", "labels", "losses")), problem_type=MULTI_LABEL
    )
    assert "none of its own" in format_tables(plain, NAMES)[1]


def test_the_interval_of_a_correlation_is_that_of_fisher() -> None:
    made = numbers(400)
    value = compute_metrics(made, ["pearson"])["pearson"]
    expected = np.tanh(np.arctanh(value) + np.array([-1.96, 1.96]) / np.sqrt(400 - 3))
    assert bootstrap_intervals(made, ["pearson"], 1000, seed=0)["pearson"] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("made", [numbers(80), several(80)], ids=["numbers", "labels"])
def test_intervals_cover_the_scores_and_depend_on_the_seed_alone(made: Predictions) -> None:
    names = ["spearman", "mse", "mae", "r2"] if made.problem_type == REGRESSION else ["average_precision", "f1_micro"]
    first, again, other = (bootstrap_intervals(made, names, 60, seed) for seed in (1, 1, 2))
    scores = compute_metrics(made, names)
    assert first == again != other
    assert set(first) == set(scores)
    for name, (low, high) in first.items():
        assert low < scores[name] < high, name


def test_the_largest_losses_come_first() -> None:
    for made in (numbers(30), several(30)):
        texts = Dataset.from_dict({"text": [f"text {row}" for row in range(30)]})
        columns, rows = worst_rows(made, texts, NAMES, limit=5)
        assert columns == ["index", "text", "gold", "predicted", "loss"]
        assert [row[0] for row in rows] == np.argsort(-made.losses, kind="stable")[:5].tolist()
        assert [row[1] for row in rows] == [f"text {row[0]}" for row in rows]
        assert [row[4] for row in rows] == pytest.approx(np.sort(made.losses)[::-1][:5].tolist())
