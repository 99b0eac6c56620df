"""The best model on disk: published whole, restored for the final test, and usable by any transformers program."""

import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from lib.adaptation import restore_weights, save_model
from lib.config import UserError
from lib.training import State


def publish_model(accelerator: Accelerator, model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Save model (or adapter and head) and tokenizer to `folder`, replacing what is there by renaming.

    Every process waits until the folder is complete.
    """
    if accelerator.is_main_process:
        fresh, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
        shutil.rmtree(fresh, ignore_errors=True)
        save_model(accelerator.unwrap_model(model), fresh)
        tokenizer.save_pretrained(fresh)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
        os.rename(fresh, folder)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def restore_model(accelerator: Accelerator, model: nn.Module, folder: Path, state: State) -> None:
    """Load the weights that `publish_model` saved into `model`, in place.

    Raises UserError when no evaluation of the run gave a finite number, so that none was saved.
    """
    if state.best_metric is None:
        raise UserError("training diverged: no evaluation gave a finite number; try a lower --learning_rate")
    restore_weights(accelerator.unwrap_model(model), folder)
