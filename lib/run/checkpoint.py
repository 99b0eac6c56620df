"""Checkpoints to resume from, published atomically.

    OUTPUT_DIR/checkpoints/step-40/    manifest.json  state.json  optimizer.pt  model.safetensors  best/

A checkpoint is complete: `best` is the best model at that step, as hard links. Frozen parameters are in
frozen.safetensors, which a process writes once and hard-links into its later checkpoints.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.config.train import TrainingConfig
from lib.errors import UserError
from lib.model.weights import FROZEN, frozen_names, load_weights, save_weights
from lib.runtime.atomic import WRITE_ERRORS, explain, link_file, link_tree, publish_folder, write_manifest
from lib.runtime.processes import any_process
from lib.runtime.watchdog import beat
from lib.training.learner import Learner
from lib.training.optimizer import restore_optimizer
from lib.training.state import State

NAME = re.compile(r"step-(\d+)(-pending)?")
"""The folder of a checkpoint; `pending` means saved between a step and its logging, evaluation and saving."""


@dataclasses.dataclass
class Checkpointer:
    """Saves and restores a learner; `settings` are the settings of the run, compared when it resumes.

    `last` is the last checkpoint that this process wrote. Only its files are hard-linked, so that damage to files of an
    earlier process does not spread.
    """

    folder: Path
    config: TrainingConfig
    settings: dict[str, Any]
    learner: Learner
    last: Path | None = None

    def save(self, run_id: str | None) -> None:
        """Publish a checkpoint of this step, then delete old ones; every process must call this.

        `run_id` is the id of the tracker's run. Raises UserError on every process if the weights are not finite or the
        disk is full; earlier checkpoints stay as they are.
        """
        accelerator, state = self.learner.accelerator, self.learner.state
        beat(f"checkpoint of step {state.step}")
        sums = self.learner.meter.state()
        problem = ""
        if accelerator.is_main_process:
            try:
                self.write({"state": dataclasses.asdict(state), "interval": sums, "run_id": run_id})
            except (*WRITE_ERRORS, UserError) as error:
                problem = f"the checkpoint of step {state.step} could not be saved: {explain(error, self.folder)}"
        if any_process(accelerator, bool(problem)):
            raise UserError(problem or "the first process could not save a checkpoint")

    def write(self, record: dict[str, Any]) -> None:
        """Publish a checkpoint whose state.json holds `record`, on the main process."""
        learner, model = self.learner, self.learner.inner_model
        state, scaler = learner.state, learner.accelerator.scaler
        checkpoints = self.folder / "checkpoints"
        name = f"step-{state.step}" + ("-pending" if state.pending else "")
        check_finite(model)
        checkpoints.mkdir(exist_ok=True)
        fresh = checkpoints / f".tmp-{name}"
        shutil.rmtree(fresh, ignore_errors=True)
        tensors = {"optimizer": learner.optimizer.state_dict(), "scheduler": learner.scheduler.state_dict()}
        if scaler is not None:
            tensors["scaler"] = scaler.state_dict()
        try:
            fresh.mkdir()
            if self.last is not None:
                link_file(self.last / FROZEN, fresh / FROZEN)
            check_space(fresh, model)
            save_weights(model, fresh)
            torch.save(tensors, fresh / "optimizer.pt")
            text = json.dumps(record | {"settings": self.settings}, indent=2)
            (fresh / "state.json").write_text(text + "\n", encoding="utf-8")
            if state.best_scores:
                link_tree(self.folder / "model", fresh / "best")
            write_manifest(fresh, manifest_head(state, self.settings), self.last)
            publish_folder(fresh, checkpoints / name)
        except (*WRITE_ERRORS, UserError):
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        self.last = checkpoints / name
        rotate(checkpoints, state.step, self.config.save_total_limit)

    def load(self, checkpoint: Path) -> str | None:
        """Restore everything from a valid checkpoint; returns the id of the tracker's run. Every process must call this.

        Hyper-parameters stay those of the settings.
        """
        learner, accelerator = self.learner, self.learner.accelerator
        record = read_record(checkpoint)
        load_weights(learner.inner_model, checkpoint)
        self.last = None  # other parameters may be frozen there
        tensors = torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu")
        restore_optimizer(learner.optimizer, learner.scheduler, tensors["optimizer"], tensors["scheduler"])
        if accelerator.scaler is not None and "scaler" in tensors:
            accelerator.scaler.load_state_dict(tensors["scaler"])
        kept = {"micro_batch_size": "per_device_train_batch_size", "eval_batch_size": "per_device_eval_batch_size"}
        for name, value in record["state"].items():
            # A size learned from an out-of-memory error holds until the user sets another one.
            if name not in kept or record["settings"][kept[name]] == self.settings[kept[name]]:
                setattr(learner.state, name, value)
        learner.meter.restore(record["interval"])
        if accelerator.is_main_process and (checkpoint / "best").is_dir():
            fresh = self.folder / ".tmp-model"
            shutil.rmtree(fresh, ignore_errors=True)
            link_tree(checkpoint / "best", fresh)
            publish_folder(fresh, self.folder / "model")
        accelerator.wait_for_everyone()
        return record["run_id"]


def manifest_head(state: State, settings: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of a checkpoint besides its files, for people and other programs."""
    versions = {key.removeprefix("run/version_"): value for key, value in settings.items() if "run/version_" in key}
    return {
        "format": 1,
        "step": state.step,
        "samples_seen": state.samples_seen,
        "world_size": settings.get("run/num_processes"),
        "data_fingerprint": settings.get("run/data_fingerprint"),
        "experiment": settings.get("run/experiment"),
        "versions": versions,
    }


def read_record(checkpoint: Path) -> dict[str, Any]:
    """The content of state.json."""
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Checkpoint folders by name, newest first; other files are ignored."""
    found = [(match, path) for path in checkpoints.glob("*") if (match := NAME.fullmatch(path.name)) and path.is_dir()]
    # At the same step, the one after the evaluation is newer.
    found.sort(key=lambda item: (int(item[0][1]), item[0][2] is None), reverse=True)
    return [path for _, path in found]


def rotate(checkpoints: Path, step: int, limit: int) -> None:
    """Keep the newest `limit` checkpoints up to `step`, at least one; later ones are of an abandoned continuation."""
    paths = list_checkpoints(checkpoints)
    keep = [path for path in paths if int(NAME.fullmatch(path.name)[1]) <= step][: max(limit, 1)]  # type: ignore[index]
    for path in {*paths, *checkpoints.glob(".tmp-*"), *checkpoints.glob(".old-*")} - set(keep):
        shutil.rmtree(path, ignore_errors=True)


def check_finite(model: nn.Module) -> None:
    """Raise UserError if a trained weight is not finite."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise UserError(f"{name} holds numbers that are not finite; try a lower --learning_rate")


def check_space(folder: Path, model: nn.Module) -> None:
    """Raise UserError unless the disk has room for the missing weights and AdamW's two moments."""
    frozen = set() if (folder / FROZEN).exists() else frozen_names(model)
    needed = 2**20 + sum(
        p.nbytes * 3 if p.requires_grad else p.nbytes * (name in frozen) for name, p in model.named_parameters()
    )
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"it needs {needed / 2**20:,.0f} MiB and {folder.parent} has {free / 2**20:,.0f} MiB free; make room, "
            "then run the same command again: it resumes from the previous checkpoint"
        )
