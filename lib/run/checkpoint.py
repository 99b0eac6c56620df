"""Checkpoints to resume from, published atomically.

    OUTPUT_DIR/checkpoints/step-40/    manifest.json  state.json  optimizer.pt  model.safetensors  best/  ingredients/
                                       or, of a large model in shards, model.shards/ and optimizer.shards/ by all processes

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

from lib.config.train import TrainingConfig
from lib.errors import UserError, first_line, printable
from lib.model.sharding import whole_weights
from lib.model.stored_tensors import StoredTensors, carry_over, is_saved_in_parts, parts_of, stored_at, stored_files
from lib.model.weights import FROZEN, WEIGHTS, load_weights
from lib.run.best_model import BEST, best_files, copy_model, find_best
from lib.run.snapshot import OPTIMIZER, Snapshot, snapshot_phase, take_snapshot, write_held, write_tensors
from lib.runtime.atomic import (
    MANIFEST,
    WRITE_ERRORS,
    Entries,
    copy_files,
    drafting,
    explain,
    find_difference,
    is_ours,
    link_or_copy,
    listed_files,
    publish_folder,
    remove_drafts,
    remove_folder,
    write_atomically,
    write_manifest,
)
from lib.runtime.background import POLL_SECONDS, Background, wait_everywhere
from lib.runtime.memory import StartAgain
from lib.runtime.processes import any_process, has_lost_another, on_first, together
from lib.runtime.watchdog import beat
from lib.training.learner import Learner
from lib.training.optimizer import restore_optimizer, state_in_parts, whole_state
from lib.training.state import State

NAME = re.compile(r"step-(\d+)(-pending)?")
"""The folder of a checkpoint; `pending` means saved between a step and its logging, evaluation and saving."""
INGREDIENTS = "ingredients"
"""The folder in a checkpoint with the weights that are averaged at the end; those of its own step are its own."""
TENSORS = {FROZEN, WEIGHTS, OPTIMIZER}
CONTENTS = {MANIFEST, BEST, INGREDIENTS, "state.json", *TENSORS, *(parts_of(Path(name)).name for name in TENSORS)}
"""What a checkpoint holds: frozen.safetensors, best, ingredients, and folders of parts are not always there."""

WAITING = "waiting for the checkpoint that is being written"

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

    `last` is the last checkpoint that this process published, `last_best` the step of the best model in it. Only its files
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
    background: Background = dataclasses.field(default_factory=Background)

    def __post_init__(self) -> None:
        self.place = identity(self.folder)

    def check_folder(self) -> None:
        """Raise UserError if the folder of the run is no longer the one it was: it was deleted, or renamed."""
        if identity(self.folder) != self.place:
            raise UserError(
                f"{self.folder} is gone: it was deleted or renamed while the run was using it, and nothing more is saved. "
                "If it was renamed, give it back its name, and run the same command again: it resumes from the last checkpoint"
            )

    @property
    def in_background(self) -> bool:
        """Whether checkpoints are written while training goes on."""
        asked = self.config.async_save
        return self.learner.accelerator.device.type != "cpu" if asked is None else asked

    @property
    def has_failed(self) -> bool:
        """Whether a checkpoint could not be written in the background: `wait` raises why."""
        return self.background.error is not None

    def save(self, run_id: str | None) -> None:
        """Publish a checkpoint of this step, then delete old ones; every process must call this.

        `run_id` is the id of the tracker's run. Raises UserError on every process if the weights are not finite or the
        disk is full; earlier checkpoints stay as they are. A thread writes it. `in_background`, this returns when the step
        is copied: the checkpoint is there, and errors of the disk are raised, after `wait`. One that is still being written
        is waited for.
        """
        self.wait()
        learner, state = self.learner, self.learner.state
        beat(snapshot_phase(state))
        record = {"interval": learner.meter.state(), "run_id": run_id, "settings": self.settings}
        if is_saved_in_parts(learner.inner_model):
            self.save_in_parts(record)
        else:
            self.save_whole(record)
        if not self.in_background:
            self.wait()

    def save_whole(self, record: dict[str, Any]) -> None:
        """Have the main process write a checkpoint; the others help to gather it."""
        learner, state = self.learner, self.learner.state
        optimizer = whole_state(learner.optimizer)
        problem = None
        with whole_weights(learner.inner_model):
            if learner.accelerator.is_main_process:
                try:
                    with self.in_words(state.step):
                        self.begin(record, optimizer)
                except UserError as error:
                    problem = error
        self.raise_everywhere(problem)

    def begin(self, record: dict[str, Any], optimizer: dict[str, Any]) -> None:
        """Have a thread of the main process write a checkpoint: of a copy, where training is to go on."""
        step, target = self.learner.state.step, self.target
        with contextlib.ExitStack() as stack:
            fresh, linked = self.open_draft(stack)
            snapshot = take_snapshot(self.learner, record, optimizer, frozen=not linked)
            check_space(fresh, snapshot.nbytes)
            if self.in_background:
                snapshot = snapshot.copied(self.learner)
            draft = stack.pop_all()

        def work() -> None:
            with self.in_words(step), draft:
                self.write(snapshot, fresh, target)

        self.background.start(work, snapshot_phase(snapshot.state))

    def save_in_parts(self, record: dict[str, Any]) -> None:
        """Have every process write what it holds of weights and moments in a thread; none gathers them.

        Processes agree in a group of their own, so that they can do so beside training.
        """
        step, target = self.learner.state.step, self.target
        with contextlib.ExitStack() as stack, self.in_words(step):
            fresh, linked = on_first(lambda: self.open_draft(stack))
            snapshot = together(lambda: self.take_part(record, frozen=not linked))
            on_first(lambda: check_space(fresh, snapshot.nbytes))
            draft = stack.pop_all()

        def work() -> None:
            with self.in_words(step), draft:
                self.write_in_parts(snapshot, fresh, target)

        self.background.start(work, snapshot_phase(snapshot.state))

    @property
    def target(self) -> Path:
        """The checkpoint of this step."""
        state = self.learner.state
        return self.folder / "checkpoints" / (f"step-{state.step}" + ("-pending" if state.pending else ""))

    def open_draft(self, stack: contextlib.ExitStack) -> tuple[Path, bool]:
        """A folder to fill, which `stack` removes unless it is published, and whether it has the frozen weights already."""
        self.check_folder()
        self.target.parent.mkdir(exist_ok=True)
        fresh = stack.enter_context(drafting(self.target))
        if self.last is None:
            return fresh, False
        with contextlib.suppress(OSError):  # one is gone, or the file system has no links: all are written anew
            return fresh, bool(carry_over(self.last, FROZEN, fresh, FROZEN, os.link))
        return fresh, False

    def take_part(self, record: dict[str, Any], frozen: bool) -> Snapshot:
        """What this process holds of the learner; a copy, if it is written in the background."""
        state, moments = state_in_parts(self.learner.optimizer)
        snapshot = take_snapshot(self.learner, record, state, frozen, moments)
        return snapshot.copied(self.learner) if self.in_background else snapshot

    def write_in_parts(self, snapshot: Snapshot, fresh: Path, target: Path) -> None:
        """Write what this process holds to the draft `fresh`, which the first one completes and publishes.

        Every process must call this; an error of one is raised on all.
        """
        written = write_held(snapshot, fresh)
        on_first(lambda: self.write(snapshot, fresh, target, written))

    def write(self, snapshot: Snapshot, fresh: Path, target: Path, written: Entries | None = None) -> None:
        """Write a snapshot to the draft `fresh`, publish that as the checkpoint `target`, then delete old ones.

        `written` are files of it that are there already. Nothing of the learner is read but what the snapshot has: it may be
        training on.
        """
        self.fill(fresh, snapshot, written or {})
        self.publish(fresh, target, snapshot.state)
        rotate(self.folder / "checkpoints", snapshot.state.step, self.config.save_total_limit)

    def fill(self, fresh: Path, snapshot: Snapshot, written: Entries) -> None:
        """Write a snapshot, the best model and the ingredients of its step, and last the manifest, to the folder `fresh`."""
        state, phase = snapshot.state, snapshot_phase(snapshot.state)
        write_tensors(snapshot, fresh)
        (fresh / "state.json").write_text(json.dumps(snapshot.record, indent=2) + "\n", encoding="utf-8")
        beat(f"{phase}, best model")
        best = self.keep_best(fresh / BEST, state.best_step) if state.best_scores else {}
        known = (
            {f"{BEST}/{name}": entry for name, entry in best.items()} | self.keep_ingredients(fresh, state) | written
        )
        beat(f"{phase}, hashes")
        write_manifest(fresh, manifest_head(state, self.settings), self.last, known)

    def publish(self, fresh: Path, target: Path, state: State) -> None:
        """Give a folder that is complete its name; from here on it is the last checkpoint."""
        beat(f"{snapshot_phase(state)}, flushing")
        if os.path.lexists(target) and not is_ours(target):
            remove_checkpoint(target)
        publish_folder(fresh, target)
        self.last, self.last_best = target, state.best_step
        self.kept = {step: (target, name) for step, name in ingredient_names(state).items()}

    @contextlib.contextmanager
    def in_words(self, step: int) -> Iterator[None]:
        """Within, an error of the disk becomes a UserError."""
        try:
            yield
        except (*WRITE_ERRORS, UserError) as error:
            if has_lost_another(error):
                raise
            why = explain(error, self.folder)
            raise UserError(f"the checkpoint of step {step} could not be saved: {why}") from error

    def raise_everywhere(self, problem: BaseException | None) -> None:
        """Raise the UserError of a process on all of them; every process must call this. Another error stays there."""
        if problem is not None and not isinstance(problem, UserError):
            raise problem
        if any_process(self.learner.accelerator, problem is not None):
            raise problem or UserError("another process could not save a checkpoint")

    def wait(self) -> None:
        """Wait for the checkpoint that is being written; every process must call this. Raises UserError as `save` does.

        It must be called before what a checkpoint is made of is read or replaced: `model/`, and the checkpoints themselves.
        """
        wait_everywhere(self.learner.accelerator, self.background, WAITING)
        self.raise_everywhere(self.background.take_error())

    def end(self) -> None:
        """Wait for the checkpoint that is being written on this process alone: at the end of training, also by an error.

        The error that is being raised is told before, in a line, unless it only says that another process has ended; what is
        wrong with the checkpoint is told after.
        """
        if self.background.is_busy():
            cause = sys.exception()
            known = cause is not None and not has_lost_another(cause)
            why = f"{printable(first_line(cause))}; " if cause is not None and known else ""
            print(f"{why}{WAITING} ...", file=sys.stderr, flush=True)
        while self.background.is_busy(POLL_SECONDS):
            beat(WAITING)
        if (problem := self.background.take_error()) and not has_lost_another(problem):
            print(f"warning: {problem}", file=sys.stderr, flush=True)

    def keep_best(self, folder: Path, step: int) -> Entries:
        """Put the best model, that of `step`, into the new `folder`, and restore model/ if it is gone; returns its files.

        Raises UserError if no undamaged copy is left: a checkpoint is not published without its best model.
        """
        model = self.folder / "model"
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

    def keep_ingredients(self, folder: Path, state: State) -> Entries:
        """Put the weights of earlier evaluations that are to be averaged into the new checkpoint; returns their files.

        Weights of which a file is gone are left out: `find_ingredients` says so at the end. What is damaged stays so by its
        entry.
        """
        entries: Entries = {}
        for step, name in ingredient_names(state).items():
            checkpoint, before = self.kept.get(step, (folder, name))
            if name != WEIGHTS:
                put = link_or_copy if checkpoint == self.last else shutil.copyfile
                with contextlib.suppress(FileNotFoundError):  # deleted by somebody
                    entries |= carry_over(checkpoint, before, folder, name, put)
        return entries

    def find_ingredients(self) -> dict[int, Path]:
        """The weights to average by their step, the best first; those that are gone or damaged are named and left out."""
        found = {}
        for item in self.learner.state.ingredients:
            checkpoint, name = self.kept.get(item["step"], (self.folder, ""))
            files = stored_files(checkpoint, name)
            damage = find_difference(checkpoint, files) if files else "they are gone"
            if damage is None:
                found[item["step"]] = stored_at(checkpoint, name)
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
        load_weights(learner.inner_model, checkpoint)
        self.last, self.last_best = None, 0  # other parameters may be frozen there
        # From the file as they are needed: a process that holds a part of the moments reads that part.
        tensors = torch.load(checkpoint / OPTIMIZER, weights_only=True, map_location="cpu", mmap=True)
        moments = stored_at(checkpoint, OPTIMIZER)
        parts = StoredTensors(moments) if moments.name != OPTIMIZER else None
        restore_optimizer(learner.optimizer, learner.scheduler, tensors["optimizer"], tensors["scheduler"], parts)
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


def check_space(folder: Path, size: int) -> None:
    """Raise UserError unless the disk of `folder` has room for tensors of `size` bytes."""
    needed, free = 2**20 + size, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"it needs {needed / 2**20:,.0f} MiB and {folder.parent} has {free / 2**20:,.0f} MiB free; make room, "
            "then run the same command again: it resumes from the previous checkpoint"
        )
