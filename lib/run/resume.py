"""The output folder, the checkpoint to resume from, and what a resumed run promises."""

import json
import re
from pathlib import Path
from typing import Any

from lib.config.cli import dump_config, load_config
from lib.config.sections import flatten
from lib.config.train import TrainConfig, TrainingConfig
from lib.data.load import Data
from lib.errors import UserError, one_message
from lib.model.source import model_identity
from lib.run.best_model import BEST, KIND
from lib.run.checkpoint import INGREDIENTS, find_best_of, list_checkpoints, read_record, remove_checkpoints
from lib.run.ownership import CONFIG, HEARTBEATS, MODEL, RESULTS, RUN_FILES, check_run_folder, is_cut_config
from lib.run.record import IDENTITY, LENGTH, compare_settings, read_identity
from lib.run.tracking import read_log
from lib.runtime.atomic import MANIFEST, explain, find_damage, is_ours, remove_drafts, write_atomically, write_manifest
from lib.runtime.lock import FolderLock


def open_folder(config: TrainConfig, folder: Path) -> FolderLock:
    """Create the folder of a run, lock it, and save the configuration there; the lock ends with the process.

    Raises UserError if another process has the folder, if something in the way is not of a run, or if it holds a run with
    other settings, and lists them, unless `--allow_changes` is given.
    """
    lock = FolderLock(folder)
    check_settings(config, folder)  # before the lock too, which leaves a file
    try:
        lock.take()
        check_settings(config, folder)
        check_run_folder(config, folder)
        write_atomically(folder / CONFIG, dump_config(config))
        # Of an earlier run that was given up: with it the folder would look finished.
        (folder / RESULTS).unlink(missing_ok=True)
        clean_up(folder)
    except OSError as error:
        lock.release()
        raise UserError(f"--output_dir {folder} cannot be written: {explain(error, folder)}") from error
    except UserError:
        lock.release()
        raise
    return lock


def clean_up(folder: Path) -> None:
    """Remove what a killed run left, and give a model that an earlier version saved the manifest it lacks.

    The folder must be known as that of a run, and locked.
    """
    remove_drafts(folder, RUN_FILES)
    for path in (folder / HEARTBEATS).glob("*"):
        if re.fullmatch(r"\.?\d+", path.name):
            path.unlink(missing_ok=True)
    if (folder / MODEL).is_dir() and not is_ours(folder / MODEL):
        write_manifest(folder / MODEL, KIND)


def check_settings(config: TrainConfig, folder: Path) -> None:
    """Raise UserError if the folder holds a run with other settings, unless `--allow_changes` is given."""
    saved = folder / "config.yaml"
    if not saved.exists() or config.training.allow_changes or is_cut_config(config, saved):
        return
    before, now = flatten(load_config(TrainConfig, saved)), flatten(config)
    # With the files of the model only where settings changed: another place of the same model is no change.
    changed = compare_settings(before, now)
    changed = changed and compare_settings(before | read_identity(folder), now | identity_of(config))
    if changed:
        lines = "\n".join(changed)
        raise UserError(
            f"{folder} holds a run with other settings:\n{lines}\nChoose another --output_dir or --run_name, or "
            "continue with the new settings: --allow_changes."
        )


def find_results(config: TrainConfig, folder: Path, data: Data) -> dict[str, Any] | None:
    """The results of the finished run in the folder; None if there is none, or if it is to be trained again or for longer.

    A run is finished when it has its results and its model; it needs no checkpoint for that. Raises UserError if it has
    other settings or data, or began from another model: `--allow_changes` cannot change what was trained, only go on for
    longer.
    """
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        before = flatten(load_config(TrainConfig, folder / "config.yaml"))
    except (OSError, ValueError):
        return None
    has_model = any((folder / "model" / name).is_file() for name in ("config.json", "adapter_config.json"))
    if not has_model or config.training.resume_from_checkpoint not in ("auto", "must"):
        return None
    check_settings(config, folder)
    before, now, key = before | read_identity(folder), flatten(config) | identity_of(config), "run/data_fingerprint"
    if key in results:
        before, now = before | {key: results[key]}, now | {key: data.fingerprint()}
    changed = compare_settings(before, now)
    if not changed:
        return results
    longer, lines = is_longer(before, now), "\n".join(changed)
    if longer and config.training.allow_changes and list_checkpoints(folder / "checkpoints"):
        return None
    why = "there is no checkpoint to go on from" if longer else "its results and model belong to them"
    raise UserError(
        f"{folder} holds a finished run with other settings, and {why}:\n{lines}\nChoose another --output_dir or --run_name "
        f"(to train on from its model: --model {folder}/model), or delete the folder."
    )


def identity_of(config: TrainConfig) -> dict[str, Any]:
    """What the result depends on in the files of the model, as in the settings of a run."""
    return {key: value for name, value in model_identity(config.model).items() if (key := f"run/{name}") in IDENTITY}


