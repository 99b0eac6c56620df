"""The best model so far: `OUTPUT_DIR/model/`, exported with save_pretrained and usable by any transformers program."""

import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from lib.errors import UserError
from lib.evaluation.thresholds import restore_thresholds
from lib.model.weights import reload_model, save_model
from lib.runtime.atomic import WRITE_ERRORS, explain, publish_folder
from lib.runtime.processes import any_process
from lib.runtime.watchdog import beat
from lib.training.state import State


def publish_model(accelerator: Accelerator, model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Save model (or adapter and head) and tokenizer to `folder`, atomically replacing what is there.

    Every process waits until the folder is complete. Raises UserError on every process if the disk is full.
    """
    beat("saving the best model")
    problem = ""
    if accelerator.is_main_process:
        fresh = folder.with_name(f".tmp-{folder.name}")
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            save_model(accelerator.unwrap_model(model), fresh)
            tokenizer.save_pretrained(fresh)
            publish_folder(fresh, folder)
        except WRITE_ERRORS as error:
            shutil.rmtree(fresh, ignore_errors=True)
            problem = f"the best model could not be saved to {folder}: {explain(error, folder.parent)}"
    if any_process(accelerator, bool(problem)):
        raise UserError(problem or "the first process could not save the best model")


def restore_model(accelerator: Accelerator, model: nn.Module, folder: Path, state: State) -> None:
    """Load what `publish_model` saved into `model`, in place: weights, and thresholds of a multi-label model.

    Raises UserError if no evaluation of the run had a finite loss, so that no model was saved.
    """
    if not state.best_step:
        raise UserError("training diverged: no evaluation gave a finite number; try a lower --learning_rate")
    inner = accelerator.unwrap_model(model)
    reload_model(inner, folder)
    restore_thresholds(inner.config, folder)
