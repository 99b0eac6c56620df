"""Steps in which processes run out of memory, drop layers or go backward twice; saves what each process learned.

    overlap.py MODEL DROPPING OUT some|all

MODEL has no dropout, DROPPING drops layers; memory runs out at some places of a step, or at all. Run by tests through the
launcher. Results are lists with an entry for each process, by the name of the case.
"""

import copy
import dataclasses
import gc
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import train
from lib.config.cli import parse_cli
from lib.config.train import TrainConfig
from lib.data.load import load_data
from lib.model.load import load_tokenizer
from lib.runtime import determinism, processes
from lib.runtime.accelerator import build_accelerator
from lib.runtime.device_options import DeviceOptions
from lib.runtime.processes import finish
from lib.runtime.seeds import seed_everything
from lib.training import gradients, optimizer
from lib.training.state import State
from lib.training.step import attempts, try_longest_batch
from tests.conftest import sentences, write_csv
from tests.stepping import Experiment, build_experiment

FLAGS = "--lr 1e-2 --adam_epsilon 1e-2 --lr_scheduler_type constant --epochs 1"
SIZES = "--train_batch_size 12 --per_device_train_batch_size 3"
FAILING_STEP = 1
TOO_LARGE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
NOT_DETERMINISTIC = RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set")


@dataclasses.dataclass
class Fault:
    """An error on some processes, once, in the second step: where the gradients of a bucket begin, or else in forward."""

    ranks: tuple[int, ...]
    bucket: int | None = None
    micro_batch: int = -1
    error: RuntimeError = TOO_LARGE


class Stage:
    """One process of the launch."""

    def __init__(self, accelerator: Any, out: Path) -> None:
        self.accelerator, self.rank, self.out = accelerator, accelerator.process_index, out

    def build(self, model: str, size: int, *flags: str) -> Experiment:
        files = {role: self.out / f"{role}{size}.csv" for role in ("train", "validation")}
        with self.accelerator.main_process_first():
            for file in files.values():
                write_csv(file, sentences(size))
            named = [part for role, file in files.items() for part in (f"--{role}_file", str(file))]
            config = parse_cli(TrainConfig, [*FLAGS.split(), *SIZES.split(), "--model", model, *named, *flags])
            data = load_data(config.data, load_tokenizer(config.model))
        return build_experiment(config, self.accelerator, data)

    def again(self, experiment: Experiment, weights: dict[str, torch.Tensor]) -> Experiment:
        """The experiment before its first step."""
        experiment.learner.model.load_state_dict(weights)
        experiment.learner.optimizer.optimizer.state.clear()
        experiment.learner.state = State()
        return experiment

    def train(self, experiment: Experiment, fault: Fault | None = None, backward: Any = None) -> dict[str, Any]:
        """All steps; what they learned, what was sent, and which parameters were used in each step."""
        learner, noted = experiment.learner, {"begun": 0, "within": [], "sums": 0, "failed": None, "used": []}
        sums, hook = learner.gradients, None
        forward_backward = backward or train.forward_backward
        calls = {"failing": False}

        def count(tensor: torch.Tensor) -> Any:
            noted["sums"] += 1
            return processes.start_sum(tensor)

        def one(learner: Any, micro_batch: Any, weight: float) -> torch.Tensor:
            state = learner.state
            mine = fault is not None and self.rank in fault.ranks and noted["failed"] is None
            if mine and state.step == FAILING_STEP and (fault.micro_batch >= 0 or sums.is_last):
                if fault.bucket is None:
                    noted["failed"] = sums.sent
                    raise fault.error
                calls["failing"] = True
            loss = forward_backward(learner, micro_batch, weight)
            if sums.is_last:
                noted["within"].append(sums.sent)
            return loss

        def fail(gradient: torch.Tensor) -> None:
            if calls["failing"]:
                calls["failing"], noted["failed"] = False, sums.sent
                raise fault.error

        if fault is not None and fault.bucket is not None:
            hook = sums.buckets[fault.bucket].parameters[0].register_hook(fail)
        begin = sums.begin

        def count_attempt() -> None:
            noted["begun"] += 1
            begin()

        with (
            mock.patch.object(gradients, "start_sum", count),
            mock.patch.object(train, "forward_backward", one),
            mock.patch.object(sums, "begin", count_attempt),
        ):
            for batch in experiment.plan.step_batches(experiment.batches):
                experiment.step(batch)
                noted["used"].append([parameter in sums.used for parameter in sums.bucket_of])
        if hook:
            hook.remove()
        weights = torch.cat([p.detach().flatten() for p in learner.model.parameters()]).clone()
        kept = {table.weight: gradient for table, gradient, _ in learner.optimizer.optimizer.kept}
        shared = [gradient.data_ptr() == sums.bucket_of[p].views[p].data_ptr() for p, gradient in kept.items()]
        facts = {"weights": weights, "buckets": len(sums.buckets), "positions": learner.state.micro_batch_positions}
        return noted | facts | {"overlapping": sums.overlapping, "shared": shared}

    def all(self, result: Any) -> list[Any]:
        """The results of all processes."""
        results = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(results, result)
        return results


