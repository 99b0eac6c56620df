"""What is said about a scored split: intervals, per-class table, confusion matrix, calibration, predictions file."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from lib.data import Data
from lib.evaluation import METRICS, Predictions, load_metric, metric_settings

BINS = 15


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts, int64 (classes, classes): rows are gold labels, columns predictions."""
    cells = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def expected_calibration_error(predictions: Predictions) -> float:
    """Mean gap between confidence and accuracy over 15 equal bins of the highest probability (Guo et al., ICML 2017)."""
    confidence = predictions.probabilities.max(axis=1)
    correct = predictions.predicted == predictions.labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=confidence - correct, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def bootstrap_intervals(
    predictions: Predictions, metrics: Sequence[str], resamples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """95 % percentile interval of the loss and of each metric of ours (Efron and Tibshirani 1993).

    Metrics depend on the confusion matrix alone, and resampling samples with replacement is drawing its cells from a
    multinomial distribution: the cost does not grow with the number of samples.
    """
    rng = np.random.default_rng(seed)
    num_classes, size = predictions.logits.shape[1], len(predictions.labels)
    counts = confusion_matrix(predictions.labels, predictions.predicted, num_classes).ravel()
    gold, predicted = np.divmod(np.arange(num_classes**2), num_classes)
    draws = rng.multinomial(size, counts / size, size=resamples)
    losses = [rng.choice(predictions.losses, size).mean(dtype=np.float64) for _ in range(resamples)]
    intervals = {"loss": percentiles(losses)}
    for name in metrics:
        module, settings = metric_settings(name, num_classes)
        if (METRICS / module).is_dir():
            compute = load_metric(module)._compute
            values = [
                compute(predicted[row > 0], gold[row > 0], sample_weight=row[row > 0], **settings)[module]
                for row in draws
            ]
            intervals[name] = percentiles(values)
    return intervals


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def class_table(predictions: Predictions, label_names: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and number of samples of each class."""
    matrix = confusion_matrix(predictions.labels, predictions.predicted, len(label_names))
    hits, predicted, gold = matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1)
    ratio = lambda a, b: np.divide(a, b, out=np.zeros(len(a)), where=b > 0)  # noqa: E731
    columns = (ratio(hits, predicted), ratio(hits, gold), ratio(2 * hits, predicted + gold))
    return [
        {"class": name, "precision": p, "recall": r, "f1": f, "samples": int(n)}
        for name, p, r, f, n in zip(label_names, *(column.tolist() for column in columns), gold.tolist(), strict=True)
    ]


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


def format_report(
    split: str,
    scores: dict[str, float],
    intervals: dict[str, tuple[float, float]],
    predictions: Predictions,
    label_names: Sequence[str],
) -> str:
    """The report as text: scores with intervals, the per-class table, the confusion matrix."""
    score_rows = [[f"{split} ({len(predictions.labels)} samples)", "value", "95 % interval"]]
    for name, value in scores.items():
        low, high = intervals.get(name, (None, None))
        score_rows.append([name, f"{value:.4f}", f"{low:.4f} to {high:.4f}" if low is not None else ""])
    class_rows = [["class", "precision", "recall", "f1", "samples"]]
    for row in class_table(predictions, label_names):
        shares = [f"{row[key]:.3f}" for key in ("precision", "recall", "f1")]
        class_rows += [[row["class"], *shares, str(row["samples"])]]
    matrix = confusion_matrix(predictions.labels, predictions.predicted, len(label_names))
    matrix_rows = [["gold \\ predicted", *label_names]]
    matrix_rows += [[name, *map(str, row)] for name, row in zip(label_names, matrix.tolist(), strict=True)]
    return "\n\n".join(format_table(rows) for rows in (score_rows, class_rows, matrix_rows))


def draw_confusion_matrix(predictions: Predictions, label_names: Sequence[str], title: str, path: Path) -> None:
    """A PNG: shares of each gold class as colour, counts as text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matrix = confusion_matrix(predictions.labels, predictions.predicted, len(label_names))
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 2.5 + 0.7 * len(label_names)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(label_names)), label_names, rotation=30, ha="right")
    axes.set_yticks(range(len(label_names)), label_names)
    axes.set(xlabel="predicted", ylabel="gold", title=title)
    if len(label_names) <= 30:
        for row, column in np.ndindex(*matrix.shape):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axes, label="share of the gold class", shrink=0.8)
    figure.savefig(path, dpi=120)


def finite(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite, also in lists, become the text "NaN", "Infinity" or "-Infinity"."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def row_texts(texts: Dataset) -> list[Any]:
    """The text of each row, a list of two for pairs."""
    columns = [list(texts[column]) for column in texts.column_names]
    return columns[0] if len(columns) == 1 else [list(row) for row in zip(*columns, strict=True)]


def write_predictions(path: Path, predictions: Predictions, texts: Dataset, label_names: Sequence[str]) -> None:
    """One JSON object a line, in input order: index, text, gold, predicted, probabilities by class name."""
    predicted, probabilities = predictions.predicted.tolist(), predictions.probabilities.tolist()
    with path.open("w", encoding="utf-8") as file:
        for index, (text, gold) in enumerate(zip(row_texts(texts), predictions.labels.tolist(), strict=True)):
            row = {
                "index": index,
                "text": text,
                "gold": label_names[gold],
                "predicted": label_names[predicted[index]],
                "probabilities": {name: round(p, 6) for name, p in zip(label_names, probabilities[index], strict=True)},
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


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
            " | ".join(t) if isinstance(t, list) else t,
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
    """Write `report.json`, `predictions.jsonl` and `confusion_matrix.png` to `folder`; return the report as text."""
    folder.mkdir(parents=True, exist_ok=True)
    texts, label_names = data.texts[split], data.label_names
    scores = scores | {"calibration_error": expected_calibration_error(predictions)}
    intervals = bootstrap_intervals(predictions, metrics, resamples, seed)
    write_predictions(folder / "predictions.jsonl", predictions, texts, label_names)
    draw_confusion_matrix(
        predictions, label_names, f"{split}, {len(predictions.labels)} samples", folder / "confusion_matrix.png"
    )
    record = {
        "split": split,
        "samples": len(predictions.labels),
        "scores": scores,
        "intervals_95": intervals,
        "classes": class_table(predictions, label_names),
        "confusion_matrix": confusion_matrix(predictions.labels, predictions.predicted, len(label_names)).tolist(),
    }
    (folder / "report.json").write_text(
        json.dumps(finite(record), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return format_report(split, scores, intervals, predictions, label_names)
