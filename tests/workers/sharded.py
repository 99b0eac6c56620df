"""Train tiny models on data of some sizes; save losses, gradient norms and weights.

    sharded.py PLAN OUT

PLAN is a JSON file with a list of cases: `name`, `flags` of train.py, `sizes` of the data; `engine`: plain, fsdp, or as
launched; `precision`; `reshard`: whether a layer is freed after forward; `broken`, what is broken on purpose: mean, norm, or
pad, where a process that waits in vain ends itself. Run by tests on one process and, through the launcher, on several.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor

from lib.config.cli import parse_cli
from lib.config.train import TrainConfig
from lib.data.load import load_data
from lib.model.forward import compute_logits
from lib.model.layers import find_layers
from lib.model.load import load_tokenizer
from lib.model.sharding import is_sharded, norm_over_shards, whole_weights
from lib.run.memory import describe_memory
from lib.runtime.accelerator import build_accelerator
from lib.runtime.device_options import DeviceOptions
from lib.runtime.launch_checks import read_sharding
from lib.runtime.processes import finish
from lib.training import step
from lib.training.memory_forecast import lasting_parts
from lib.training.sharded_gradients import ShardedGradients
from tests.conftest import write_csv
from tests.stepping import build_experiment
from tests.workers.engines import use_engine
from tests.workers.world_size import FIXED, HEADER, rows, shorten


def train(accelerator: Any, case: dict[str, Any], config: TrainConfig, data: Any) -> dict[str, Any]:
    experiment = build_experiment(config, accelerator, data)
    learner = experiment.learner
    assert is_sharded(learner.model) == bool(read_sharding())
    if case.get("broken") == "mean":
        for module in learner.model.modules():
            if is_sharded(module):
                module.set_gradient_divide_factor(float(accelerator.num_processes))
    about: dict[str, Any] = {}
    if is_sharded(learner.model):
        about["memory"], _ = describe_memory(config, learner, experiment.batches, [])
        about["held"] = lasting_parts(learner.model).weights
    made = experiment.train()
    if is_sharded(learner.model):  # after a forward, in which state is a layer?
        with torch.no_grad():
            compute_logits(learner.model, {"input_ids": torch.full((1, 3), 7)})
        about["freed"] = isinstance(next(find_layers(learner.inner_model, "FSDP")[0].parameters()), DTensor)
    with whole_weights(learner.inner_model):
        weights = {name: tensor.clone() for name, tensor in learner.inner_model.state_dict().items()}
    accelerator.free_memory(learner.model, learner.optimizer)
    losses, norms = zip(*made, strict=True)
    return {"losses": losses, "norms": norms, "weights": weights} | about


@contextlib.contextmanager
def broken(what: str | None) -> Iterator[None]:
    """Within, the norm is summed over replicas as well, if `what` is norm; if it is pad, no process waits for the others."""

    def over_all(norm: torch.Tensor, gradients: Any) -> torch.Tensor:
        squares = norm_over_shards(norm, gradients).square()
        torch.distributed.all_reduce(squares)
        return (squares / torch.distributed.get_world_size() * 2).sqrt()  # two replicas

    if what == "norm":
        patch: Any = mock.patch.object(step, "norm_over_shards", over_all)
    elif what == "pad":
        signal.alarm(15)
        patch = mock.patch.object(ShardedGradients, "pad", lambda _, pieces: pieces)
    else:
        patch = contextlib.nullcontext()
    with patch:
        yield


def start(case: dict[str, Any]) -> Any:
    """The accelerator of a case."""
    AcceleratorState._reset_state()  # of the last case, whose precision may be another
    use_engine(case.get("engine"))
    os.environ["FSDP_RESHARD_AFTER_FORWARD"] = case.get("reshard", "true")
    return build_accelerator(DeviceOptions(case.get("precision", "no")), shards=True)


def main(plan: str, out: str) -> None:
    cases, results = json.loads(Path(plan).read_text()), {}
    accelerator = start(cases[0])
    fixed = [*FIXED.split(), "--per_device_train_batch_size", "3"]
    with accelerator.main_process_first():
        for role in ("train", "validation"):
            fixed += [f"--{role}_file", str(write_csv(Path(plan).parent / f"{role}.csv", rows(), HEADER))]
    for case in cases:
        accelerator = start(case)
        config = parse_cli(TrainConfig, [*fixed, *case["flags"]])
        tokenizer = load_tokenizer(config.model)
        with accelerator.main_process_first():
            data = load_data(config.data, tokenizer)
        for size in case["sizes"]:
            with broken(case.get("broken")):
                results[case["name"], size] = train(accelerator, case, config, shorten(data, size))
    if accelerator.is_main_process:
        torch.save(results | {"world_size": accelerator.num_processes, "sharding": str(read_sharding())}, out)
    finish(accelerator)


if __name__ == "__main__":
    main(*sys.argv[1:])
