"""Tables of a scored split: classes and their confusions, ranges of a number, or labels and their thresholds."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lib.config.sections import MULTI_LABEL, REGRESSION
from lib.evaluation.predictions import DEFAULT_THRESHOLD, Predictions

RANGES = 5
Row = dict[str, Any]


def build_tables(predictions: Predictions, names: Sequence[str]) -> dict[str, Any]:
    """The tables that fit the problem type, by name, as they are saved."""
    if predictions.problem_type == REGRESSION:
        return {"ranges": range_table(predictions)}
    if predictions.problem_type == MULTI_LABEL:
        return {"labels": label_table(predictions, names)}
    return {"classes": class_table(predictions, names), "confusion_matrix": confusion_matrix(predictions).tolist()}


def format_tables(predictions: Predictions, names: Sequence[str]) -> list[str]:
    """The same tables as text."""
    tables = build_tables(predictions, names)
    if predictions.problem_type == REGRESSION:
        return [format_rows(tables["ranges"], "{:.2f}")]
    if predictions.problem_type == MULTI_LABEL:
        if predictions.thresholds is None:
            note = f"Thresholds: the model has none of its own, {DEFAULT_THRESHOLD} is used."
        else:
            note = "Thresholds: those of the best F1 on validation, where scores that use them are optimistic."
        return [format_rows(tables["labels"], "{:.3f}"), note]
    matrix = [["gold \\ predicted", *names]]
    matrix += [[name, *map(str, row)] for name, row in zip(names, tables["confusion_matrix"], strict=True)]
    return [format_rows(tables["classes"], "{:.3f}"), format_table(matrix)]


def confusion_matrix(predictions: Predictions) -> np.ndarray:
    """Counts, int64 (classes, classes): rows are gold classes, columns predicted ones."""
    from sklearn import metrics  # takes seconds to import

    classes = range(predictions.logits.shape[1])
    return metrics.confusion_matrix(predictions.labels, predictions.predicted, labels=classes)


def class_table(predictions: Predictions, names: Sequence[str]) -> list[Row]:
    """Precision, recall, F1 and number of samples of each class; 0 where nothing is predicted, or nothing is gold."""
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(
        predictions.labels, predictions.predicted, labels=range(len(names)), zero_division=0
    )
    return [
        {"class": name, "precision": float(p), "recall": float(r), "f1": float(f), "samples": int(n)}
        for name, p, r, f, n in zip(names, *columns, strict=True)
    ]


def range_table(predictions: Predictions) -> list[Row]:
    """Mean prediction and mean absolute error in five equally wide ranges of the gold number; empty ranges are left out."""
    gold, predicted = predictions.labels.astype(np.float64), predictions.predicted.astype(np.float64)
    edges = np.linspace(gold.min(), gold.max(), RANGES + 1)
    places = np.clip(np.searchsorted(edges, gold, side="right") - 1, 0, RANGES - 1)
    rows = []
    for place in np.unique(places):
        chosen = places == place
        numbers = {
            "from": edges[place],
            "to": edges[place + 1],
            "gold": gold[chosen].mean(),
            "predicted": predicted[chosen].mean(),
            "mae": np.abs(predicted - gold)[chosen].mean(),
        }
        rows.append({key: float(value) for key, value in numbers.items()} | {"samples": int(chosen.sum())})
    return rows


def label_table(predictions: Predictions, names: Sequence[str]) -> list[Row]:
    """Threshold, precision, recall, F1, average precision and number of samples of each label.

    Average precision is NaN for a label that no row has, or where a logit is not finite.
    """
    from sklearn.metrics import average_precision_score, precision_recall_fscore_support

    gold, probabilities = predictions.labels, predictions.probabilities
    thresholds = np.full(len(names), DEFAULT_THRESHOLD) if predictions.thresholds is None else predictions.thresholds
    columns = precision_recall_fscore_support(gold, predictions.predicted, average=None, zero_division=0)
    rows = []
    for number, (name, p, r, f, n) in enumerate(zip(names, *columns, strict=True)):
        defined = n > 0 and np.isfinite(probabilities[:, number]).all()
        area = average_precision_score(gold[:, number], probabilities[:, number]) if defined else np.nan
        values = {"threshold": thresholds[number], "precision": p, "recall": r, "f1": f, "average_precision": area}
        rows.append({"label": name, **{key: float(value) for key, value in values.items()}, "samples": int(n)})
    return rows


def format_rows(rows: Sequence[Row], number: str) -> str:
    """A table under the names of its columns; floats as `number` formats them."""
    shown = [[number.format(v) if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return format_table([list(rows[0]), *shown])


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
