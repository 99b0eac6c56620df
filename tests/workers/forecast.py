"""Runs three steps of train.py; prints what its start block forecasts, and the most memory until then, in bytes."""

import json
import os
import resource
import sys
from typing import Any

import lib.run.memory
import train
from lib.config.cli import parse_cli
from lib.config.train import TrainConfig

with_process, train_step, seen = lib.run.memory.with_process, train.train_step, dict[str, Any]()


def keep_forecast(*arguments: Any) -> Any:
    found = with_process(*arguments)
    seen.update(forecast=found.peak, base=found.base)
    return found


def train_and_measure(learner: Any, *arguments: Any) -> None:
    train_step(learner, *arguments)
    if learner.state.step == 3:  # what follows takes time, and has nothing to do with a step
        seen["measured"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(seen), flush=True)
        os._exit(0)


lib.run.memory.LITTLE = 0.0  # a small model is counted, too
lib.run.memory.with_process, train.train_step = keep_forecast, train_and_measure
train.main(parse_cli(TrainConfig, sys.argv[1:]))
