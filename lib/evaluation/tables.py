"""Tables of a scored split: of classes and their confusions, of ranges of a number, of labels and their thresholds."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lib.config.sections import MULTI_LABEL, REGRESSION
from lib.evaluation.predictions import PLAIN_THRESHOLD, Predictions

RANGES = 5
Row = dict[str, Any]


def describe(predictions: Predictions, names: Sequence[str]) -> dict[str, Any]:
    """The tables of a split as they are saved, by what they are called."""
    if predictions.problem_type == REGRESSION:
        return {"ranges": range_table(predictions)}
    if predictions.problem_type == MULTI_LABEL:
        return {"labels": label_table(predictions, names)}
    matrix = confusion_matrix(predictions.labels, predictions.predicted, len(names))
    return {"classes": class_table(predictions, names), "confusion_matrix": matrix.tolist()}


def format_tables(predictions: Predictions, names: Sequence[str]) -> list[str]:
    """The same as text."""
    tables = describe(predictions, names)
    if predictions.problem_type == REGRESSION:
        return [format_rows(tables["ranges"], "{:.2f}")]
    if predictions.problem_type == MULTI_LABEL:
        tuned = predictions.thresholds is not None
        note = (
            "Thresholds: for each label that of the best F1 on validation; what depends on them is too good there."
            if tuned
            else "Thresholds: the model has none of its own."
        )
        return [format_rows(tables["labels"], "{:.3f}"), note]
    matrix = [["gold \\ predicted", *names]]
    matrix += [[name, *map(str, row)] for name, row in zip(names, tables["confusion_matrix"], strict=True)]
    return [format_rows(tables["classes"], "{:.3f}"), format_table(matrix)]


# ---------------------------------------------------------------------------------------------------- one class


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts, int64 (classes, classes): rows are gold labels, columns predictions."""
    cells = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def class_table(predictions: Predictions, label_names: Sequence[str]) -> list[Row]:
    """Precision, recall, F1 and number of samples of each class."""
    matrix = confusion_matrix(predictions.labels, predictions.predicted, len(label_names))
    hits, predicted, gold = matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1)
    ratio = lambda a, b: np.divide(a, b, out=np.zeros(len(a)), where=b > 0)  # noqa: E731
    columns = (ratio(hits, predicted), ratio(hits, gold), ratio(2 * hits, predicted + gold))
    return [
        {"class": name, "precision": p, "recall": r, "f1": f, "samples": int(n)}
        for name, p, r, f, n in zip(label_names, *(column.tolist() for column in columns), gold.tolist(), strict=True)
    ]


# ---------------------------------------------------------------------------------------------------- numbers and labels


def range_table(predictions: Predictions) -> list[Row]:
    """What was predicted, and how far off, in five equally wide ranges of the gold number; empty ones are left out."""
    gold, predicted = predictions.labels.astype(np.float64), predictions.predicted.astype(np.float64)
    edges = np.linspace(gold.min(), gold.max(), RANGES + 1)
    places = np.clip(np.searchsorted(edges, gold, side="right") - 1, 0, RANGES - 1)
    rows = []
    for place in np.unique(places):
        chosen = places == place
        means = {"gold": gold[chosen].mean(), "predicted": predicted[chosen].mean()}
        means["mae"] = np.abs(predicted - gold)[chosen].mean()
        numbers = {"from": edges[place], "to": edges[place + 1], **means}
        rows.append({key: float(value) for key, value in numbers.items()} | {"samples": int(chosen.sum())})
    return rows


def label_table(predictions: Predictions, names: Sequence[str]) -> list[Row]:
    """Threshold, precision, recall, F1, average precision and number of samples of each label."""
    from sklearn.metrics import average_precision_score, precision_recall_fscore_support

    gold, probabilities = predictions.labels, predictions.probabilities
    thresholds = np.full(len(names), PLAIN_THRESHOLD) if predictions.thresholds is None else predictions.thresholds
    columns = precision_recall_fscore_support(gold, predictions.predicted, average=None, zero_division=0)
    rows = []
    for number, (name, p, r, f, n) in enumerate(zip(names, *columns, strict=True)):
        one = gold[:, number]
        sound = one.any() and np.isfinite(probabilities[:, number]).all()
        area = average_precision_score(one, probabilities[:, number]) if sound else np.nan
        values = {"threshold": thresholds[number], "precision": p, "recall": r, "f1": f, "average_precision": area}
        rows.append({"label": name, **{key: float(value) for key, value in values.items()}, "samples": int(n)})
    return rows


# ---------------------------------------------------------------------------------------------------- text


def format_rows(rows: Sequence[Row], number: str) -> str:
    """A table with the names of the columns above it; floats as `number` formats them."""
    shown = [[number.format(v) if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return format_table([list(rows[0]), *shown])


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
