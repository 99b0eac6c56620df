"""What is said about a scored split: intervals, tables, a picture, calibration, predictions file."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION
from lib.data.load import Data
from lib.evaluation.intervals import bootstrap_intervals
from lib.evaluation.plots import draw
from lib.evaluation.predictions import Predictions
from lib.evaluation.tables import describe, format_table, format_tables
from lib.runtime.atomic import finite

BINS = 15
DIGITS = 6
ERRORS = ["index", "text", "gold", "predicted"]


def expected_calibration_error(predictions: Predictions) -> float:
    """Mean gap between confidence and accuracy over 15 equal bins of the highest probability (Guo et al., ICML 2017)."""
    confidence = predictions.probabilities.max(axis=1)
    correct = predictions.predicted == predictions.labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=confidence - correct, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def format_report(
    split: str,
    scores: dict[str, float],
    intervals: dict[str, tuple[float, float]],
    predictions: Predictions,
    label_names: Sequence[str],
) -> str:
    """The report as text: scores with intervals, then the tables of the problem."""
    score_rows = [[f"{split} ({len(predictions.labels)} samples)", "value", "95 % interval"]]
    for name, value in scores.items():
        low, high = intervals.get(name, (None, None))
        score_rows.append([name, f"{value:.4f}", f"{low:.4f} to {high:.4f}" if low is not None else ""])
    return "\n\n".join([format_table(score_rows), *format_tables(predictions, label_names)])


def row_texts(texts: Dataset) -> list[Any]:
    """The text of each row, a list of two for pairs."""
    columns = [list(texts[column]) for column in texts.column_names]
    return columns[0] if len(columns) == 1 else [list(row) for row in zip(*columns, strict=True)]


def write_predictions(path: Path, predictions: Predictions, texts: Dataset, label_names: Sequence[str]) -> None:
    """One JSON object a line, in input order: index, text, gold, predicted, and probabilities by name where there are."""
    rows = zip(row_texts(texts), describe_rows(predictions, label_names), strict=True)
    with path.open("w", encoding="utf-8") as file:
        for index, (text, row) in enumerate(rows):
            line = {"index": index, "text": text} | row
            file.write(json.dumps(finite(line), ensure_ascii=False) + "\n")


def describe_rows(predictions: Predictions, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Gold, predicted and probabilities of each sample, by name: a class, a number, or a list of labels."""
    golds, predicteds = predictions.labels.tolist(), predictions.predicted.tolist()
    if predictions.problem_type == REGRESSION:
        for gold, predicted in zip(golds, predicteds, strict=True):
            yield {"gold": round(gold, DIGITS), "predicted": round(predicted, DIGITS)}
        return
    several = predictions.problem_type == MULTI_LABEL
    for gold, predicted, shares in zip(golds, predicteds, predictions.probabilities.tolist(), strict=True):
        yield {
            "gold": chosen_names(gold, names) if several else names[gold],
            "predicted": chosen_names(predicted, names) if several else names[predicted],
            "probabilities": {name: round(share, DIGITS) for name, share in zip(names, shares, strict=True)},
        }


def chosen_names(row: Sequence[int], names: Sequence[str]) -> list[str]:
    return [name for name, chosen in zip(names, row, strict=True) if chosen]


def worst_rows(
    predictions: Predictions, texts: Dataset, names: Sequence[str], limit: int = 100
) -> tuple[list[Any], list[list[Any]]]:
    """(columns, rows) of what went most wrong: the surest errors of classes, else the largest losses."""
    if predictions.problem_type == CLASSIFICATION:
        return [*ERRORS, "probability"], confident_errors(predictions, texts, names, limit)
    worst = np.argsort(-predictions.losses, kind="stable")[:limit]
    rows = zip(
        worst.tolist(), row_texts(texts.select(worst)), describe_rows(predictions.take(worst), names), strict=True
    )
    losses = predictions.losses[worst].tolist()
    table = [[i, one_line(text), one_line(row["gold"]), one_line(row["predicted"])] for i, text, row in rows]
    return [*ERRORS, "loss"], [[*row, loss] for row, loss in zip(table, losses, strict=True)]


def one_line(value: Any) -> Any:
    return " | ".join(value) if isinstance(value, list) else value


def confident_errors(
    predictions: Predictions, texts: Dataset, label_names: Sequence[str], limit: int = 100
) -> list[list[Any]]:
    """Wrong predictions, the surest first: index, text, gold, predicted, probability of the prediction."""
    predicted, confidence = predictions.predicted, predictions.probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != predictions.labels)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:limit]
    text = row_texts(texts.select(wrong)) if len(wrong) else []
    return [
        [
            int(i),
            one_line(t),
            label_names[predictions.labels[i]],
            label_names[predicted[i]],
            float(confidence[i]),
        ]
        for i, t in zip(wrong, text, strict=True)
    ]


def write_report(
    folder: Path,
    split: str,
    scores: dict[str, float],
    metrics: Sequence[str],
    predictions: Predictions,
    data: Data,
    resamples: int = 1000,
    seed: int = 42,
) -> str:
    """Write `report.json`, `predictions.jsonl` and a picture to `folder`; return the report as text."""
    folder.mkdir(parents=True, exist_ok=True)
    texts, names = data.texts[split], data.label_names
    if predictions.problem_type == CLASSIFICATION:
        scores = scores | {"calibration_error": expected_calibration_error(predictions)}
    intervals = bootstrap_intervals(predictions, metrics, resamples, seed)
    write_predictions(folder / "predictions.jsonl", predictions, texts, names)
    draw(predictions, names, f"{split}, {len(predictions.labels)} samples", folder)
    record = {
        "split": split,
        "samples": len(predictions.labels),
        "scores": scores,
        "intervals_95": intervals,
        **describe(predictions, names),
    }
    (folder / "report.json").write_text(
        json.dumps(finite(record), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return format_report(split, scores, intervals, predictions, names)
