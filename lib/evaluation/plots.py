"""A picture of a scored split: the confusion matrix, predicted over gold numbers, or precision over recall of labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION
from lib.evaluation.predictions import Predictions
from lib.evaluation.tables import confusion_matrix, label_table

FILES = {CLASSIFICATION: "confusion_matrix.png", REGRESSION: "scatter.png", MULTI_LABEL: "precision_recall.png"}
MOST_CURVES = 20


def draw(predictions: Predictions, names: Sequence[str], title: str, folder: Path) -> None:
    """Save the picture that fits the problem to `folder`, under its name in `FILES`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = 2.5 + 0.7 * len(names) if predictions.problem_type == CLASSIFICATION else 5.0
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    painter = {CLASSIFICATION: draw_confusion_matrix, REGRESSION: draw_scatter, MULTI_LABEL: draw_curves}
    painter[predictions.problem_type](figure, axes, predictions, names)
    axes.set_title(title)
    figure.savefig(folder / FILES[predictions.problem_type], dpi=120)


def draw_confusion_matrix(figure: Any, axes: Any, predictions: Predictions, label_names: Sequence[str]) -> None:
    """Shares of each gold class as colour, counts as text."""
    matrix = confusion_matrix(predictions.labels, predictions.predicted, len(label_names))
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(label_names)), label_names, rotation=30, ha="right")
    axes.set_yticks(range(len(label_names)), label_names)
    axes.set(xlabel="predicted", ylabel="gold")
    if len(label_names) <= 30:
        for row, column in np.ndindex(*matrix.shape):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axes, label="share of the gold class", shrink=0.8)


def draw_scatter(figure: Any, axes: Any, predictions: Predictions, label_names: Sequence[str]) -> None:
    """A point a sample, and the line on which predictions would be right."""
    gold, predicted = predictions.labels, predictions.predicted
    axes.scatter(gold, predicted, s=8, alpha=0.3, linewidths=0)
    ends = [min(gold.min(), predicted.min()), max(gold.max(), predicted.max())]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.set(xlabel=f"gold {label_names[0]}", ylabel=f"predicted {label_names[0]}", aspect="equal")


def draw_curves(figure: Any, axes: Any, predictions: Predictions, label_names: Sequence[str]) -> None:
    """A curve for each of the most frequent labels, with a point where its threshold lies."""
    from sklearn.metrics import precision_recall_curve

    rows = label_table(predictions, label_names)
    frequent = sorted(range(len(rows)), key=lambda place: -rows[place]["samples"])[:MOST_CURVES]
    for place in frequent:
        row = rows[place]
        if np.isfinite(row["average_precision"]):
            gold, scores = predictions.labels[:, place], predictions.probabilities[:, place]
            precision, recall, _ = precision_recall_curve(gold, scores)
            (line,) = axes.step(recall, precision, where="post", label=f"{row['label']} {row['average_precision']:.2f}")
            axes.plot(row["recall"], row["precision"], "o", color=line.get_color())
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    if axes.lines:
        axes.legend(title="average precision", fontsize="small")
