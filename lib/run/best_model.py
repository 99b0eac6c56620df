"""The best model so far: `OUTPUT_DIR/model/`, exported with save_pretrained and usable by any transformers program.

Each checkpoint has a copy of it in `best/`. People may edit `model/`, so that it shares no file with them.
"""

import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from lib.errors import UserError
from lib.model.adapters.adapt import adapter_info
from lib.model.sharding import gathered_parts, whole_weights
from lib.model.source import ANSWER_SETTINGS
from lib.model.weights import reload_model, save_model
from lib.runtime.atomic import (
    WRITE_ERRORS,
    Entries,
    copy_files,
    drafting,
    explain,
    find_damage,
    find_difference,
    listed_files,
    publish_folder,
    write_manifest,
)
from lib.runtime.background import Background, wait_everywhere
from lib.runtime.processes import any_process
from lib.runtime.watchdog import beat
from lib.training.state import State

BEST = "best"
"""The folder in a checkpoint that holds the best model of its step."""
KIND = {"format": 1, "kind": "model"}
"""What the manifest of a model says besides its files."""
SAVING = "saving the best model"
"""What the watchdog shows."""


def publish_model(accelerator: Accelerator, model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Save model (or adapter and head) and tokenizer to `folder`, atomically replacing what is there.

    Every process waits until the folder is complete. Raises UserError on every process if the disk is full, or if a
    folder of somebody else is there.
    """
    beat(SAVING)
    inner, rest = accelerator.unwrap_model(model), Background()
    error: BaseException | None = None
    is_adapter = adapter_info(inner) is not None
    parts = iter(()) if is_adapter else gathered_parts(inner)
    with contextlib.ExitStack() as stack:
        with whole_weights(inner, frozen=False) if is_adapter else contextlib.nullcontext():
            if accelerator.is_main_process:
                try:
                    fresh = stack.enter_context(drafting(folder))
                    save_model(inner, fresh, parts)
                    rest.start(lambda: complete(fresh, folder, tokenizer), SAVING)
                except WRITE_ERRORS as failure:
                    error = failure
            for _ in parts:
                pass  # every process helps to gather each, also where the first one could not write it
        wait_everywhere(accelerator, rest, SAVING)
        error = error or rest.take_error()
    if error is not None and not isinstance(error, WRITE_ERRORS):
        raise error
    problem = f"the best model could not be saved to {folder}: {explain(error, folder.parent)}" if error else ""
    if any_process(accelerator, bool(problem)):
        raise UserError(problem or "the first process could not save the best model")


def complete(fresh: Path, folder: Path, tokenizer: Any) -> None:
    """Add the tokenizer and the manifest to a model in `fresh`, and publish it as `folder`: the others poll meanwhile."""
    tokenizer.save_pretrained(fresh)
    write_manifest(fresh, KIND)
    publish_folder(fresh, folder)


def best_files(checkpoint: Path) -> Entries:
    """The files of the best model in a checkpoint, as its manifest lists them; none if there was no best model."""
    files = listed_files(checkpoint)
    return {name.removeprefix(f"{BEST}/"): files[name] for name in files if name.startswith(f"{BEST}/")}


def find_best(files: Entries, places: Sequence[Path]) -> Path | None:
    """The first folder that holds the best model with these files, undamaged."""
    return next((place for place in places if files and find_difference(place, files) is None), None)


def copy_model(source: Path, files: Entries, folder: Path) -> None:
    """Publish a copy of these files of `source` as the model in `folder`; no file is shared."""
    with drafting(folder) as fresh:
        copy_files(source, fresh, files)
        write_manifest(fresh, KIND, known=files)
        publish_folder(fresh, folder)


def restore_model(
    accelerator: Accelerator, model: nn.Module, folder: Path, state: State, checkpoints: Iterable[tuple[Path, int]] = ()
) -> None:
    """Load what `publish_model` saved into `model`, in place: weights, temperature and thresholds.

    What is damaged or gone is taken from the first of `checkpoints` (each with the step of its best model) that has it.
    Raises UserError on every process if none has it, and if no evaluation of the run had a finite loss, so that no model
    was saved.
    """
    if not state.best_step:
        raise UserError("training diverged: no evaluation gave a finite number; try a lower --learning_rate")
    problem = ""
    if accelerator.is_main_process and (damage := find_damage(folder)):
        problem = f"the best model, of step {state.best_step}, is damaged: {folder}: {damage}"
        for checkpoint, best_step in checkpoints:
            files = best_files(checkpoint)
            if best_step == state.best_step and find_best(files, [checkpoint / BEST]):
                try:
                    copy_model(checkpoint / BEST, files, folder)
                except WRITE_ERRORS as error:
                    problem += f"; it could not be restored: {explain(error, folder.parent)}"
                    break
                print(f"warning: {problem}; it was restored from {checkpoint}", flush=True)
                problem = ""
                break
        else:
            problem += (
                "; no checkpoint has a copy. Train again: --resume_from_checkpoint never, or another --output_dir"
            )
    if any_process(accelerator, bool(problem)):
        raise UserError(problem or "the first process could not restore the best model")
    inner = accelerator.unwrap_model(model)
    reload_model(inner, folder)
    restore_answers(inner.config, folder)


def restore_answers(config: Any, folder: Path) -> None:
    """Make temperature and thresholds in `config` those of the model saved in `folder`; none where that has none."""
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in ANSWER_SETTINGS:
        vars(config).pop(key, None)
        if saved.get(key) is not None:
            setattr(config, key, saved[key])
