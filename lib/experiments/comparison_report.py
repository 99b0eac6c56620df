"""A comparison as text, as JSON and as a picture."""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.config.compare import CompareConfig
from lib.evaluation.fonts import find_fonts, plain_text
from lib.evaluation.scores import LOWER_IS_BETTER
from lib.evaluation.tables import format_table
from lib.experiments.comparison import GroupScore, MetricComparison, changed_answers
from lib.experiments.groups import Group, differing_settings
from lib.experiments.significance import LEVEL
from lib.run.ownership import holds, refuse
from lib.runtime.atomic import finite, replacing, write_atomically

LONGEST_TEXT = 80
MOST_SETTINGS = 20
"""Rows of the table of settings."""
STARS = (
    "mean ± standard deviation over the seeds; * p < 0.05, ** p < 0.01, *** p < 0.001 against A, corrected for several"
)


def format_comparison(groups: Sequence[Group], metrics: Sequence[MetricComparison], config: CompareConfig) -> str:
    """The whole comparison as text: the groups, a table for each metric, and the answers that changed most."""
    size = len(groups[0].scored[0].texts)
    letters = [chr(ord("A") + i) if i < 26 else f"#{i + 1}" for i in range(len(groups))]
    parts = [format_table([["", "runs", "recipe"], *group_rows(groups, letters)])]
    differing = [[short(cell) for cell in row] for row in differing_settings(groups)]
    parts.append(format_table([["setting", *letters], *differing[:MOST_SETTINGS]]))
    if len(differing) > MOST_SETTINGS:
        parts[-1] += f"\n{len(differing) - MOST_SETTINGS} more in comparison.json (--output_dir)"
    for metric in metrics:
        lower = " (lower is better)" if metric.metric in LOWER_IS_BETTER else ""
        head = [
            f"{metric.metric}{lower}, {config.split}, {size:,} samples",
            "mean",
            "± seeds",
            "95 % interval",
            "ensemble",
        ]
        rows = [head, *score_rows(metric, letters)]
        parts += [format_table(rows), format_table([DIFFERENCE_HEAD, *difference_rows(metric, letters)])]
    parts += [note for metric in metrics for note in conclusions(metric, letters)]
    parts.append(f"{format_table(starred(metrics, letters))}\n{STARS}")
    for letter, group in zip(letters[1:], groups[1:], strict=True):
        changed = changed_answers(groups[0], group, config.examples)
        if changed:
            before, after = (key for key in changed[0] if key not in ("index", "text"))
            rows = [[str(r["index"]), f"{r[before]:.2f}", f"{r[after]:.2f}", "  " + short(r["text"])] for r in changed]
            parts.append(
                format_table([["sample", before.split("_")[0] + " in A", f"in {letter}", ""], *left_last(rows)])
            )
    return "\n".join(line.rstrip() for line in "\n\n".join(parts).splitlines())


DIFFERENCE_HEAD = ["difference", "", "95 % interval", "p", "p, several", "test"]


def group_rows(groups: Sequence[Group], letters: Sequence[str]) -> list[list[str]]:
    rows = []
    for letter, group in zip(letters, groups, strict=True):
        seeds = ", ".join(str(run.settings["seed"]) for run in group.runs)
        rows.append([letter, f"{len(group.runs)} (seed {seeds})", group.name])
    return left_last(rows)


def score_rows(metric: MetricComparison, letters: Sequence[str]) -> list[list[str]]:
    return [[letter, *score_cells(score)] for letter, score in zip(letters, metric.groups, strict=True)]


def score_cells(score: GroupScore) -> list[str]:
    return [number(score.mean), number(score.deviation), interval(score.low, score.high), number(score.ensemble)]


def difference_rows(metric: MetricComparison, letters: Sequence[str]) -> list[list[str]]:
    rows = []
    for letter, found, adjusted in zip(letters[1:], metric.differences, metric.adjusted, strict=True):
        cells = [f"{found.value:+.4f}", interval(found.low, found.high, "+"), p_value(found.p), p_value(adjusted)]
        rows.append([f"{letter} - A", *cells, found.method])
    return rows


def conclusions(metric: MetricComparison, letters: Sequence[str]) -> list[str]:
    """A sentence for each difference: what may be said, and what this design could have found."""
    lower, lines = metric.metric in LOWER_IS_BETTER, []
    for letter, found, p in zip(letters[1:], metric.differences, metric.adjusted, strict=True):
        if significant(p):
            line = f"{metric.metric}: {letter} is {'better' if (found.value < 0) == lower else 'worse'} than A (p {p_value(p)})."
        else:
            line = f"{metric.metric}: no difference between {letter} and A is shown (p {p_value(p)})."
        if metric.metric == "accuracy" and found.detectable > 1:
            line += " So few seeds and samples cannot show any difference."
        elif not math.isnan(found.detectable) and found.detectable > 0:
            line += f" A true difference of {found.detectable:.4f} would be found in 80 % of such comparisons."
        if "one seed" in found.method:
            line += " With one seed each this holds for these two models, not for the recipes: train 3 to 5 seeds."
        lines.append(line)
    return lines


