"""The picture of a comparison: how many times faster, with the targets marked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.comparison import Outcome

INK, FAINT, LINE = "#1f2328", "#7d8590", "#d8dee4"
BAR, BELOW, TARGET = "#2f6db3", "#b4c4d6", "#d9480f"


def plot(outcomes: Sequence[Outcome], words: dict[str, Any], caption: str, path: Path) -> None:
    """Horizontal bars on a logarithmic scale: ratio of medians, range of the paired ratios, both targets of a row."""
    shown = [outcome for outcome in outcomes if outcome.ours][::-1]
    figure = Figure(figsize=(10, 1.7 + 0.62 * len(shown)), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1))
    axes = figure.add_subplot()
    for place, outcome in enumerate(shown):
        draw_row(axes, place, outcome, words)
    values = [*(value for o in shown for value in o.ratios), *(o.row.reach_for for o in shown if o.row.reach_for), 1, 2]
    style_axes(axes, 0.8 * min(values), 1.25 * max(values), len(shown))
    figure.suptitle("Times faster than its peer, side by side in one run", x=0.015, ha="left", color=INK, fontsize=14)
    figure.supxlabel(f"{LEGEND}\n{caption}", x=0.015, ha="left", color=FAINT, fontsize=8.5)
    figure.savefig(path, dpi=160)


LEGEND = (
    "bar: ratio of medians, pale below its target    black line: range of the ratios of pairs    "
    "orange: target, solid at least, dotted reach for"
)


def style_axes(axes: Axes, left: float, right: float, rows: int) -> None:
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(-0.55, rows - 0.45)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}×" if f"{value:e}"[0] in "25" else "")
    axes.tick_params(axis="x", which="both", labelcolor=FAINT, color=LINE, labelsize=8.5, pad=6)
    axes.grid(axis="x", which="major", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)


def draw_row(axes: Axes, place: int, outcome: Outcome, words: dict[str, Any]) -> None:
    row, margin = outcome.row, axes.get_yaxis_transform()
    met = row.at_least is None or outcome.ratio >= row.at_least
    axes.barh(place, outcome.ratio - 1, left=1, height=0.46, color=BAR if met else BELOW)
    low, high = min(outcome.ratios), max(outcome.ratios)
    if high > low:
        axes.plot([low, high], [place, place], color=INK, linewidth=1.3, solid_capstyle="butt")
    for goal, style in ((row.at_least, "-"), (row.reach_for, (0, (1, 1)))):
        if goal is not None:
            axes.plot([goal, goal], [place - 0.3, place + 0.3], color=TARGET, linewidth=1.8, linestyle=style)
    at_left: dict[str, Any] = {"transform": margin, "ha": "right", "va": "center"}
    axes.text(-0.02, place + 0.15, row.work.format(**words), color=INK, fontsize=10, **at_left)
    axes.text(-0.02, place - 0.19, f"against {row.against.format(**words)}", color=FAINT, fontsize=8.5, **at_left)
    digits = row.digits
    pairs = f"{low:.{digits}f} to {high:.{digits}f}, n = {len(outcome.ratios)}" if high > low else "one pair"
    at_right: dict[str, Any] = {"transform": margin, "ha": "left", "va": "center"}
    axes.text(1.02, place + 0.13, f"{outcome.ratio:.{digits}f}×", color=INK, fontsize=12, weight="bold", **at_right)
    axes.text(1.02, place - 0.21, pairs, color=FAINT, fontsize=8, **at_right)
