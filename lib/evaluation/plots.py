"""The picture of a scored split: a confusion matrix, gold over predicted numbers, or precision over recall of labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION
from lib.evaluation.predictions import Predictions
from lib.evaluation.tables import confusion_matrix, label_table

FILES = {CLASSIFICATION: "confusion_matrix.png", REGRESSION: "scatter.png", MULTI_LABEL: "precision_recall.png"}
MOST_COUNTS = 30
"""The matrix of more classes shows no counts."""

MOST_CURVES = 20


def draw(predictions: Predictions, names: Sequence[str], title: str, folder: Path) -> None:
    """Save the picture of the problem type in `folder`, under its name in `FILES`."""
    from matplotlib.figure import Figure  # takes seconds to import, as scikit-learn does

    problem = predictions.problem_type
    side = 2.5 + 0.7 * len(names)
    size = {CLASSIFICATION: (side + 1, side), REGRESSION: (6.0, 5.0), MULTI_LABEL: (8.0, 5.0)}
    figure = Figure(figsize=size[problem], layout="constrained")
    axes = figure.subplots()
    draw_problem = {CLASSIFICATION: draw_confusion_matrix, REGRESSION: draw_scatter, MULTI_LABEL: draw_curves}
    draw_problem[problem](axes, predictions, names)
    axes.set_title(title)
    figure.savefig(folder / FILES[problem], dpi=120)


def draw_confusion_matrix(axes: Any, predictions: Predictions, names: Sequence[str]) -> None:
    """Colors show the share of each gold class, texts show counts."""
    from sklearn.metrics import ConfusionMatrixDisplay

    counts = confusion_matrix(predictions)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    display = ConfusionMatrixDisplay(shares, display_labels=names)
    display.plot(
        ax=axes, cmap="Blues", include_values=len(names) <= MOST_COUNTS, colorbar=False, im_kw={"vmin": 0, "vmax": 1}
    )
    if display.text_ is not None:
        for text, count in zip(display.text_.flat, counts.flat, strict=True):
            text.set_text(count)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set(xlabel="predicted", ylabel="gold")
    axes.figure.colorbar(display.im_, ax=axes, label="share of the gold class", shrink=0.8)


def draw_scatter(axes: Any, predictions: Predictions, names: Sequence[str]) -> None:
    """A point per finite prediction, and the line of right ones."""
    from matplotlib.ticker import AutoLocator
    from sklearn.metrics import PredictionErrorDisplay

    gold, predicted = predictions.labels, predictions.predicted
    finite = np.isfinite(predicted)
    if finite.any():
        display = PredictionErrorDisplay(y_true=gold[finite], y_pred=predicted[finite])
        display.plot(ax=axes, kind="actual_vs_predicted", scatter_kwargs={"s": 8, "alpha": 0.3, "linewidths": 0})
    for axis in (axes.xaxis, axes.yaxis):  # round numbers; the display has ticks at the exact ends
        axis.set_major_locator(AutoLocator())
    axes.set(xlabel=f"predicted {names[0]}", ylabel=f"gold {names[0]}")


def draw_curves(axes: Any, predictions: Predictions, names: Sequence[str]) -> None:
    """A curve for each of the most frequent labels, with a point at its threshold."""
    from sklearn.metrics import PrecisionRecallDisplay

    rows, probabilities = label_table(predictions, names), predictions.probabilities
    for place in sorted(range(len(rows)), key=lambda place: -rows[place]["samples"])[:MOST_CURVES]:
        row = rows[place]
        if np.isfinite(row["average_precision"]):
            display = PrecisionRecallDisplay.from_predictions(
                predictions.labels[:, place], probabilities[:, place], name=row["label"], ax=axes
            )
            axes.plot(row["recall"], row["precision"], "o", color=display.line_.get_color())
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02), aspect="auto")
    if axes.lines:
        axes.get_legend().remove()
        axes.figure.legend(loc="outside right upper")
