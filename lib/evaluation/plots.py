"""The pictures of a scored split: a confusion matrix, gold over predicted numbers, curves, and how reliable probabilities are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.cells import cell_len

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION
from lib.errors import first_line, printable
from lib.evaluation.calibration import BINS, bin_answers, expected_calibration_error
from lib.evaluation.fonts import drawable, find_fonts, plain_text
from lib.evaluation.predictions import Predictions
from lib.evaluation.tables import MOST_CLASSES, MOST_COLUMNS, confusion_matrix, most_mistaken
from lib.runtime.atomic import replacing
from lib.runtime.screen import list_some, shorten

RELIABILITY, ROC, PRECISION_RECALL = "reliability.png", "roc.png", "precision_recall.png"
FILES = {CLASSIFICATION: "confusion_matrix.png", REGRESSION: "scatter.png", MULTI_LABEL: PRECISION_RECALL}
"""The first picture of each problem type."""
PICTURES = (*FILES.values(), RELIABILITY, ROC)
CLASSES_SHOWN = 40
"""Of more than MOST_CLASSES classes, the matrix has those with the most mistakes."""
MOST_CURVES = 20
COLORS = 10
"""Of matplotlib; more curves are dashed in the same ones."""
WIDEST = 20.0
"""Inches: a picture of many classes has smaller cells instead of more pixels."""
NAME_WIDTH = 30
NAMES_LISTED = 20


def picture_names(problem_type: str, outputs: int) -> tuple[str, ...]:
    """The names of the pictures of a split: first that of its answers, then those of their probabilities."""
    if problem_type == REGRESSION:
        return (FILES[REGRESSION],)
    curves = (ROC, PRECISION_RECALL) if problem_type == CLASSIFICATION and outputs == 2 else ()
    return (FILES[problem_type], RELIABILITY, *curves)


def draw(predictions: Predictions, tables: dict[str, Any], names: Sequence[str], title: str, folder: Path) -> list[str]:
    """Save the pictures of `picture_names` in `folder`, each of bounded size; others of an earlier report are removed.

    Returns notes on them for the reader. A name with characters that no installed font has is its number in a picture. A
    picture that cannot be drawn ends no run; a disk that cannot be written does.
    """
    problem, outputs = predictions.problem_type, predictions.logits.shape[1]
    shown, first_title = chosen_outputs(predictions, tables, title)
    labels = {place: shorten(names[place], NAME_WIDTH) for place in shown}
    families, missing = find_fonts([*labels.values(), title])
    numbered = [place for place, label in labels.items() if missing.intersection(label)]
    labels |= {place: f"#{place}" for place in numbered}
    drawn, notes = picture_names(problem, outputs), []
    for name in PICTURES:
        try:
            if name not in drawn:
                (folder / name).unlink(missing_ok=True)
                continue
            with plain_text(families), replacing(folder / name) as file:
                figure = build_figure(name, predictions, tables, labels)
                figure.axes[0].set_title(drawable(first_title if name == drawn[0] else title, missing))
                figure.savefig(file, dpi=120)
        except OSError:
            raise
        except Exception as error:
            notes.append(f"{name} was not drawn: {printable(first_line(error))}")
    if numbered:
        legend = [f"#{place} is {shorten(names[place], NAME_WIDTH)}" for place in numbered]
        notes.append(
            f"No installed font has the characters of {len(numbered)} of the names in {drawn[0]}, which shows their "
            f"numbers: {list_some(legend, NAMES_LISTED)}. Install a font that has them, "
            "such as Noto Sans CJK for Chinese, and score again."
        )
    return notes


def build_figure(name: str, predictions: Predictions, tables: dict[str, Any], labels: dict[int, str]) -> Any:
    """The matplotlib figure of one picture; `labels` are the outputs that are shown, by place."""
    from matplotlib.figure import Figure  # takes seconds to import, as scikit-learn does

    if name == RELIABILITY:
        figure = Figure(figsize=(6.0, 6.0), layout="constrained")
        draw_reliability(figure.subplots(2, height_ratios=(3, 1), sharex=True), predictions)
        return figure
    margin = 0.07 * max(0, max(map(cell_len, labels.values())) - 12)  # for long names
    side = min(2.5 + 0.7 * len(labels) + margin, WIDEST)
    curves, problem = (8.0 + margin, 5.0), predictions.problem_type
    sizes = {FILES[CLASSIFICATION]: (side + 1, side), FILES[REGRESSION]: (6.0, 5.0)}
    figure = Figure(figsize=sizes.get(name, curves), layout="constrained")
    axes = figure.subplots()
    if name == FILES[CLASSIFICATION]:
        draw_confusion_matrix(axes, predictions, labels)
    elif name == FILES[REGRESSION]:
        draw_scatter(axes, predictions, labels[0])
    elif problem == MULTI_LABEL:
        draw_curves(axes, predictions, tables["labels"], labels)
    else:
        draw_curve_of_two(axes, name, predictions, tables["curves"], labels[1])
    return figure


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


def draw_reliability(panels: Sequence[Any], predictions: Predictions) -> None:
    """How often an answer is right, over its probability, with and without the temperature; below, how many there are."""
    from sklearn.calibration import CalibrationDisplay

    axes, below = panels
    kinds = {"without temperature": predictions.uncalibrated}
    if predictions.temperature is not None:
        kinds[f"at temperature {predictions.temperature:.3g}"] = predictions
    for number, (kind, scaled) in enumerate(kinds.items()):
        bins = bin_answers(scaled)
        some = bins.counts > 0
        label = f"{kind} (calibration error {expected_calibration_error(scaled):.3f})"
        style = {"color": f"C{number}", "marker": "s" if number else "o", "markersize": 4}
        share, mean = (total[some] / bins.counts[some] for total in (bins.right, bins.probabilities))
        CalibrationDisplay(share, mean, None, estimator_name=label).plot(ax=axes, **style)
        below.stairs(bins.counts, np.linspace(0, 1, BINS + 1), color=f"C{number}")
    what, how = "highest probability", "share of right answers"
    if predictions.problem_type == MULTI_LABEL:
        what, how = "probability of a label", "share of samples that have it"
    axes.set(xlabel="", ylabel=how, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="auto")
    axes.legend(loc="upper left", fontsize="small")
    below.set(xlabel=what, ylabel="count")


def draw_curve_of_two(axes: Any, name: str, predictions: Predictions, row: dict[str, Any], label: str) -> None:
    """The curve of the second of two classes, with its area, and a point where it is predicted."""
    from sklearn.metrics import PrecisionRecallDisplay, RocCurveDisplay

    gold, predicted = predictions.labels == 1, predictions.predicted == 1
    hit = (gold & predicted).sum()
    recall, precision = hit / max(1, gold.sum()), hit / max(1, predicted.sum())
    area, kind, short = row["roc_auc"], RocCurveDisplay, "AUC"
    point = ((~gold & predicted).sum() / max(1, (~gold).sum()), recall)
    x, y = "false positive rate", "recall (true positive rate)"
    if name == PRECISION_RECALL:
        area, kind, short = row["average_precision"], PrecisionRecallDisplay, "AP"
        point, x, y = (recall, precision), "recall", "precision"
    axes.set(xlabel=x, ylabel=y, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="auto")
    if not np.isfinite(area):
        axes.text(0.5, 0.5, "not defined: one class only, or NaN", ha="center")
        return
    display = kind.from_predictions(gold, predictions.probabilities_of(1), ax=axes, plot_chance_level=True)
    (mark,) = axes.plot(*point, "o", color=display.line_.get_color())
    axes.set(xlabel=x, ylabel=y, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="auto")
    entries = [f"{label} ({short} = {area:.2f})", f"predicted from {row['threshold']:.2g} on", "chance"]
    add_legend(axes, [display.line_, mark, display.chance_level_], entries)


def draw_curves(axes: Any, predictions: Predictions, rows: Sequence[dict[str, Any]], labels: dict[int, str]) -> None:
    """A curve for each label, the most frequent first, with a point at its threshold."""
    from sklearn.metrics import PrecisionRecallDisplay

    lines: list[Any] = []
    entries = []
    for place in sorted(labels, key=lambda place: -rows[place]["samples"]):
        row = rows[place]
        if np.isfinite(row["average_precision"]):
            style = {"linestyle": "-" if len(lines) < COLORS else "--"}
            display = PrecisionRecallDisplay.from_predictions(
                predictions.labels[:, place], predictions.probabilities_of(place), ax=axes, curve_kwargs=style
            )
            axes.plot(row["recall"], row["precision"], "o", color=display.line_.get_color())
            lines.append(display.line_)
            entries.append(f"{labels[place]} (AP = {row['average_precision']:.2f})")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02), aspect="auto")
    if lines:
        add_legend(axes, lines, entries)


def add_legend(axes: Any, lines: Sequence[Any], entries: Sequence[str]) -> None:
    """A legend beside the axes, where it hides nothing."""
    if axes.get_legend() is not None:
        axes.get_legend().remove()
    legend = axes.figure.legend(lines, list(map(str, range(len(lines)))), loc="outside right upper")
    for text, entry in zip(legend.get_texts(), entries, strict=True):  # a label that begins with _ has no entry
        text.set_text(entry)