def is_longer(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether the settings differ in the length of training only, and it is longer now."""
    if compare_settings(before, now | {name: before[name] for name in LENGTH}):
        return False
    if before["max_steps"] is None and now["max_steps"] is None:
        return now["num_train_epochs"] > before["num_train_epochs"]
    return None not in (before["max_steps"], now["max_steps"]) and now["max_steps"] > before["max_steps"]


def choose_checkpoint(config: TrainingConfig, folder: Path, settings: dict[str, Any]) -> Path | None:
    """The checkpoint to resume from, or None; prints the decision. Only the main process calls this.

    Raises UserError if the checkpoint that was asked for is damaged, missing, or of another experiment.
    """
    chosen = find_checkpoint(config.resume_from_checkpoint, folder / "checkpoints")
    if chosen is not None:
        record = read_record(chosen)
        changed = compare_settings(record["settings"], settings)
        if changed and not config.allow_changes:
            raise UserError(
                f"{chosen} belongs to another experiment:\n" + "\n".join(changed) + "\nChoose another "
                "--output_dir or --run_name, or continue with the new settings: --allow_changes."
            )
        step = record["state"]["step"]
        promise = describe_promise(record["settings"], settings, changed, describe_lost(folder, record["state"]))
        if record["state"]["best_scores"] and find_best_of(chosen, folder)[0] is None:
            promise = "training continues, but its best model is lost"
        print(one_message(f"resumed from {chosen}, step {step}: {promise}"), flush=True)
    return chosen


def find_checkpoint(wanted: str, checkpoints: Path) -> Path | None:
    """The newest valid checkpoint for `auto`, `must`, `never` or a path; damaged ones are named and skipped.

    Its best model may be damaged, and weights that are to be averaged: that costs these, not the training.
    `never` removes all checkpoints, so that no later start resumes from them. Raises UserError if `must` or a path finds
    none.
    """
    if wanted == "never":
        remove_checkpoints(checkpoints)
        return None
    if wanted not in ("auto", "must"):
        path = Path(wanted)
        if (path / MANIFEST).exists() or not (path / "checkpoints").is_dir():
            damage = find_damage(path, leaving_out=(f"{BEST}/", f"{INGREDIENTS}/"))
            if damage:
                raise UserError(f"--resume_from_checkpoint {wanted}: no valid checkpoint there: {damage}")
            return path
        checkpoints = path / "checkpoints"
    for path in list_checkpoints(checkpoints):
        damage = find_damage(path, leaving_out=(f"{BEST}/", f"{INGREDIENTS}/"))
        if damage is None:
            return path
        print(one_message(f"warning: {path} is damaged and is not used: {damage}"), flush=True)
    if wanted != "auto":
        raise UserError(f"--resume_from_checkpoint {wanted}: no valid checkpoint in {checkpoints}")
    return None


def describe_lost(folder: Path, state: dict[str, Any]) -> str:
    """How many steps metrics.jsonl lacks of those logged up to the checkpoint with this state; empty if it lacks none."""
    logged, step = state.get("logged", 0), state["step"] - state["pending"]
    lost = logged - len({line["step"] for line in read_log(folder / "metrics.jsonl") if line["step"] <= step})
    return f"metrics.jsonl lacks {lost:,} of the {logged:,} steps logged up to step {step:,}" if lost > 0 else ""


def describe_promise(before: dict[str, Any], now: dict[str, Any], changed: list[str], lost: str = "") -> str:
    """What a run promises that resumes under `now` what was trained under `before`, and what its log has `lost`."""
    if changed:
        return "with other settings, so the result belongs to neither:\n" + "\n".join(changed)
    keys = [
        "run/num_processes",
        "run/sharding",
        "per_device_train_batch_size",
        "pad_to_max_length",
        "cpu_kernels",
        "run/mixed_precision",
        "run/devices",
        "run/git_commit",
    ]
    keys += [key for key in now if key.startswith("run/version_")]
    before, now = flatten(TrainConfig()) | before, flatten(TrainConfig()) | json.loads(json.dumps(now))
    other = [f"{k.removeprefix('run/')} {before.get(k)} -> {now.get(k)}" for k in keys if before.get(k) != now.get(k)]
    if other:
        promise = "same samples and schedule; numbers may differ by rounding and dropout: " + ", ".join(other)
    elif lost:
        promise = "the same weights, samples and schedule from here on"
    elif [key for key in IDENTITY if key in now and key not in before]:
        promise = (
            "continues as if it had never stopped, bit by bit, if the files of --model are as they were (an earlier version "
            "did not record them)"
        )
    else:
        promise = "continues as if it had never stopped, bit by bit"
    return f"{promise}; but {lost}" if lost else promise
