"""Predictions for every training row by models that did not see it, and the labels that they contradict."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.config.sections import CLASSIFICATION
from lib.data.load import Data, assign_folds
from lib.errors import UserError, require
from lib.experiments.groups import load_predictions, majority
from lib.experiments.sweep import PlannedRun, Sweep
from lib.runtime.atomic import write_atomically

NAME, SUSPECTS = "out_of_fold.jsonl", "suspects.jsonl"


def write_out_of_fold(sweep: Sweep) -> list[str]:
    """Collect the predictions of the folds in out_of_fold.jsonl, and the labels they contradict in suspects.jsonl.

    Probabilities are the means over the seeds. Returns what is to be said; nothing before all runs are finished. Suspects are
    those of cleanlab (Northcutt, Jiang and Chuang, 2021), which must be installed; for classes only.
    """
    runs, total = sweep.runs, sweep.config.folds
    if total is None or any(run.results() is None for run in runs):
        return []
    data = sweep.read_data(sweep.recipes[0].config(0))
    rows = collect(runs, data, total)
    write_lines(sweep.folder / NAME, rows)
    said = [f"{sweep.folder / NAME}: {len(rows):,} training rows, each predicted by models that did not see it"]
    if data.problem_type != CLASSIFICATION:
        return said
    try:
        suspects = find_suspects(rows, data.label_names)
    except ImportError:
        return [*said, "for a list of suspect labels: pip install cleanlab, then the same command"]
    write_lines(sweep.folder / SUSPECTS, suspects)
    return [*said, f"{sweep.folder / SUSPECTS}: {len(suspects):,} labels that are probably wrong, the worst first"]


def collect(runs: Sequence[PlannedRun], data: Data, total: int) -> list[dict[str, Any]]:
    """A row for each training sample, in their order. Raises UserError if the runs were not trained on these data."""
    folds = assign_folds(data.labels("train"), data.problem_type, total)
    rows: list[list[dict[str, Any]]] = [[] for _ in folds]
    for run in runs:
        places = np.flatnonzero(folds == int(str(run.fold).partition("/")[0]) - 1)
        path = run.folder / "eval-test" / "predictions.jsonl"
        load_predictions(path)  # says which line is damaged
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        require(
            len(lines) == len(places),
            f"{run.folder} was trained on other data; delete the folder, and start the sweep again",
        )
        for place, line in zip(places, lines, strict=True):
            rows[place].append(line)
    return [merge(place, int(fold) + 1, found) for place, (fold, found) in enumerate(zip(folds, rows, strict=True))]


def merge(place: int, fold: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    """One row from the predictions of the seeds: the mean of numbers, and the class of the largest mean probability.

    For two classes, and each label of several, the `majority` of their answers, which hold their tuned thresholds.
    """
    first = found[0]
    if any((line["text"], line["gold"]) != (first["text"], first["gold"]) for line in found):
        raise UserError(
            f"the runs of fold {fold} have other texts in row {place}; delete their folders, and start again"
        )
    row = {"row": place, "fold": fold, "text": first["text"], "gold": first["gold"]}
    if "probabilities" not in first:
        return row | {"predicted": float(np.mean([line["predicted"] for line in found]))}
    means = {
        name: round(float(np.mean([line["probabilities"].get(name, 0.0) for line in found])), 6)
        for name in first["probabilities"]
    }
    answers, names = [line["predicted"] for line in found], list(means)
    predicted: Any = answers[0]
    if isinstance(first["gold"], list):
        known = dict.fromkeys([*names, *(name for answer in answers for name in answer)])
        votes = {name: sum(name in answer for answer in answers) for name in known}
        predicted = [name for name in known if majority(votes[name], means.get(name, 0.0), len(found))]
    elif len(names) == 2:
        predicted = names[majority(answers.count(names[1]), means[names[1]], len(found))]
    elif len(found) > 1:
        predicted = max(means, key=lambda name: means[name])
    return row | {"predicted": predicted, "probabilities": means}


def find_suspects(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows whose label is probably wrong, the least likely first, each with the quality of its label from 0 to 1."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    place = {name: number for number, name in enumerate(names)}
    labels = np.array([place[row["gold"]] for row in rows])
    probabilities = np.zeros((len(rows), len(names)))
    for row, known in zip(rows, probabilities, strict=True):
        known[[place[name] for name in row["probabilities"]]] = list(row["probabilities"].values())
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    quality = get_label_quality_scores(labels, probabilities)
    found = np.flatnonzero(find_label_issues(labels, probabilities, n_jobs=1))
    order = found[np.argsort(quality[found], kind="stable")]
    return [rows[number] | {"label_quality": round(float(quality[number]), 6)} for number in order]


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
