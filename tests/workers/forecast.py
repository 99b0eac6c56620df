"""Runs three steps of train.py; prints what its start block forecasts, and the most memory until then, in bytes."""

import json
import os
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


def train_and_measure(*arguments: Any) -> None:
    train_step(*arguments)
    seen["measured"] = most_held()


if sys.platform == "win32":

    def most_held() -> int:
        import psutil

        return psutil.Process().memory_info().peak_wset

else:

    def most_held() -> int:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


lib.run.memory.LITTLE = 0.0  # a small model is counted, too
lib.run.memory.with_process, train.train_step = keep_forecast, train_and_measure
train.main(parse_cli(TrainConfig, sys.argv[1:]))
seen["world_size"] = int(os.environ.get("WORLD_SIZE", "1"))
if "forecast" in seen:  # of several processes, one counts
    print(json.dumps(seen))