def starred(metrics: Sequence[MetricComparison], names: Sequence[str]) -> list[list[str]]:
    """The table of a paper: a row for each group, a column for each metric, and stars by the corrected p values."""
    rows = [["", *(metric.metric for metric in metrics)]]
    for place, name in enumerate(names):
        cells = []
        for metric in metrics:
            score, p = metric.groups[place], metric.adjusted[place - 1] if place else math.nan
            stars = "*" * sum(p < level for level in (0.05, 0.01, 0.001))  # none for NaN
            spread = "" if math.isnan(score.deviation) else f" ± {score.deviation:.4f}"
            cells.append(f"{score.mean:.4f}{spread}" + f" {stars}".rstrip())
        rows.append([name, *cells])
    return rows


def significant(p: float) -> bool:
    return not math.isnan(p) and p < LEVEL


def number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def interval(low: float, high: float, sign: str = "") -> str:
    return "" if math.isnan(low) else f"{low:{sign}.4f} to {high:{sign}.4f}"


def p_value(p: float) -> str:
    return "" if math.isnan(p) else "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def left_last(rows: list[list[str]]) -> list[list[str]]:
    """The rows with the last column padded, so that the table aligns it to the left."""
    width = max(len(row[-1]) for row in rows)
    return [[*row[:-1], row[-1].ljust(width)] for row in rows]


def short(text: str) -> str:
    """A JSON text on one line, cut."""
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 3]}..."


FILES = ("comparison.json", "comparison.md", "comparison.png")


def check_comparison_folder(folder: Path) -> None:
    """Raise UserError if a comparison in `folder` would replace files of somebody else."""
    found = [name for name in FILES if os.path.lexists(folder / name)]
    if found and not holds(folder / FILES[0], "groups", "metrics"):
        refuse(folder, found, "a comparison", "--output_dir")


def write_comparison(folder: Path, text: str, groups: Sequence[Group], metrics: Sequence[MetricComparison]) -> None:
    """Write comparison.md (the text), comparison.json (every number) and comparison.png to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"groups": [group_record(group) for group in groups], "metrics": [metric_record(m) for m in metrics]}
    write_atomically(folder / "comparison.json", json.dumps(finite(record), indent=2, ensure_ascii=False) + "\n")
    names = [f"{group.name}, {len(group.runs)} seed{'s'[: len(group.runs) > 1]}" for group in groups]
    head, *rows = [[cell.replace("|", "\\|").replace("*", "\\*") for cell in row] for row in starred(metrics, names)]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    table = "\n".join([*lines, "", STARS.replace("*", "\\*")])
    write_atomically(folder / "comparison.md", f"```\n{text}\n```\n\n{table}\n")
    families, _ = find_fonts(group.name for group in groups)
    with plain_text(families):
        draw_comparison(folder / "comparison.png", groups, metrics)


def group_record(group: Group) -> dict[str, Any]:
    return {"name": group.name, "runs": [str(run.folder) for run in group.runs], "settings": group.runs[0].settings}


def metric_record(metric: MetricComparison) -> dict[str, Any]:
    scores = [dataclasses.asdict(score) | {"mean": score.mean, "deviation": score.deviation} for score in metric.groups]
    pairs = zip(metric.differences, metric.adjusted, strict=True)
    found = [dataclasses.asdict(difference) | {"p_several": adjusted} for difference, adjusted in pairs]
    return {"metric": metric.metric, "scores": scores, "differences": found}


def draw_comparison(path: Path, groups: Sequence[Group], metrics: Sequence[MetricComparison]) -> None:
    """A row for each metric: left the seeds of each group, their mean and interval; right the differences to the baseline."""
    from matplotlib.figure import Figure  # takes seconds to import

    figure = Figure(figsize=(11, 1.2 + len(metrics) * (0.9 + 0.45 * len(groups))), layout="constrained")
    panels = figure.subplots(len(metrics), 2, squeeze=False)
    names = [f"{group.name}\n{len(group.runs)} seed{'s'[: len(group.runs) > 1]}" for group in groups]
    for (left, right), metric in zip(panels, metrics, strict=True):
        for place, score in enumerate(metric.groups):
            left.plot([score.low, score.high], [place, place], color="0.6", linewidth=2)
            left.plot(score.seeds, [place] * len(score.seeds), "o", color="C0", alpha=0.5, markersize=4)
            left.plot(score.mean, place, "D", color="C0")
        left.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5), title=metric.metric)
        for place, (found, p) in enumerate(zip(metric.differences, metric.adjusted, strict=True), 1):
            color = "C3" if significant(p) else "0.5"
            if not math.isnan(found.low):
                right.plot([found.low, found.high], [place, place], color=color, linewidth=2)
            right.plot(found.value, place, "D", color=color)
            right.annotate(
                f"p {p_value(p)}", (found.value, place), (0, 6), textcoords="offset points", ha="center", fontsize=8
            )
        right.axvline(0, color="0.3", linewidth=1, linestyle="--")
        right.set(yticks=[], ylim=(len(names) - 0.5, -0.5), title=f"{metric.metric}: difference to {groups[0].name}")
    with replacing(path) as file:
        figure.savefig(file, dpi=120)
