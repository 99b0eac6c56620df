"""The picture of a scored split: a confusion matrix, gold over predicted numbers, or precision over recall of labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.cells import cell_len

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION
from lib.evaluation.fonts import drawable, find_fonts, plain_text
from lib.evaluation.predictions import Predictions
from lib.evaluation.tables import MOST_CLASSES, MOST_COLUMNS, confusion_matrix, most_mistaken
from lib.runtime.atomic import replacing
from lib.runtime.screen import list_some, shorten

FILES = {CLASSIFICATION: "confusion_matrix.png", REGRESSION: "scatter.png", MULTI_LABEL: "precision_recall.png"}
CLASSES_SHOWN = 40
"""Of more than MOST_CLASSES classes, the matrix has those with the most mistakes."""
MOST_CURVES = 20
WIDEST = 20.0
"""Inches: a picture of many classes has smaller cells instead of more pixels."""
NAME_WIDTH = 30
NAMES_LISTED = 20


def draw(predictions: Predictions, tables: dict[str, Any], names: Sequence[str], title: str, folder: Path) -> list[str]:
    """Save the picture of the problem type in `folder`, under its name in `FILES`; its size is bounded.

    Returns notes on it for the reader. A name with characters that no installed font has is its number in the picture.
    """
    from matplotlib.figure import Figure  # takes seconds to import, as scikit-learn does

    problem = predictions.problem_type
    shown, title = chosen_outputs(predictions, tables, title)
    labels = {place: shorten(names[place], NAME_WIDTH) for place in shown}
    families, missing = find_fonts([*labels.values(), title])
    numbered = [place for place, label in labels.items() if missing.intersection(label)]
    labels |= {place: f"#{place}" for place in numbered}
    title = drawable(title, missing)
    with plain_text(families):
        margin = 0.07 * max(0, max(map(cell_len, labels.values())) - 12)  # for long names
        side = min(2.5 + 0.7 * len(shown) + margin, WIDEST)
        size = {CLASSIFICATION: (side + 1, side), REGRESSION: (6.0, 5.0), MULTI_LABEL: (8.0 + margin, 5.0)}
        figure = Figure(figsize=size[problem], layout="constrained")
        axes = figure.subplots()
        if problem == CLASSIFICATION:
            draw_confusion_matrix(axes, predictions, labels)
        elif problem == REGRESSION:
            draw_scatter(axes, predictions, labels[0])
        else:
            draw_curves(axes, predictions, tables["labels"], labels)
        axes.set_title(title)
        with replacing(folder / FILES[problem]) as file:
            figure.savefig(file, dpi=120)
    if not numbered:
        return []
    legend = [f"#{place} is {shorten(names[place], NAME_WIDTH)}" for place in numbered]
    return [
        f"No installed font has the characters of {len(numbered)} of the names in {FILES[problem]}, which shows their "
        f"numbers: {list_some(legend, NAMES_LISTED)}. Install a font that has them, "
        "such as Noto Sans CJK for Chinese, and score again."
    ]


def chosen_outputs(predictions: Predictions, tables: dict[str, Any], title: str) -> tuple[list[int], str]:
    """The classes or labels in the picture, and its title, which says if some are left out."""
    outputs = predictions.logits.shape[1]
    if predictions.problem_type == MULTI_LABEL and outputs > MOST_CURVES:
        order = sorted(range(outputs), key=lambda place: -tables["labels"][place]["samples"])
        return order[:MOST_CURVES], f"{title}\nthe {MOST_CURVES} most frequent of {outputs:,} labels"
    if predictions.problem_type == CLASSIFICATION and outputs > MOST_CLASSES:
        chosen = sorted(most_mistaken(predictions, CLASSES_SHOWN).tolist())
        return chosen, f"{title}\nthe {CLASSES_SHOWN} of {outputs:,} classes with the most mistakes"
    return list(range(outputs)), title


def draw_confusion_matrix(axes: Any, predictions: Predictions, labels: dict[int, str]) -> None:
    """Colors show the share of each gold class, texts show counts."""
    from sklearn.metrics import ConfusionMatrixDisplay

    counts = confusion_matrix(predictions, list(labels))
    samples = np.bincount(predictions.labels, minlength=predictions.logits.shape[1])[list(labels), None]
    names, small = list(labels.values()), {"fontsize": 8} if len(labels) > MOST_COLUMNS else {}
    display = ConfusionMatrixDisplay(counts / np.maximum(samples, 1), display_labels=names)
    display.plot(
        ax=axes, cmap="Blues", include_values=len(names) <= MOST_COLUMNS, colorbar=False, im_kw={"vmin": 0, "vmax": 1}
    )
    if display.text_ is not None:
        for text, count in zip(display.text_.flat, counts.flat, strict=True):
            text.set_text(count)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", **small)
    axes.set_yticks(range(len(names)), names, **small)
    axes.set(xlabel="predicted", ylabel="gold")
    axes.figure.colorbar(display.im_, ax=axes, label="share of the gold class", shrink=0.8)


def draw_scatter(axes: Any, predictions: Predictions, name: str) -> None:
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
    axes.set(xlabel=f"predicted {name}", ylabel=f"gold {name}")


def draw_curves(axes: Any, predictions: Predictions, rows: Sequence[dict[str, Any]], labels: dict[int, str]) -> None:
    """A curve for each label, the most frequent first, with a point at its threshold."""
    from sklearn.metrics import PrecisionRecallDisplay

    lines, entries = [], []
    for place in sorted(labels, key=lambda place: -rows[place]["samples"]):
        row = rows[place]
        if np.isfinite(row["average_precision"]):
            display = PrecisionRecallDisplay.from_predictions(
                predictions.labels[:, place], predictions.probabilities_of(place), ax=axes
            )
            axes.plot(row["recall"], row["precision"], "o", color=display.line_.get_color())
            lines.append(display.line_)
            entries.append(f"{labels[place]} (AP = {row['average_precision']:.2f})")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02), aspect="auto")
    if lines:
        axes.get_legend().remove()
        legend = axes.figure.legend(lines, list(map(str, range(len(lines)))), loc="outside right upper")
        for text, entry in zip(legend.get_texts(), entries, strict=True):  # a label that begins with _ has no entry
            text.set_text(entry)