def twice(learner: Any, micro_batch: Any, weight: float) -> torch.Tensor:
    """Half the loss, two times."""
    return sum(FORWARD_BACKWARD(learner, micro_batch, 2 * weight) for _ in range(2)) / 2


FORWARD_BACKWARD = train.forward_backward


def sums_by_hand(experiment: Experiment, batch: Any) -> list[torch.Tensor | None]:
    """The gradients of a step, summed parameter by parameter after the backward passes of a copy of the model."""
    learner = copy.copy(experiment.learner)
    learner.model = copy.deepcopy(learner.model)
    for index, micro_batch in enumerate(batch.micro_batches):
        seed_everything(experiment.config.training.seed, learner.state.step, index, learner.accelerator.process_index)
        train.forward_backward(learner, micro_batch, batch.weight)
    found = []
    for parameter in learner.model.parameters():
        users = torch.tensor(int(parameter.grad is not None))
        torch.distributed.all_reduce(users)
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
        torch.distributed.all_reduce(gradient)
        found.append(gradient if users else None)
    return found


def compare_sums(experiment: Experiment) -> dict[str, Any]:
    """Each step's sums beside those by hand: the largest difference, and how many parameters were used by whom."""
    learner, differences, users, same_missing = experiment.learner, [], [], []
    for batch in experiment.plan.step_batches(experiment.batches):
        wanted = sums_by_hand(experiment, batch)
        for attempt in attempts(learner, batch):
            with attempt as micro_batches:
                for index, micro_batch in enumerate(micro_batches):
                    seed_everything(42, learner.state.step, index, learner.accelerator.process_index)
                    train.forward_backward(learner, micro_batch, batch.weight)
        found = [parameter.grad for parameter in learner.model.parameters()]
        same_missing.append([a is None for a in found] == [b is None for b in wanted])
        pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if a is not None and b is not None]
        differences.append(max(float((a - b).abs().max()) for a, b in pairs))
        users.append((len(learner.gradients.used), len(pairs), len(found)))
        learner.optimizer.zero_grad()
        learner.state.step += 1
    return {"differences": differences, "users": users, "same_missing": same_missing}


def main(model: str, dropping: str, out: str, places: str) -> None:
    accelerator = build_accelerator(DeviceOptions("no"))
    stage, results = Stage(accelerator, Path(out)), {}
    processes.BUCKET_BYTES, gradients.FIRST_BUCKET = 4096, 1024  # many buckets in a tiny model
    gc.freeze()  # each cut of micro-batches collects garbage; it need not scan the imported modules
    results["plain"] = stage.all(stage.train(stage.build(model, 24)))
    optimizer.LARGE_TABLE = 1024
    results["tables"] = stage.all(stage.train(stage.build(model, 24)))
    results["twice"] = stage.all(stage.train(stage.build(model, 24), backward=twice))
    every = tuple(range(accelerator.num_processes))
    experiment = stage.build(model, 24)
    weights = {name: tensor.clone() for name, tensor in experiment.learner.model.state_dict().items()}
    number = results["plain"][0]["buckets"]
    if places == "all":
        faults = [Fault(ranks, bucket) for ranks in ((0,), (1,), every) for bucket in range(number)]
        faults += [Fault(ranks, *place) for ranks in ((0,), (1,), every) for place in ((None, -1), (None, 0), (3, 0))]
    else:
        faults = [Fault((0,), number - 1), Fault((1,), number // 2), Fault(every, 0), Fault((1,)), Fault((0,), 3, 0)]
    for fault in faults:
        case = ("memory", fault.ranks, fault.bucket, fault.micro_batch)
        results[case] = stage.all(stage.train(stage.again(experiment, weights), fault))
    determinism.REQUEST.strict = True  # as on a GPU
    results["not deterministic"] = stage.all(
        stage.train(stage.again(experiment, weights), Fault((1,), 3, error=NOT_DETERMINISTIC))
    )
    determinism.REQUEST.strict = False
    torch.use_deterministic_algorithms(False)

    drops = ("--config_overrides", "encoder_layerdrop=0.5", "decoder_layerdrop=0.5")
    results["dropped layers"] = stage.all(stage.train(stage.build(dropping, 60, *drops)))
    results["dropped layers, by hand"] = stage.all(compare_sums(stage.build(dropping, 60, *drops)))
    stage.again(experiment, weights)
    with mock.patch("lib.training.step.has_own_memory", return_value=True):
        try_longest_batch(experiment.learner, experiment.batches.longest(2), train.forward_backward)
    results["after trying"] = stage.all(stage.train(experiment))
    if accelerator.is_main_process:
        torch.save(results | {"world_size": accelerator.num_processes}, Path(out) / "results.pt")
    finish(accelerator)


if __name__ == "__main__":
    main(*sys.argv[1:])
