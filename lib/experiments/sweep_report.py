"""What came out of a sweep: a table, a picture, and both as numbers for other programs."""

import json
import re
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from lib.errors import printable
from lib.evaluation.fonts import drawable, find_fonts, plain_text
from lib.evaluation.scores import LOWER_IS_BETTER
from lib.evaluation.tables import format_table
from lib.experiments.sweep import PlannedRun, Sweep
from lib.runtime.atomic import finite, replacing, write_atomically
from lib.runtime.screen import json_line

SIZES = "max_train_samples"
"""A grid over it is a learning curve."""
MOST_CURVES = 12
BASELINES = "baselines/"
"""What simple methods score, in results.json of a run: `baselines/{method}/{metric}`."""


def write_report(sweep: Sweep) -> str:
    """Write runs.jsonl, results.json, table.md and curves.png of what is known so far; returns what is to be printed.

    The last line is results.json.
    """
    records = [describe(sweep, run) for run in sweep.runs]
    groups = group_records(sweep, records)
    results: dict[str, Any] = {"metric": f"eval/{sweep.metric}", "runs": len(records)}
    results |= {
        status: sum(r["status"] == status for r in records) for status in ("finished", "paused", "failed", "missing")
    }
    ranked = rank(groups, sweep.metric)
    results |= {"best": ranked[0]["settings"] if ranked else None, "recipes": groups}
    curve = learning_curve(groups)
    if curve is not None:
        results["learning_curve"] = curve
    text = format_sweep(sweep, ranked, curve, records)
    lines = "".join(json.dumps(finite(record), ensure_ascii=False) + "\n" for record in records)
    write_atomically(sweep.folder / "runs.jsonl", lines)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    write_atomically(sweep.folder / "table.md", f"{fence}\n{text}\n{fence}\n")
    write_atomically(sweep.folder / "results.json", json.dumps(finite(results), indent=2, ensure_ascii=False) + "\n")
    draw_curves(sweep, ranked, curve)
    notes = [
        printable(f"{record['run']} failed: {record['error']}") for record in records if record["status"] == "failed"
    ]
    where = f"written to {printable(str(sweep.folder))}: table.md, results.json, runs.jsonl, curves.png"
    short = {key: value for key, value in results.items() if key != "recipes"}
    if curve is not None:
        short["learning_curve"] = {key: value for key, value in curve.items() if key != "fit"}
    return "\n".join([text, "", *notes, where, json_line(finite(short))])


def describe(sweep: Sweep, run: PlannedRun) -> dict[str, Any]:
    """One run as a line of runs.jsonl: its settings, how far it is, and its scores."""
    results, score = run.results(), run.score(sweep.metric)
    record: dict[str, Any] = {
        "run": run.folder.name,
        "folder": str(run.folder),
        "settings": dict(run.recipe.varied),
        "seed": run.seed,
        **({"fold": run.fold} if run.fold else {}),
        "status": "finished" if results else "failed" if run in sweep.failed else "paused" if run.step() else "missing",
        "step": results.get("steps", 0) if results else run.step(),
        f"eval/{sweep.metric}": score,
    }
    if results:
        kept = ("test/", BASELINES, "run/data_fingerprint", "run/device", "run/mixed_precision")
        record |= {key: value for key, value in results.items() if key.startswith(kept)}
        record["train_seconds"] = results.get("train_seconds")
    return record | ({"error": sweep.failed[run]} if run in sweep.failed else {})


def group_records(sweep: Sweep, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs by recipe and stage, with mean and standard deviation of their scores over the seeds."""
    groups = []
    for stage, score_test in (("trials", False), ("finalists", True)) if sweep.config.chooses else (("runs", True),):
        for recipe in sweep.recipes:
            pairs = zip(sweep.runs, records, strict=True)
            members = [record for run, record in pairs if run.recipe == recipe and run.score_test == score_test]
            if members:
                done = [record for record in members if record["status"] == "finished" or stage == "trials"]
                columns = [
                    f"eval/{sweep.metric}",
                    *(key for key in dict.fromkeys(k for r in done for k in r) if key.startswith(("test/", BASELINES))),
                ]
                groups.append(
                    {"stage": stage, "settings": dict(recipe.varied), "seeds": [record["seed"] for record in done]}
                    | {
                        "folders": [record["folder"] for record in done],
                        "step": max((r["step"] for r in done), default=0),
                    }
                    | {
                        column: spread([r[column] for r in done if isinstance(r.get(column), int | float)])
                        for column in columns
                    }
                )
    return groups


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation, and how many values there are."""
    if not values:
        return {"mean": None, "deviation": None, "n": 0}
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "n": len(values)}


