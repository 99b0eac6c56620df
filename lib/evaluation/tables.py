"""Tables of a scored split: classes and their confusions, ranges of a number, or labels and their thresholds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.cells import cell_len

from lib.config.sections import MULTI_LABEL, REGRESSION
from lib.errors import printable
from lib.evaluation.calibration import coverage_table
from lib.evaluation.predictions import DEFAULT_THRESHOLD, Predictions
from lib.runtime.screen import align, list_some, shorten

RANGES = 5
MOST_CLASSES = 60
"""Of more classes there is no whole confusion matrix, and of more classes or labels no whole table on the screen."""
MOST_COLUMNS = 30
"""The matrix of more classes is in the file and not on the screen."""
MOST_ROWS = 20
"""Rows on the screen of a table that is not whole, and probabilities of a sample where not all are written."""
MOST_PROBABILITIES = 200
"""Of more classes or labels, predictions.jsonl has the MOST_ROWS largest probabilities of a sample."""
NEVER = 10
"""Names of classes that are never predicted, on the screen."""
NAME_WIDTH = 40
"""Columns of a name on the screen, at most."""
Row = dict[str, Any]


def build_tables(predictions: Predictions, names: Sequence[str]) -> dict[str, Any]:
    """The tables that fit the problem type, by name, as they are saved; their size grows with samples and classes, not C x C."""
    if predictions.problem_type == REGRESSION:
        return {"ranges": range_table(predictions)}
    if predictions.problem_type == MULTI_LABEL:
        return {"labels": label_table(predictions, names)}
    tables: dict[str, Any] = {"classes": class_table(predictions, names)}
    if len(names) <= MOST_CLASSES:
        tables["confusion_matrix"] = confusion_matrix(predictions).tolist()
    if len(names) > MOST_COLUMNS:
        tables["confusions"] = confusion_table(predictions, names)
    tables["coverage"] = coverage_table(predictions)
    if len(names) == 2:
        tables["curves"] = curve_table(predictions, names)
    return tables


def format_tables(
    tables: dict[str, Any], predictions: Predictions, names: Sequence[str], file: str = "report.json"
) -> list[str]:
    """What `build_tables` gave, as text of bounded size; what is left out is said, with the name of the file that has it."""
    if predictions.problem_type == REGRESSION:
        return [format_rows(tables["ranges"], "{:.2f}")]
    if predictions.problem_type == MULTI_LABEL:
        if predictions.thresholds is None:
            note = f"Thresholds: the model has none of its own, {DEFAULT_THRESHOLD} is used."
        elif predictions.thresholds_given:
            note = "Thresholds: as --threshold says; of other labels those of the model, or 0.5."
        else:
            note = "Thresholds: those of the best F1 on validation, where scores that use them are optimistic."
        blocks = [*format_outputs(tables["labels"], "labels", predictions, file), note]
        return [*blocks, *never_predicted(tables["labels"], predictions)]
    blocks = format_outputs(tables["classes"], "classes", predictions, file)
    if "confusions" not in tables:
        shown = [shorten(name, NAME_WIDTH) for name in names]
        rows = [[name, *map(str, row)] for name, row in zip(shown, tables["confusion_matrix"], strict=True)]
        blocks.append(format_table([["gold \\ predicted", *shown], *rows]))
    elif tables["confusions"]:
        rows, total = tables["confusions"][:MOST_ROWS], len(tables["confusions"])
        note = f"{len(rows)} of {total:,} pairs of confused classes, the most frequent; confusions in {printable(file)} has all."
        blocks += [format_rows(rows, "{:.3f}"), note]
    if tables["coverage"]:
        blocks.append(format_rows(tables["coverage"], "{:.4f}"))
    if "curves" in tables:
        areas = "area under the ROC curve {roc_auc:.4f}, average precision {average_precision:.4f}"
        blocks.append(f"{printable(names[1])}: {areas.format(**tables['curves'])}.")
    if predictions.thresholds is not None:
        threshold = f"{printable(names[1])} is predicted from a probability of {predictions.thresholds[1]:.4f} on"
        of = "--threshold" if predictions.thresholds_given else "the best F1 on validation, where scores are optimistic"
        blocks.append(f"Threshold: {threshold}, that of {of}.")
    return [*blocks, *never_predicted(tables["classes"], predictions)]


def never_predicted(rows: Sequence[Row], predictions: Predictions) -> list[str]:
    """A line that names the classes or labels which some samples have and the model predicts for none."""
    predicted, several = predictions.predicted, predictions.problem_type == MULTI_LABEL
    counts = predicted.sum(axis=0) if several else np.bincount(predicted, minlength=len(rows))
    lost = [row for row, count in zip(rows, counts, strict=True) if row["samples"] and not count]
    if not lost:
        return []
    listed = list_some([f"{shorten(next(iter(row.values())), NAME_WIDTH)} ({row['samples']:,})" for row in lost], NEVER)
    return [f"Never predicted, though samples have them: {listed}."]


def format_outputs(rows: Sequence[Row], what: str, predictions: Predictions, file: str) -> list[str]:
    """The table of classes or labels as text, of many only those with the most mistakes."""
    if len(rows) <= MOST_CLASSES:
        return [format_rows(rows, "{:.3f}")]
    chosen = [rows[place] for place in most_mistaken(predictions, MOST_ROWS)]
    note = f"{len(chosen)} of {len(rows):,} {what}, those with the most mistakes; {what} in {printable(file)} has all."
    return [format_rows(chosen, "{:.3f}"), note]


def most_mistaken(predictions: Predictions, limit: int) -> np.ndarray:
    """The classes or labels with the most mistakes (missed and wrongly predicted samples), most first, int64 (limit,)."""
    gold, predicted, outputs = predictions.labels, predictions.predicted, predictions.logits.shape[1]
    if predictions.problem_type == MULTI_LABEL:
        mistakes = (gold != predicted).sum(axis=0)
    else:
        wrong = gold != predicted
        mistakes = sum(np.bincount(side[wrong], minlength=outputs) for side in (gold, predicted))
    return np.argsort(-mistakes, kind="stable")[:limit]


def confusion_matrix(predictions: Predictions, classes: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """Counts of some classes, by default of all, int64 (classes, classes): rows are gold classes, columns predicted ones."""
    outputs = predictions.logits.shape[1]
    classes = np.arange(outputs) if classes is None else np.asarray(classes)
    places = np.full(outputs, -1)
    places[classes] = np.arange(len(classes))
    gold, predicted = places[predictions.labels], places[predictions.predicted]
    cells = (gold * len(classes) + predicted)[(gold >= 0) & (predicted >= 0)]
    return np.bincount(cells, minlength=len(classes) ** 2).reshape(len(classes), len(classes))


def confusion_table(predictions: Predictions, names: Sequence[str]) -> list[Row]:
    """Pairs of a gold class and another one that was predicted, with the number of samples, the most frequent first."""
    pairs = np.stack([predictions.labels, predictions.predicted], axis=1)
    pairs, counts = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [
        {"gold": names[gold], "predicted": names[predicted], "samples": count}
        for (gold, predicted), count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
    ]


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


def curve_table(predictions: Predictions, names: Sequence[str]) -> Row:
    """Areas under the curves of the second of two classes: ROC AUC and average precision; NaN where they are not defined."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    gold, probabilities = predictions.labels == 1, predictions.uncalibrated.probabilities_of(1)
    defined = 0 < gold.sum() < len(gold) and np.isfinite(probabilities).all()
    areas = (
        float(area(gold, probabilities)) if defined else np.nan for area in (roc_auc_score, average_precision_score)
    )
    threshold = DEFAULT_THRESHOLD if predictions.thresholds is None else float(predictions.thresholds[1])
    return {"class": names[1], "threshold": threshold} | dict(zip(("roc_auc", "average_precision"), areas, strict=True))


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

    gold = predictions.labels
    thresholds = np.full(len(names), DEFAULT_THRESHOLD) if predictions.thresholds is None else predictions.thresholds
    columns = precision_recall_fscore_support(gold, predictions.predicted, average=None, zero_division=0)
    rows = []
    for number, (name, p, r, f, n) in enumerate(zip(names, *columns, strict=True)):
        probabilities = predictions.uncalibrated.probabilities_of(number)
        defined = n > 0 and np.isfinite(probabilities).all()
        area = average_precision_score(gold[:, number], probabilities) if defined else np.nan
        values = {"threshold": thresholds[number], "precision": p, "recall": r, "f1": f, "average_precision": area}
        rows.append({"label": name, **{key: float(value) for key, value in values.items()}, "samples": int(n)})
    return rows


def format_rows(rows: Sequence[Row], number: str) -> str:
    """A table under the names of its columns; floats as `number` formats them, names as the screen can show them."""
    shown = [
        [number.format(v) if isinstance(v, float) else shorten(str(v), NAME_WIDTH) for v in row.values()]
        for row in rows
    ]
    return format_table([list(rows[0]), *shown])


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as aligned columns: the first to the left, the others to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([align(row[0], widths[0], left=True), *map(align, row[1:], widths[1:])]) for row in rows)
