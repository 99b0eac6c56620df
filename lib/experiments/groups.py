"""Finished runs, read from disk and grouped by recipe: equal settings, different seeds."""

import dataclasses
import glob
import itertools
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.config.cli import load_config
from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION, flatten
from lib.config.train import TrainConfig
from lib.errors import UserError, printable, require
from lib.run.record import IDENTITY, PLACES, experiment, has_identity, read_identity, recipe
from lib.run.tracking import read_object

SHOWN = 4
"""How many differing settings a group's name lists."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a run predicted for each sample of a split, in the order of its file.

    `gold` and `predicted` are class numbers int64 (samples,), numbers float64 (samples,), or 0 and 1 int64
    (samples, labels); `probabilities` float64 (samples, outputs), None for numbers.
    """

    problem_type: str
    names: tuple[str, ...]
    texts: tuple[Any, ...]
    gold: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """The folder, settings, results.json and predictions of a run."""

    folder: Path
    settings: dict[str, Any]
    results: dict[str, Any]
    scored: Scored

    @property
    def recipe(self) -> str:
        """Everything the result depends on but the seed and the data."""
        return json.dumps({key: value for key, value in recipe(self.settings).items() if key != "seed"}, sort_keys=True)


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one recipe, in the order of their seeds."""

    name: str
    runs: tuple[FinishedRun, ...]

    @property
    def scored(self) -> list[Scored]:
        return [run.scored for run in self.runs]


def load_groups(arguments: Sequence[str], split: str) -> list[Group]:
    """The groups of the runs that the arguments name, the baseline first, each named by what differs from it.

    Raises UserError if fewer than two groups are left, a run is not finished, has no predictions of the split, or was
    scored on other samples or labels than the baseline.
    """
    folders = list(dict.fromkeys(folder for argument in arguments for folder in find_runs(argument)))
    runs = [load_run(folder, split) for folder in folders]
    for run in runs[1:]:
        check_same_samples(runs[0], run, split)
    if not all(
        has_identity(run.settings) for run in runs
    ):  # some are of an earlier version: nothing is known of theirs
        runs = [
            dataclasses.replace(run, settings={k: v for k, v in run.settings.items() if k not in IDENTITY})
            for run in runs
        ]
    by_recipe: dict[str, list[FinishedRun]] = {}
    for run in runs:
        by_recipe.setdefault(run.recipe, []).append(run)
    require(
        len(by_recipe) > 1,
        f"{', '.join(arguments)}: {len(runs)} run{'s'[: len(runs) > 1]} of one recipe; "
        "give runs whose settings differ in more than the seed",
    )
    groups = []
    for alike in by_recipe.values():
        alike.sort(key=lambda run: run.settings["seed"])
        check_seeds(alike)
        groups.append(Group(differences(runs[0].settings, alike[0].settings) or "baseline", tuple(alike)))
    return groups


def find_runs(argument: str) -> list[Path]:
    """The folders of runs that an argument names: one, all within a folder, or all that match a pattern."""
    paths = [Path(argument)] if Path(argument).is_dir() else [Path(path) for path in sorted(glob.glob(argument))]
    found = []
    for path in paths:
        if (path / "sweep.yaml").is_file():
            found += runs_of_sweep(path)
            continue
        inside = sorted(config.parent for config in path.glob("*/config.yaml"))
        found += [path] if (path / "config.yaml").is_file() else inside
    require(bool(found), f"{argument}: no folder of a run there (one with config.yaml)")
    return found


def runs_of_sweep(folder: Path) -> list[Path]:
    """The finished runs of a sweep but those that were only compared on validation. Raises UserError if there is none."""
    path, found = folder / "runs.jsonl", []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), 1):
        try:
            record = json.loads(line)
            if record["status"] == "finished" and any(key.startswith("test/") for key in record):
                found.append(Path(record["folder"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"{path}: line {number} is not of a sweep, or torn; start its sweep.py command again"
            ) from None
    require(bool(found), f"{folder}: no run of this sweep was scored on test yet; start its sweep.py command again")
    return found


def load_run(folder: Path, split: str) -> FinishedRun:
    """Read a finished run. Raises UserError, with the command to type, if its results or predictions are missing."""
    results = folder / "results.json"
    require(results.is_file(), f"{folder} is not finished: results.json is missing; start its train.py command again")
    predictions = folder / f"eval-{split}" / "predictions.jsonl"
    if not predictions.is_file():
        raise UserError(
            f"{folder} has no predictions of the {split} split ({predictions}); "
            f"make them with: accelerate launch eval.py --run {shlex.quote(str(folder))} --split {shlex.quote(split)}, or "
            "compare another --split"
        )
    found = read_object(results)
    require(bool(found), f"{results} is damaged: it holds no JSON object; train it again")
    settings = experiment(flatten(load_config(TrainConfig, folder / "config.yaml")) | read_identity(folder))
    return FinishedRun(folder, settings, found, load_predictions(predictions))


def majority(votes: Any, probability: Any, seeds: int) -> Any:
    """Whether an answer that has `votes` of so many seeds is that of all: more than half, or half and, on average, probable.

    The answers of the seeds hold their tuned thresholds, which a mean of probabilities does not. Of one seed it is the
    answer. Numbers, or arrays of them.
    """
    return 2 * votes + (probability >= 0.5) > seeds


def load_predictions(path: Path) -> Scored:
    """Read predictions.jsonl. Raises UserError with the line that is damaged."""
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
                rows[-1]["gold"], rows[-1]["predicted"], rows[-1]["text"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}: line {number} is damaged; score the run again with eval.py") from None
    require(bool(rows), f"{path} is empty; score the run again with eval.py")
    texts, first = tuple(json.dumps(row["text"]) for row in rows), rows[0]
    if "probabilities" not in first:
        gold, predicted = (np.array([row[key] for row in rows], dtype=np.float64) for key in ("gold", "predicted"))
        return Scored(REGRESSION, (), texts, gold, predicted, None)
    names = output_names(path.with_name("report.json")) or tuple(first["probabilities"])
    place = {name: number for number, name in enumerate(names)}
    multi_label = isinstance(first["gold"], list)
    # Of many classes only the largest probabilities are written; the others are about 0, and unknown for a ranking.
    probabilities = np.full((len(rows), len(names)), np.nan if multi_label else 0.0)
    for row, known in zip(rows, probabilities, strict=True):
        known[[place[name] for name in row["probabilities"]]] = np.array(
            [*row["probabilities"].values()], dtype=np.float64
        )
    if multi_label:
        gold, predicted = (
            np.array([[int(name in row[key]) for name in names] for row in rows]) for key in ("gold", "predicted")
        )
        return Scored(MULTI_LABEL, names, texts, gold, predicted, probabilities)
    gold, predicted = (np.array([place[row[key]] for row in rows]) for key in ("gold", "predicted"))
    return Scored(CLASSIFICATION, names, texts, gold, predicted, probabilities)


def output_names(report: Path) -> tuple[str, ...]:
    """The names of all classes or labels in a report.json; empty if there is no such file."""
    if not report.is_file():
        return ()
    tables = read_object(report)
    require(bool(tables), f"{report} is damaged: it holds no JSON object; score the run again with eval.py")
    return tuple(
        row[key] for key, table in (("class", "classes"), ("label", "labels")) for row in tables.get(table, [])
    )


def check_same_samples(baseline: FinishedRun, run: FinishedRun, split: str) -> None:
    """Raise UserError unless both runs were scored on the same texts, in the same order, with the same labels."""
    a, b = baseline.scored, run.scored
    where = f"{run.folder} and {baseline.folder} cannot be compared on {split}"
    kinds = a.problem_type == b.problem_type and a.names == b.names
    require(
        kinds,
        f"{where}: their labels differ ({', '.join(b.names) or b.problem_type} and {', '.join(a.names) or a.problem_type})",
    )
    require(len(a.texts) == len(b.texts), f"{where}: {len(b.texts):,} and {len(a.texts):,} samples")
    texts = next((i for i, pair in enumerate(zip(a.texts, b.texts, strict=True), 1) if pair[0] != pair[1]), None)
    require(texts is None, f"{where}: sample {texts} has another text")
    other = np.flatnonzero((a.gold != b.gold).reshape(len(a.texts), -1).any(axis=1))
    require(
        not len(other), f"{where}: {len(other):,} samples have another gold label, the first is sample {other[:1] + 1}"
    )


def check_seeds(runs: Sequence[FinishedRun]) -> None:
    """Raise UserError for one seed twice, and for runs of one recipe whose data differ."""
    first = runs[0]
    for before, run in itertools.pairwise(runs):
        require(
            before.settings["seed"] != run.settings["seed"],
            f"{before.folder} and {run.folder} are one recipe with one seed ({run.settings['seed']}); leave one of them out",
        )
        key = "run/data_fingerprint"
        same = run.results.get(key) == first.results.get(key)
        require(same, f"{first.folder} and {run.folder} have equal settings, but their training data differ")


def differences(baseline: dict[str, Any], other: dict[str, Any]) -> str:
    """The settings of `other` that differ from the baseline's, but the seed: `learning_rate 1e-05, freeze backbone`."""
    keys = changed_keys(baseline, other)
    shown = [f"{key.removeprefix('run/')} {shown_value(other[key], baseline.get(key))}" for key in keys[:SHOWN]]
    return ", ".join([*shown, *([f"{len(keys) - SHOWN} more"] if len(keys) > SHOWN else [])])