def rank(groups: Sequence[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """The groups, the best by validation first: finalists before trials, and trials that went further before paused ones."""
    sign, key = (1 if metric in LOWER_IS_BETTER else -1), f"eval/{metric}"
    known = [group for group in groups if group[key]["n"]]
    later = {"finalists": 0, "runs": 0, "trials": 1}
    return sorted(
        known,
        key=lambda group: (
            later[group["stage"]],
            -group["step"] * (group["stage"] == "trials"),
            sign * group[key]["mean"],
        ),
    )


def format_sweep(
    sweep: Sweep,
    ranked: Sequence[dict[str, Any]],
    curve: dict[str, Any] | None,
    records: Sequence[dict[str, Any]] = (),
) -> str:
    """The tables: a row for each recipe, the best first, and simple methods; then each seed of the best recipe."""
    shown, chooses = f"eval/{sweep.metric}", sweep.config.chooses is not None
    tests = list(
        dict.fromkeys(key for group in ranked for key in group if key.startswith("test/") and key != "test/loss")
    )
    rows = [[*(["stage"] if chooses else []), "recipe", "runs", "steps", shown, *tests]]
    for group in ranked:
        recipe = printable(recipe_name(group))
        cells = [cell(group.get(key)) for key in (shown, *tests)]
        rows.append(
            [*([group["stage"]] if chooses else []), recipe, str(len(group["seeds"])), str(group["step"]), *cells]
        )
    best = ranked[0] if ranked else {}
    for method, scores in baselines_of(best).items():
        split = "test" if tests else "eval"
        cells = [
            plain_cell(scores.get(key.removeprefix(f"{split}/")) if key.startswith(split) else None)
            for key in (shown, *tests)
        ]
        rows.append([*([""] if chooses else []), printable(method), "", "", *cells])
    lines = [format_table(rows), "mean ± standard deviation over the seeds; the best by validation first"]
    shown_of = [shown_baselines(group) for group in ranked if group["stage"] == best["stage"]]  # of one split
    if any(shown and shown != shown_of[0] for shown in shown_of):
        lines.append(
            f"simple methods on the data of {printable(recipe_name(best))}; those of other recipes: results.json"
        )
    members = [record for record in records if record["folder"] in best.get("folders", ())]
    if len(members) > 1:
        by_run = [["run", shown, *tests]]
        for record in members:
            label = f"seed {record['seed']}" + (f", fold {record['fold']}" if "fold" in record else "")
            by_run.append([label, *(score_cell(record.get(key)) for key in (shown, *tests))])
        lines += ["", f"runs of {printable(recipe_name(best))}", format_table(by_run)]
    devices = dict.fromkeys(
        f"{record['run/device']}, precision {record['run/mixed_precision']}"
        for record in records
        if "run/device" in record
    )
    lines += [printable("; ".join(devices))] if devices else []
    if curve is not None:
        lines.append(curve["sentence"])
    return "\n".join(lines)


def baselines_of(group: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The scores of simple methods in a group, by method and metric."""
    found: dict[str, dict[str, Any]] = {}
    for key, score in group.items():
        if key.startswith(BASELINES):
            method, _, metric = key.removeprefix(BASELINES).rpartition("/")
            found.setdefault(method, {})[metric] = score
    return found


def shown_baselines(group: dict[str, Any]) -> dict[str, str]:
    """The scores of simple methods in a group as they are shown, whatever the number of its seeds."""
    return {key: plain_cell(score) for key, score in group.items() if key.startswith(BASELINES)}


def score_cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def recipe_name(group: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in group["settings"].items()) or "as given"


def cell(score: dict[str, Any] | None) -> str:
    if score is None or not score["n"]:
        return ""
    return f"{score['mean']:.4f}" + (f" ± {score['deviation']:.4f}" if score["deviation"] is not None else "")


def plain_cell(score: dict[str, Any] | None) -> str:
    """A score of a simple method, which is the same for all seeds unless they learn from other data."""
    return cell(score | {"deviation": score["deviation"] or None}) if score else ""


def learning_curve(groups: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """How the score grows with the training data: `score = a - b * n ** -c`, fitted to means of three or more sizes.

    None for a sweep that varies something else. The form is that of Cortes et al. (1993).
    """
    from scipy.optimize import curve_fit

    points = [(int(group["settings"][SIZES]), group) for group in groups if list(group["settings"]) == [SIZES]]
    metric = next((key for _, group in points for key in group if key.startswith("eval/")), "")
    known = sorted((size, group[metric]["mean"]) for size, group in points if group[metric]["n"])
    lower = metric.removeprefix("eval/") in LOWER_IS_BETTER
    if len(known) < 3:
        return None
    sizes, scores = (np.array(column, dtype=np.float64) for column in zip(*known, strict=True))
    signed = -scores if lower else scores

    def power_law(n: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
        return a - b * (n / sizes[0]) ** -c

    try:
        start = (signed.max(), max(float(np.ptp(signed)), 1e-3), 0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # equal scores leave the form of the curve open
            found, _ = curve_fit(
                power_law, sizes, signed, p0=start, bounds=([-np.inf, 0, 0.01], [np.inf, np.inf, 2]), maxfev=20_000
            )
    except RuntimeError:
        return None
    sign, twice = (-1 if lower else 1), 2 * sizes[-1]
    expected = sign * float(power_law(np.array([twice]), *found)[0])
    name = metric.removeprefix("eval/")
    sentence = (
        f"{int(sizes[-1]):,} training samples give a validation {name} of {scores[-1]:.4f}; "
        f"twice as many would give about {expected:.4f} (a power law through {len(sizes)} sizes)"
    )
    grid = np.geomspace(sizes[0], twice, 60)
    return {
        "sizes": sizes.astype(int).tolist(),
        "scores": scores.tolist(),
        "expected_at_twice": expected,
        "fit": [grid.tolist(), (sign * power_law(grid, *found)).tolist()],
        "sentence": sentence,
    }


def draw_curves(sweep: Sweep, ranked: Sequence[dict[str, Any]], curve: dict[str, Any] | None) -> None:
    """Save curves.png: the validation score over the steps, a line for each run, a color for each of the best recipes."""
    from matplotlib.figure import Figure

    families, missing = find_fonts(map(printable, [sweep.folder.name, *map(str, sweep.recipes)]))

    def shown(text: str) -> str:
        return drawable(printable(text), missing)

    with plain_text(families):
        figure = Figure(figsize=(13 if curve else 8, 5), layout="constrained")
        panels = figure.subplots(1, 2 if curve else 1, squeeze=False)[0]
        names = list(dict.fromkeys(map(recipe_name, ranked)))
        for run in sweep.runs:
            values = run.evaluations(sweep.metric)
            name = str(run.recipe)
            if values and name in names[:MOST_CURVES]:
                place = names.index(name)
                panels[0].plot(
                    *zip(*values, strict=True),
                    marker=".",
                    color=f"C{place % 10}",
                    alpha=0.8,
                    label=name,
                    linestyle="-" if place < 10 else "--",
                )
        handles, labels = panels[0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        order = [name for name in names if name in unique]
        if order:
            panels[0].legend([unique[name] for name in order], list(map(shown, order)), fontsize="small")
        more = f" (the best {MOST_CURVES} of {len(names)} recipes)" if len(names) > MOST_CURVES else ""
        panels[0].set(xlabel="step", ylabel=f"validation {sweep.metric}", title=f"{shown(sweep.folder.name)}{more}")
        if curve:
            panels[1].plot(curve["sizes"], curve["scores"], "o", label="mean of the seeds")
            panels[1].plot(*curve["fit"], label="power law")
            panels[1].axvline(2 * curve["sizes"][-1], color="gray", linestyle=":", label="twice the data")
            panels[1].set(xscale="log", xlabel="training samples", ylabel=f"validation {sweep.metric}")
            sizes = [*curve["sizes"], 2 * curve["sizes"][-1]]
            panels[1].set_xticks(sizes, [f"{size:,}" for size in sizes])
            panels[1].set_xticks([], minor=True)
            reached = [*curve["scores"], curve["expected_at_twice"]]
            low, high = min(reached), max(reached)
            panels[1].set_ylim(low - 0.1 * (high - low) - 0.005, high + 0.1 * (high - low) + 0.005)
            panels[1].legend()
        with replacing(sweep.folder / "curves.png") as file:
            figure.savefig(file, dpi=120)
