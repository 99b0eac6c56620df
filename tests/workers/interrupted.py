"""Train, stop and resume many times in one process group; test_resume.py compares the output folders.

    interrupted.py PLAN FLAG [FLAG ...]

PLAN is a JSON file with a list of calls of train.py: `folder`; `stop`, the step after which the last process is asked to
stop, and `during`, whether right after the step or in its evaluation; `broken`, what is broken on purpose; `flags`; `engine`,
see engines.py; `parts`, whether a model in shards is saved in parts, whatever its size; `export`, the bytes of it that are
exported at a time. How many tensors a process gathered while checkpoints were saved and loaded is written to
`folder`.gathered-RANK.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor

import train
from lib.config.cli import parse_cli
from lib.config.train import TrainConfig
from lib.evaluation import scoring
from lib.model import build, sharding, stored_tensors
from lib.run import run
from lib.run.checkpoint import Checkpointer
from lib.runtime import signals
from lib.training import plan
from tests.workers.engines import use_engine


def is_last_process() -> bool:
    distributed = torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def ask_to_stop() -> None:
    if is_last_process():
        signals.REQUEST.reason = "a test"


def patches(call: dict[str, Any]) -> list[Any]:
    """What differs from a plain run: the request to stop, and what is broken on purpose."""
    stop, steps = call.get("stop"), {"made": 0}
    step, predict, epoch, seed = train.train_step, scoring.predict_batch, plan.epoch_batches, train.seed_everything

    def train_step(learner: Any, *arguments: Any) -> None:
        step(learner, *arguments)
        steps["made"] = learner.state.step
        if steps["made"] == stop and call.get("during") != "evaluation":
            ask_to_stop()

    def predict_batch(*arguments: Any) -> Any:
        if steps["made"] == stop:
            ask_to_stop()
        return predict(*arguments)

    made = [
        mock.patch.object(run, "write_report", mock.Mock(return_value="")),
        mock.patch.object(run, "finish", mock.Mock()),
        mock.patch.object(train, "train_step", train_step),
        mock.patch.object(scoring, "predict_batch", predict_batch),
    ]
    if call.get("parts"):
        made += [mock.patch.object(stored_tensors, "LARGE", 0)]
    if "export" in call:
        made += [mock.patch.object(sharding, "PART", call["export"])]
    if "--compile" in call.get("flags", []):  # as on a GPU
        made += [mock.patch.object(build, "check_place", mock.Mock())]
    if call.get("broken") == "order":
        made += [mock.patch.object(plan, "epoch_batches", lambda a, b, c, d, e: epoch(a, b, c + 1, d, e))]
    if call.get("broken") == "dropout":
        made += [mock.patch.object(train, "seed_everything", lambda first, *key: seed(first + 1, *key))]
    return made


@contextlib.contextmanager
def counting(folder: Path) -> Iterator[None]:
    """Within, count the tensors that this process gathers while a checkpoint is saved or loaded."""
    gather, save, load, now = DTensor.full_tensor, Checkpointer.save, Checkpointer.load, {"inside": 0, "gathered": 0}

    def full_tensor(*arguments: Any, **options: Any) -> Any:
        now["gathered"] += now["inside"]
        return gather(*arguments, **options)

    def within(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            now["inside"] += 1
            try:
                return function(*arguments)
            finally:
                now["inside"] -= 1

        return call

    try:
        with (
            mock.patch.object(DTensor, "full_tensor", full_tensor),
            mock.patch.object(Checkpointer, "save", within(save)),
            mock.patch.object(Checkpointer, "load", within(load)),
        ):
            yield
    finally:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        folder.with_name(f"{folder.name}.gathered-{rank}").write_text(str(now["gathered"]))


def play(call: dict[str, Any], flags: list[str]) -> None:
    config = parse_cli(TrainConfig, [*flags, *call.get("flags", []), "--output_dir", call["folder"]])
    active = patches(call)
    use_engine(call.get("engine"))
    for patch in active:
        patch.start()
    signals.REQUEST.reason = ""
    try:
        with counting(Path(call["folder"])):
            train.main(config)
        assert not call.get("stop"), "the run did not stop"
    except signals.Stopped:
        assert call.get("stop"), "the run stopped by itself"
    finally:
        signals.REQUEST.reason = ""
        for patch in active:
            patch.stop()


def main(path: str, *flags: str) -> None:
    for call in json.loads(Path(path).read_text()):
        play(call, list(flags))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
