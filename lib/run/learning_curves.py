"""The course of a run as a picture, from metrics.jsonl: losses, the metric that chooses the model, the learning rate."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.errors import first_line, printable
from lib.evaluation.fonts import drawable, find_fonts, plain_text
from lib.run.tracking import read_log
from lib.runtime.atomic import replacing

NAME = "learning_curves.png"


def draw_learning_curves(folder: Path, metric: str, best_step: int) -> list[str]:
    """Save learning_curves.png of the run in `folder`; the step of the best model is marked.

    Whatever goes wrong ends no run, which is trained by then; it is returned as a note for the reader.
    """
    try:
        title = printable(folder.name)
        families, missing = find_fonts([title])
        with plain_text(families), replacing(folder / NAME) as file:
            figure = build_figure(read_log(folder / "metrics.jsonl"), metric, best_step, drawable(title, missing))
            figure.savefig(file, dpi=120)
    except Exception as error:
        return [f"{NAME} was not drawn: {printable(first_line(error))}"]
    return []


def build_figure(lines: Sequence[dict[str, Any]], metric: str, best_step: int, title: str) -> Any:
    """A matplotlib figure with a panel for the losses, one for the metric unless it is the loss, and one for the rate."""
    from matplotlib.figure import Figure  # takes seconds to import

    panels = [
        ("loss", ["train/loss", "eval/loss"]),
        (metric, [f"eval/{metric}"]),
        ("learning rate", ["train/learning_rate"]),
    ]
    panels = [panel for panel in panels if panel[0] != "loss" or panel is panels[0]]
    figure = Figure(figsize=(8, 2.6 * len(panels)), layout="constrained")
    figure.suptitle(title, parse_math=False, fontsize="medium", wrap=True)
    for axes, (name, columns) in zip(
        figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels, strict=True
    ):
        for column in columns:
            points = [(line["step"], line[column]) for line in lines if is_number(line.get(column))]
            if points:
                kind = {"train": "training", "eval": "validation"}[column.partition("/")[0]]
                axes.plot(*zip(*points, strict=True), marker="." if len(points) < 100 else "", label=kind)
        axes.set_ylabel(name)
        if best_step:
            axes.axvline(best_step, color="gray", linestyle=":", label=f"best model, step {best_step:,}")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small")
    axes.set_xlabel("step")
    return figure


def is_number(value: Any) -> bool:
    """Whether a value of metrics.jsonl is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
