"""Kill a process before and after every write of a save, and count what is left.

    killed_writes.py FOLDER [broken|background]

Prints one JSON object: the number of kills, and for how many of them no checkpoint, or no best model, was left.
With `broken` the old checkpoint is removed before the new one is written; with `background` a thread writes it.
"""

import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from conftest import tiny_roberta
from safetensors.torch import load_file
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from lib.config.sections import ModelConfig
from lib.config.train import TrainingConfig
from lib.model.load import build_model, load_tokenizer
from lib.model.losses import plain_cross_entropy
from lib.model.weights import WEIGHTS
from lib.run import best_model, checkpoint
from lib.run.best_model import publish_model
from lib.run.checkpoint import Checkpointer, list_checkpoints
from lib.run.resume import find_checkpoint
from lib.runtime import atomic
from lib.runtime.atomic import find_damage
from lib.training.learner import Learner
from lib.training.objective import Objective
from lib.training.plan import Plan
from lib.training.state import State
from tests.writes import WRITES, watch_writes

OWN = [(best_model, "save_model"), (checkpoint, "write_manifest"), (atomic, "exchange")]
"""What a save writes with, besides the functions of the libraries."""


def kill_at(number: int) -> None:
    """Kill this process at the given one of the moments right before and right after a write."""
    moments = itertools.count(1)

    def note(_: str) -> None:
        if next(moments) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    watch_writes(note, WRITES + OWN)


def save(folder: Path, step: int, model: Any, tokenizer: Any, background: bool) -> None:
    """What train.py does at an evaluation with a new best model; weights of earlier ones are kept to be averaged."""
    accelerator = Accelerator(cpu=True)
    optimizer = AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float(step))
    optimizer.step()
    scheduler = LambdaLR(optimizer, lambda _: 1.0)
    kept = [{"step": number, "scores": {"loss": 1.0}} for number in range(step, 0, -1)]
    state = State(step=step, best_metric=0.5, best_step=step, best_scores={"loss": 1.0}, ingredients=kept)
    plan = Plan(TrainingConfig(save_total_limit=1, async_save=background), np.ones(8))
    learner = Learner(accelerator, model, Objective(plain_cross_entropy), optimizer, scheduler, plan, state)
    publish_model(accelerator, model, tokenizer, folder / "model")
    before = {number: (folder / "checkpoints" / f"step-{number}", WEIGHTS) for number in range(1, step)}
    saver = Checkpointer(folder, plan.config, {}, learner, kept=before)
    saver.save(None)
    saver.wait()


def remove_first(self: Checkpointer, *arguments: Any) -> None:
    for old in list_checkpoints(self.folder / "checkpoints"):
        shutil.rmtree(old)
    WRITE(self, *arguments)


WRITE = Checkpointer.write


def main(out: str, how: str = "") -> None:
    broken, background = how == "broken", how == "background"
    source = tiny_roberta(Path(out) / "roberta")
    config = ModelConfig(model=str(source))
    tokenizer = load_tokenizer(config)
    model, _ = build_model(config, ["a", "b"], tokenizer)
    before = Path(out) / "before"
    before.mkdir()
    save(before, 1, model, tokenizer, background)
    left = {"kills": 0, "no checkpoint": 0, "no model": 0, "old": 0, "new": 0}
    number, status = 0, 1
    while status:
        number += 1
        folder = Path(out) / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        child = os.fork()
        if child == 0:
            with mock.patch.object(Checkpointer, "write", remove_first if broken else WRITE):
                kill_at(number)
                save(folder, 2, model, tokenizer, background)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        left["kills"] += status == signal.SIGKILL
        found = find_checkpoint("auto", folder / "checkpoints")
        left["no checkpoint"] += found is None
        if found is not None:
            left["old" if found.name == "step-1" else "new"] += 1
            assert json.loads((found / "state.json").read_text())["state"]["step"] == int(found.name[-1])
            if not broken:
                assert find_damage(found) is None, find_damage(found)
                assert (found / "ingredients" / "step-1.safetensors").is_file() == (found.name == "step-2")
        try:
            load_file(folder / "model" / "model.safetensors")
        except OSError:
            left["no model"] += 1
    print(json.dumps(left))


if __name__ == "__main__":
    main(*sys.argv[1:])
