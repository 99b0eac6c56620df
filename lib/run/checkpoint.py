"""Checkpoints to resume from, published atomically.

    OUTPUT_DIR/checkpoints/step-40/    manifest.json  state.json  optimizer.pt  model.safetensors  best/  ingredients/

A checkpoint is complete: `best` is the best model at that step, `ingredients` the weights of earlier evaluations that
`--average_checkpoints` keeps. These, and the frozen parameters in frozen.safetensors, are written once by a process, and
hard-linked into its later checkpoints.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.config.train import TrainingConfig
from lib.errors import UserError
from lib.model.sharding import whole_weights
from lib.model.weights import FROZEN, WEIGHTS, frozen_names, load_weights, save_weights
from lib.run.best_model import BEST, best_files, copy_model, find_best
from lib.runtime.atomic import (
    MANIFEST,
    WRITE_ERRORS,
    Entries,
    copy_files,
    drafting,
    explain,
    find_difference,
    is_ours,
    link_file,
    listed_files,
    publish_folder,
    remove_drafts,
    remove_folder,
    write_atomically,
    write_manifest,
)
from lib.runtime.memory import StartAgain
from lib.runtime.processes import any_process
from lib.runtime.watchdog import beat
from lib.training.learner import Learner
from lib.training.optimizer import restore_optimizer, whole_state
from lib.training.state import State

NAME = re.compile(r"step-(\d+)(-pending)?")
"""The folder of a checkpoint; `pending` means saved between a step and its logging, evaluation and saving."""
INGREDIENTS = "ingredients"
"""The folder in a checkpoint with the weights that are averaged at the end; those of its own step are its own."""
CONTENTS = {MANIFEST, FROZEN, WEIGHTS, BEST, INGREDIENTS, "state.json", "optimizer.pt"}
"""What a checkpoint holds; frozen.safetensors, best and ingredients are not always there."""

MEMORY = "memory"
"""The folder of a run with the notes of processes that ran out of memory where they could tell no other."""

LEARNED_UNDER = {
    "micro_batch_positions": ("per_device_train_batch_size", "no_cache_features", "feature_cache_gib"),
    "eval_batch_size": ("per_device_eval_batch_size",),
    "eval_positions": ("per_device_eval_batch_size",),
}
"""Sizes of the state that fit in memory, and the settings they were learned under: on cached features of a backbone a
sample has one position, else it has one for each token."""


@dataclasses.dataclass
class Checkpointer:
    """Saves and restores a learner; `settings` are the settings of the run, compared when it resumes.

    `last` is the last checkpoint that this process wrote, `last_best` the step of the best model in it. Only its files
    are hard-linked, so that damage to files of an earlier process does not spread. `kept` has the weights that are to be
    averaged by their step: the checkpoint that holds them, which was written or loaded last, and their name there.
    """

    folder: Path
    config: TrainingConfig
    settings: dict[str, Any]
    learner: Learner
    last: Path | None = None
    last_best: int = 0
    kept: dict[int, tuple[Path, str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place = identity(self.folder)

    def check_folder(self) -> None:
        """Raise UserError if the folder of the run is no longer the one it was: it was deleted, or renamed."""
        if identity(self.folder) != self.place:
            raise UserError(
                f"{self.folder} is gone: it was deleted or renamed while the run was using it, and nothing more is saved. "
                "If it was renamed, give it back its name, and run the same command again: it resumes from the last checkpoint"
            )

    def save(self, run_id: str | None) -> None:
        """Publish a checkpoint of this step, then delete old ones; every process must call this.

        `run_id` is the id of the tracker's run. Raises UserError on every process if the weights are not finite or the
        disk is full; earlier checkpoints stay as they are.
        """
        accelerator, state = self.learner.accelerator, self.learner.state
        beat(f"checkpoint of step {state.step}")
        sums = self.learner.meter.state()
        optimizer = whole_state(self.learner.optimizer)
        problem = ""
        with whole_weights(self.learner.inner_model):
            if accelerator.is_main_process:
                try:
                    self.check_folder()
                    self.write({"state": dataclasses.asdict(state), "interval": sums, "run_id": run_id}, optimizer)
                except (*WRITE_ERRORS, UserError) as error:
                    problem = f"the checkpoint of step {state.step} could not be saved: {explain(error, self.folder)}"
        if any_process(accelerator, bool(problem)):
            raise UserError(problem or "the first process could not save a checkpoint")

    def write(self, record: dict[str, Any], optimizer: dict[str, Any]) -> None:
        """Publish a checkpoint whose state.json holds `record`, on the main process, where the weights are whole."""
        learner, model = self.learner, self.learner.inner_model
        state, scaler = learner.state, learner.accelerator.scaler
        checkpoints = self.folder / "checkpoints"
        name = f"step-{state.step}" + ("-pending" if state.pending else "")
        check_finite(model)
        checkpoints.mkdir(exist_ok=True)
        target = checkpoints / name
        tensors = {"optimizer": optimizer, "scheduler": learner.scheduler.state_dict()}
        if scaler is not None:
            tensors["scaler"] = scaler.state_dict()
        with drafting(target) as fresh:
            if self.last is not None:
                link_file(self.last / FROZEN, fresh / FROZEN)
            check_space(fresh, model)
            save_weights(model, fresh)
            with (fresh / "optimizer.pt").open("wb") as file:  # by its path, errors of the disk would lose their cause
                torch.save(tensors, file)
            text = json.dumps(record | {"settings": self.settings}, indent=2)
            (fresh / "state.json").write_text(text + "\n", encoding="utf-8")
            best = self.keep_best(fresh / BEST) if state.best_scores else {}
            known = {f"{BEST}/{name}": entry for name, entry in best.items()} | self.keep_ingredients(fresh)
            write_manifest(fresh, manifest_head(state, self.settings), self.last, known)
            if os.path.lexists(target) and not is_ours(target):
                remove_checkpoint(target)
            publish_folder(fresh, target)
        self.last, self.last_best = target, state.best_step
        self.kept = {step: (target, name) for step, name in ingredient_names(state).items()}
        rotate(checkpoints, state.step, self.config.save_total_limit)

    def keep_best(self, folder: Path) -> Entries:
        """Put the best model into the new `folder`, and restore model/ if it is gone; returns its files.

        Raises UserError if no undamaged copy is left: a checkpoint is not published without its best model.
        """
        model, step = self.folder / "model", self.learner.state.best_step
        if self.last is not None and self.last_best == step and (files := best_files(self.last)):
            with contextlib.suppress(FileNotFoundError):  # deleted by somebody: another copy is looked for below
                copy_files(self.last / BEST, folder, files, link=True)
                if not model.exists() and find_best(files, [folder]):
                    copy_model(folder, files, model)
                    print(f"warning: {model} was gone; it was restored from {self.last}", flush=True)
                return files
        files = listed_files(model)
        for place in [model, *best_folders(self.folder)] if files else []:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                copy_files(place, folder, files)
                if find_difference(folder, files) is None:
                    return files
        damage = find_difference(model, files) if files else "the folder or its manifest is gone"
        raise UserError(
            f"the best model, of step {step}, is damaged: {model}: {damage}; no checkpoint has a copy of it, and none is "
            "saved without it. The same command resumes from the checkpoint before"
        )

    def keep_ingredients(self, folder: Path) -> Entries:
        """Put the weights of earlier evaluations that are to be averaged into the new checkpoint; returns their files.

        What is gone is left out: `find_ingredients` says so at the end. What is damaged stays so by its entry.
        """
        entries: Entries = {}
        for step, name in ingredient_names(self.learner.state).items():
            checkpoint, before = self.kept.get(step, (folder, name))
            entry = listed_files(checkpoint).get(before)
            if name == WEIGHTS or entry is None:
                continue
            (folder / INGREDIENTS).mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # deleted by somebody
                if checkpoint != self.last or not link_file(checkpoint / before, folder / name):
                    shutil.copyfile(checkpoint / before, folder / name)
                entries[name] = entry
        return entries

    def find_ingredients(self) -> dict[int, Path]:
        """The weights to average by their step, the best first; those that are gone or damaged are named and left out."""
        found = {}
        for item in self.learner.state.ingredients:
            checkpoint, name = self.kept.get(item["step"], (self.folder, ""))
            entry = listed_files(checkpoint).get(name)
            damage = find_difference(checkpoint, {name: entry}) if entry else "they are gone"
            if damage is None:
                found[item["step"]] = checkpoint / name
            else:
                print(f"warning: the weights of step {item['step']} are not averaged: {damage}", flush=True)
        return found

    def load(self, checkpoint: Path) -> str | None:
        """Restore everything from a valid checkpoint; returns the id of the tracker's run. Every process must call this.

        Hyper-parameters stay those of the settings. If its best model is damaged, an undamaged copy of it is taken; if
        there is none, the next evaluation makes a new one. Raises UserError if there will be none.
        """
        learner, accelerator = self.learner, self.learner.accelerator
        record = read_record(checkpoint)
        with whole_weights(learner.inner_model, change=True):
            load_weights(learner.inner_model, checkpoint)
        self.last, self.last_best = None, 0  # other parameters may be frozen there
        tensors = torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu")
        restore_optimizer(learner.optimizer, learner.scheduler, tensors["optimizer"], tensors["scheduler"])
        if accelerator.scaler is not None and "scaler" in tensors:
            accelerator.scaler.load_state_dict(tensors["scaler"])
        for name, value in record["state"].items():
            if self.still_holds(name, record["settings"]):
                setattr(learner.state, name, value)
        if not self.config.average_checkpoints:
            learner.state.ingredients = []
        self.kept = {step: (checkpoint, name) for step, name in ingredient_names(learner.state).items()}
        learner.meter.restore(record["interval"])
        lost = problem = ""
        if accelerator.is_main_process:
            try:
                lost = self.restore_best(checkpoint)
            except (*WRITE_ERRORS, UserError) as error:
                problem = (
                    f"the best model could not be restored to {self.folder / 'model'}: {explain(error, self.folder)}"
                )
        if any_process(accelerator, bool(problem)):
            raise UserError(problem or "the first process could not restore the best model")
        if any_process(accelerator, bool(lost)):
            if learner.plan.is_finished(learner.state):
                raise UserError(
                    f"{lost or 'the best model is lost'}, and training is over, so that no evaluation would make another. Train "
                    "on from an older checkpoint: --resume_from_checkpoint FOLDER; or again: --resume_from_checkpoint never"
                )
            learner.state.forget_best()
            if accelerator.is_main_process:
                print(
                    f"warning: {lost}. Training goes on from step {learner.state.step}; the best model is chosen among the "
                    "evaluations from here on, so that the result may differ from that of an uninterrupted run",
                    flush=True,
                )
        return record["run_id"]

    def still_holds(self, name: str, settings: dict[str, Any]) -> bool:
        """Whether a part of the state from a run with `settings` is that of this run.

        A size learned from an out-of-memory error holds until the user sets another one.
        """
        return all(settings.get(setting) == self.settings.get(setting) for setting in LEARNED_UNDER.get(name, ()))

    def note_smaller(self, error: BaseException) -> None:
        """Have the next start use the smaller size of `error`, a StartAgain; other errors leave no note.

        The process that ran out of memory calls this, and waits for no other.
        """
        if isinstance(error, StartAgain):
            depends = {name: self.settings.get(name) for name in LEARNED_UNDER[error.name]}
            note = {"state": {error.name: error.value}, "settings": depends}
            file = self.folder / MEMORY / f"{self.learner.accelerator.process_index}-{error.name}.json"
            try:
                write_atomically(file, json.dumps(note) + "\n")
            except WRITE_ERRORS as failure:
                print(
                    f"warning: the next start does not know of it and runs out of memory again, unless a smaller "
                    f"--{LEARNED_UNDER[error.name][0]} is set: {explain(failure, file)}",
                    file=sys.stderr,
                    flush=True,
                )

    def read_smaller(self) -> dict[str, int]:
        """The smallest sizes that earlier starts noted; notes that other settings made, or that are damaged, do not count."""
        found: dict[str, int] = {}
        for file in sorted((self.folder / MEMORY).glob("*.json")):
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
                note = json.loads(file.read_text(encoding="utf-8"))
                for name, value in note["state"].items():
                    if name in LEARNED_UNDER and self.still_holds(name, note["settings"]):
                        found[name] = min(int(value), found.get(name, int(value)))
        return found

    def use_smaller(self, sizes: dict[str, int]) -> None:
        """Use noted sizes where they are smaller than those of the state."""
        for name, value in sizes.items():
            known = getattr(self.learner.state, name)
            setattr(self.learner.state, name, value if known is None else min(value, known))

    def restore_best(self, checkpoint: Path) -> str:
        """Make the best model of a checkpoint that of the run; returns what is wrong, in words, if all copies are damaged."""
        model, state = self.folder / "model", self.learner.state
        if not state.best_scores:
            return ""
        place, damage = find_best_of(checkpoint, self.folder)
        if place is None:
            return f"the best model so far, of step {state.best_step}, is lost: {checkpoint / BEST}: {damage}"
        if damage:
            print(
                f"warning: the best model in {checkpoint / BEST} is damaged, and that in {place} is used: {damage}",
                flush=True,
            )
        copy_model(place, best_files(checkpoint), model)
        return ""


def ingredient_names(state: State) -> dict[int, str]:
    """The names, in a checkpoint of this state, of the weights that are to be averaged, by their step."""
    steps = [item["step"] for item in state.ingredients]
    return {step: WEIGHTS if step == state.step else f"{INGREDIENTS}/step-{step}.safetensors" for step in steps}


def best_folders(folder: Path) -> list[Path]:
    """The folders in the checkpoints of a run that may hold a best model, the newest first."""
    return [checkpoint / BEST for checkpoint in list_checkpoints(folder / "checkpoints")]


def find_best_of(checkpoint: Path, folder: Path) -> tuple[Path | None, str | None]:
    """Where the best model of a checkpoint is undamaged, in it or in the folder of the run; and what is wrong with its own."""
    files = best_files(checkpoint)
    damage = find_difference(checkpoint / BEST, files) if files else "there is none"
    if damage is None:
        return checkpoint / BEST, None
    return find_best(files, [folder / "model", *best_folders(folder)]), damage


def identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another one of the same name; None if there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


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


def read_best_steps(checkpoints: Path) -> Iterator[tuple[Path, int]]:
    """The checkpoints, newest first, each with the step of its best model; one that cannot be read is left out."""
    for checkpoint in list_checkpoints(checkpoints):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            yield checkpoint, int(read_record(checkpoint)["state"]["best_step"])


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Checkpoint folders by name, newest first; other files are ignored."""
    found = [(match, path) for path in checkpoints.glob("*") if (match := NAME.fullmatch(path.name)) and path.is_dir()]
    # At the same step, the one after the evaluation is newer.
    found.sort(key=lambda item: (int(item[0][1]), item[0][2] is None), reverse=True)
    return [path for _, path in found]


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder was written as a checkpoint; it may be damaged, or half deleted."""
    return is_ours(folder) or (not folder.is_symlink() and {path.name for path in folder.iterdir()} <= CONTENTS)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, also one that lost its manifest; what is none stays."""
    if not remove_folder(folder) and is_checkpoint(folder):
        shutil.rmtree(folder, ignore_errors=True)


def remove_checkpoints(checkpoints: Path, keep: Sequence[Path] = ()) -> None:
    """Remove all checkpoints but `keep`, and what is left of saves that were killed; the folder too, if nothing remains."""
    for path in set(list_checkpoints(checkpoints)) - set(keep):
        remove_checkpoint(path)
    remove_drafts(checkpoints)
    with contextlib.suppress(OSError):
        checkpoints.rmdir()


def rotate(checkpoints: Path, step: int, limit: int) -> None:
    """Keep the newest `limit` checkpoints up to `step`, at least one; later ones are of an abandoned continuation."""
    paths = [path for path in list_checkpoints(checkpoints) if is_checkpoint(path)]
    past = [path for path in paths if int(NAME.fullmatch(path.name)[1]) <= step]  # type: ignore[index]
    remove_checkpoints(checkpoints, keep=past[: max(limit, 1)])


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