def changed_keys(baseline: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The settings that differ, but the seed."""
    keys = [key for key in other if key != "seed" and other[key] != baseline.get(key)]
    if PLACES & {*keys}:  # the name of a model says enough, unless its files are the same
        same = has_identity(other) and not {*IDENTITY} & {*keys}
        keys = [key for key in keys if key not in (PLACES if same else IDENTITY)]
    return keys


def differing_settings(groups: Sequence[Group]) -> list[list[str]]:
    """A row for each setting in which a group differs from the first: its name, and its value in each group."""
    first, *others = [group.runs[0].settings for group in groups]
    keys = dict.fromkeys(key for other in others for key in changed_keys(first, other))
    rows = []
    for key in keys:
        unlike = next(other.get(key) for other in others if other.get(key) != first.get(key))
        cells = [
            shown_value(first.get(key), unlike),
            *(shown_value(other.get(key), first.get(key)) for other in others),
        ]
        rows.append([key.removeprefix("run/"), *cells])
    return rows


def shown_value(value: Any, before: Any) -> str:
    """A setting in the name of a group; of settings and hashes of files those that differ from the ones `before`."""
    if isinstance(value, dict):
        changed = {
            name: item for name, item in value.items() if not isinstance(before, dict) or before.get(name) != item
        }
        return " ".join(f"{name} {shown_value(item, None)}" for name, item in changed.items())
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return printable(re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1", text))
