"""Which checkpoint a run goes on from, whether it may, and what is then promised."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from lib.config.sections import UserError, flatten
from lib.config.train import TrainConfig, TrainingConfig
from lib.run.checkpoint import list_checkpoints, read_record
from lib.runtime.atomic import MANIFEST, find_damage

HARMLESS = {
    *("output_dir", "run_name", "report_to", "project", "tags", "notes", "logging_steps"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "pad_to_max_length"),
    *("dataloader_num_workers", "preprocessing_num_workers"),
    *("hub_endpoint", "hub_timeout", "verify_hashes", "send_token_to_mirror"),
    *("no_cache_features", "feature_cache_gib"),
    *("save_steps", "save_total_limit", "resume_from_checkpoint", "allow_changes", "max_minutes", "ddp_timeout"),
}
"""Settings that do not change what is computed, so that a run may go on with others."""

LENGTH = {"num_train_epochs", "max_steps"}


def experiment(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that the result depends on, as JSON gives them back."""
    names = {"run/data_fingerprint", "run/label_names", "run/batches_sorted_together"}
    chosen = {k: v for k, v in settings.items() if (k in names) or (k not in HARMLESS and not k.startswith("run/"))}
    return json.loads(json.dumps(chosen))


def experiment_hash(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(experiment(settings), sort_keys=True).encode()).hexdigest()[:16]


def compare_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each setting that changes the experiment; one that came after `before` was at its default then."""
    before, now = experiment(flatten(TrainConfig()) | before), experiment(now)
    keys = [key for key in now if before.get(key) != now[key]]
    lines = [f"  {key.removeprefix('run/')}: {before.get(key)} there, {now[key]} now" for key in keys]
    if LENGTH & set(keys):
        lines.append("  (another length changes the learning rate of every step, also of those already made)")
    return lines


def choose_checkpoint(
    accelerator: Accelerator, config: TrainingConfig, folder: Path, settings: dict[str, Any]
) -> Path | None:
    """The checkpoint to resume from, the same on every process; what was decided is printed by the first.

    Raises UserError when the one asked for is damaged or missing, or belongs to another experiment.
    """
    chosen: list[Path | None] = [None]
    if accelerator.is_main_process:
        chosen = [find_checkpoint(config.resume_from_checkpoint, folder / "checkpoints")]
        if chosen[0] is not None:
            record = read_record(chosen[0])
            changed = compare_settings(record["settings"], settings)
            if changed and not config.allow_changes:
                raise UserError(
                    f"{chosen[0]} belongs to another experiment:\n" + "\n".join(changed) + "\nChoose another "
                    "--output_dir or --run_name, or go on with the new settings by --allow_changes."
                )
            step = record["state"]["step"]
            promise = describe_promise(record["settings"], settings, changed)
            print(f"resumed from {chosen[0]}, step {step}: {promise}", flush=True)
    return broadcast_object_list(chosen)[0]


def find_checkpoint(wanted: str, checkpoints: Path) -> Path | None:
    """`auto`, `must`, `never` or a path to the newest checkpoint that is whole; damaged ones are named and passed over.

    With `never` the checkpoints of the run before are removed, so that nothing goes on from them later.
    Raises UserError when there is none under `must`, or when the path holds none.
    """
    if wanted == "never":
        shutil.rmtree(checkpoints, ignore_errors=True)
        return None
    if wanted not in ("auto", "must"):
        path = Path(wanted)
        if (path / MANIFEST).exists() or not (path / "checkpoints").is_dir():
            damage = find_damage(path)
            if damage:
                raise UserError(f"--resume_from_checkpoint {wanted}: no valid checkpoint there: {damage}")
            return path
        checkpoints = path / "checkpoints"
    for path in list_checkpoints(checkpoints):
        damage = find_damage(path)
        if damage is None:
            return path
        print(f"warning: {path} is damaged and is not used: {damage}", flush=True)
    if wanted != "auto":
        raise UserError(f"--resume_from_checkpoint {wanted}: no valid checkpoint in {checkpoints}")
    return None


def describe_promise(before: dict[str, Any], now: dict[str, Any], changed: list[str]) -> str:
    """What still holds between the two parts of a resumed run."""
    if changed:
        return "with other settings, so that the result is that of neither:\n" + "\n".join(changed)
    keys = [
        "run/num_processes",
        "per_device_train_batch_size",
        "pad_to_max_length",
        "run/mixed_precision",
        "run/devices",
        "run/git_commit",
    ]
    keys += [key for key in now if key.startswith("run/version_")]
    now = json.loads(json.dumps(now))
    other = [f"{k.removeprefix('run/')} {before.get(k)} -> {now.get(k)}" for k in keys if before.get(k) != now.get(k)]
    if not other:
        return "goes on as if it had never stopped, bit by bit"
    return "same samples and schedule; numbers may differ by rounding and dropout: " + ", ".join(other)
