"""Whose an output folder is: what a run or a report would write there must not belong to somebody else."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from lib.config.cli import dump_config, is_saved_config
from lib.config.train import TrainConfig
from lib.errors import UserError
from lib.evaluation.report import FILE_NAMES
from lib.run.checkpoint import MEMORY, is_checkpoint, list_checkpoints
from lib.runtime.atomic import is_ours
from lib.runtime.lock import NAME as LOCK

CONFIG, RECORD, RESULTS = "config.yaml", "record.json", "results.json"
RUN_FILES = (CONFIG, RECORD, RESULTS, "metrics.jsonl", "tracker.json", "learning_curves.png")
"""The files of a run. By each of the first two a folder is known as that of a run."""
MODEL, CHECKPOINTS, HEARTBEATS, _ = RUN_FOLDERS = ("model", "checkpoints", "heartbeats", MEMORY)


def check_run_folder(config: TrainConfig, folder: Path) -> None:
    """Raise UserError if a run in `folder` would replace, change or remove what is not of a run; writes nothing.

    A folder with files of others is fine as long as none has the name of a file or folder of a run.
    """
    foreign = list(in_the_way(config, folder)) if folder.is_dir() else []
    place = folder.resolve()
    if place in (Path(place.anchor), Path(os.path.expanduser("~")).resolve()) and not is_run_folder(folder):
        foreign.append("everything that such a folder is for")
    refuse(folder, foreign, "a run", "--output_dir or --run_name")


def check_report_folder(folder: Path) -> None:
    """Raise UserError if a report of eval.py in `folder` would replace what is not of a report; writes nothing."""
    refuse(folder, list(foreign_reports(folder)), "a report", "--output_dir")


def is_evaluation(path: Path) -> bool:
    """Whether a results.json is that of eval.py, not of a run or of somebody else."""
    return holds(path, "model", "dataset", "samples") and not holds(path, "best_step")


def refuse(folder: Path, foreign: list[str], what: str, flags: str) -> None:
    """Raise UserError for what is in the way, if anything is."""
    if foreign:
        listed = "".join(f"\n  {item}" for item in foreign)
        raise UserError(
            f"{folder} holds what is not of {what} of this program, and would be replaced:{listed}\n"
            f"Nothing was changed. Choose another {flags}, such as --output_dir {folder / 'new'}, or move these away."
        )


def is_run_folder(folder: Path) -> bool:
    """Whether `folder` has the configuration or the record of a run."""
    return is_saved_config(folder / CONFIG) or holds(folder / RECORD, "run_name", "num_processes")


def in_the_way(config: TrainConfig, folder: Path) -> Iterator[str]:
    """What has the name of a part of a run and is none, in words."""
    known = is_run_folder(folder)
    for name in (*RUN_FILES, *RUN_FOLDERS):
        path = folder / name
        if not os.path.lexists(path) or (name == CONFIG and is_cut_config(config, path)):
            continue
        if not known and name == CHECKPOINTS and path.is_dir() and all(map(is_ours, path.iterdir())):
            continue  # copied here from another folder, to go on from them
        if not known:
            yield f"{name}: {kind(path)}, in a folder that has no {CONFIG} of a run"
        elif name == CONFIG and not is_saved_config(path):
            yield f"{name}: it does not hold the options of a run"
        elif name in RUN_FILES and not path.is_file():
            yield f"{name}: {kind(path)} instead of a file"
        elif name in RUN_FOLDERS and (not path.is_dir() or (name == MODEL and path.is_symlink())):
            yield f"{name}: {kind(path)} instead of a folder"
        elif name == MODEL and not (is_ours(path) or is_older_model(path)):
            yield f"{name}: a folder without the manifest of a saved model"
        elif name == CHECKPOINTS:
            foreign = [step.name for step in list_checkpoints(path) if not is_checkpoint(step)]
            yield from (f"{name}/{step}: a folder without the manifest of a checkpoint" for step in foreign)
    if (lock := describe_lock(folder)) is not None:
        yield lock
    for report in sorted(folder.glob("eval-*")):
        if report.is_dir():
            yield from (f"{report.name}/{item}" for item in foreign_reports(report))


def foreign_reports(folder: Path) -> Iterator[str]:
    """What has the name of a part of a report and is none, in words."""
    tests = {"report.json": is_report, "predictions.jsonl": are_predictions}
    known = any(test(folder / name) for name, test in tests.items())
    tests[RESULTS] = is_evaluation
    for name in (*FILE_NAMES, RESULTS):
        path = folder / name
        if os.path.lexists(path):
            test = tests.get(name, lambda path: known and path.is_file())
            if not (test(path) or is_empty(path)):
                yield f"{name}: {kind(path)}, not written by an evaluation"
    if folder.is_dir() and (lock := describe_lock(folder)) is not None:
        yield lock


def is_report(path: Path) -> bool:
    return holds(path, "split", "samples", "scores")


def are_predictions(path: Path) -> bool:
    """Whether a file begins as predictions.jsonl does; it may be cut."""
    try:
        with path.open("rb") as file:
            return file.read(12) == b'{"index": 0,'
    except OSError:
        return False


def is_older_model(folder: Path) -> bool:
    """Whether `folder` may be the model that an earlier version, which wrote no manifest, left in the folder of a run."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def is_cut_config(config: TrainConfig, path: Path) -> bool:
    """Whether a file is the beginning of the configuration of this run: a full disk left it so, also empty."""
    try:
        return path.is_file() and dump_config(config).encode().startswith(path.read_bytes())
    except OSError:
        return False


def is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def describe_lock(folder: Path) -> str | None:
    """The file `.lock` in words if it is not the lock of a run."""
    path = folder / LOCK
    try:
        if path.read_bytes()[:7] in (b"", b'{"pid":'):  # a process that takes or leaves it may be writing
            return None
    except FileNotFoundError:
        return None
    except OSError:
        pass
    return f"{LOCK}: {kind(path)}, not the lock of a run"


def holds(path: Path, *keys: str) -> bool:
    """Whether a file is a JSON object with these keys."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and all(key in content for key in keys)


def kind(path: Path) -> str:
    if path.is_symlink():
        return f"a link to {os.readlink(path)}"
    return "a folder" if path.is_dir() else "a file"
