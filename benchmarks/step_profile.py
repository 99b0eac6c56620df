"""What one training step asks PyTorch for: operations, by kind, before and after what this project takes out of it.

    python benchmarks/step_profile.py                                  minilm, four movie reviews, float32 and bf16
    python benchmarks/step_profile.py --precision bf16 -- --freeze 3    one precision, with flags of train.py

A table is printed, and its numbers as JSON in the last line. Counted on a CPU, without what runs on CPUs alone: this
project's kernels, kept gradients of large tables, the norm in blocks. On a GPU attention with dropout is a few kernels
instead of a few dozen operations.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import train  # noqa: E402
from benchmarks.gpu_check import CalledAgain  # noqa: E402
from lib.config.cli import parse_cli  # noqa: E402
from lib.config.train import TrainConfig  # noqa: E402
from lib.data.load import load_data  # noqa: E402
from lib.data.loader import Batches, build_collator  # noqa: E402
from lib.evaluation.scores import Metrics  # noqa: E402
from lib.model.build import build_classifier  # noqa: E402
from lib.model.load import load_tokenizer  # noqa: E402
from lib.runtime.accelerator import build_accelerator  # noqa: E402
from lib.training.learner import build_learner  # noqa: E402
from lib.training.objective import build_objective  # noqa: E402
from lib.training.plan import build_plan  # noqa: E402

FLAGS = (
    "--bs",
    "4",
    "--max_train_samples",
    "64",
    "--max_eval_samples",
    "8",
    "--report_to",
    "none",
    "--cpu_kernels",
    "False",
)
KINDS = ("operations", "copies", "casts", "views", "reads")
READS = {"_local_scalar_dense", "nonzero"}
"""Operations that wait for a GPU, to give Python a number or a shape."""

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the model makes its mask": ({}, {"lib.training.step.with_ready_mask": lambda model, inputs, *_: inputs}),
    "the mask is ready": ({}, {}),
    "--bf16_weights True": ({"bf16_weights": True}, {}),
    "--cuda_graphs, beside the replay": ({"cuda_graphs": True}, {}),
}
"""Settings of training, and what is replaced. --bf16_weights, of bf16 alone, has the mask ready as well."""


class Tally(TorchDispatchMode):
    """Counts the operations within by kind, except those of a replay."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = collections.Counter[str]()
        self.is_paused = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self.is_paused:
            name, returns = function.overloadpacket.__name__, function._schema.returns
            is_view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
            is_cast = (
                name in ("_to_copy", "copy_")
                and len({t.dtype for t in (args[0], args[-1], result) if torch.is_tensor(t)}) > 1
            )
            is_copy = name in ("_to_copy", "copy_", "clone") and not is_cast
            found = {"operations": True, "copies": is_copy, "casts": is_cast, "views": is_view, "reads": name in READS}
            self.counts.update(name for name, is_one in found.items() if is_one)
        return result


def count_step(precision: str, way: str, flags: list[str]) -> dict[str, int]:
    """Operations by kind of the third step on one batch: by then a graph is recorded."""
    settings, replaced = WAYS[way]
    tally = Tally()

    class Uncounted(CalledAgain):
        """A replay is no work of Python."""

        def record(self, work: Callable[[], None]) -> Callable[[], None]:
            def replay() -> None:
                tally.is_paused = True
                work()
                tally.is_paused = False

            return replay

    config = parse_cli(TrainConfig, [*FLAGS, "--mixed_precision", precision, *flags])
    on_gpu = {
        "lib.training.step_graphs.Recorder": Uncounted,
        "lib.training.step.gradient_norm": torch.nn.utils.get_total_norm,
        "lib.training.optimizer.LARGE_TABLE": sys.maxsize,
    }
    AcceleratorState._reset_state(reset_partial_state=True)  # of another precision
    accelerator = build_accelerator(config.device)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, **settings))
    with contextlib.ExitStack() as stack:
        for name, value in (on_gpu | replaced).items():
            stack.enter_context(mock.patch(name, value))
        tokenizer = load_tokenizer(config.model)
        data = load_data(config.data, tokenizer, ("train", "validation"))
        model, _ = build_classifier(config, data, tokenizer, accelerator.device, accelerator.mixed_precision)
        plan = build_plan(config, data, Metrics(("accuracy",), "accuracy"), accelerator)
        learner = build_learner(accelerator, model, build_objective(config.objective, data), plan, config.optim)
        batches = Batches(data, build_collator(tokenizer, accelerator.mixed_precision, accelerator.device))
        steps = (
            batch for batch in plan.step_batches(batches) if not batch.micro_batches[0].inputs["attention_mask"].all()
        )
        batch = next(steps)  # with padding, as most are
        for _ in range(2):
            train.train_step(learner, batch, config)
        with tally:
            train.train_step(learner, batch, config)
    return {kind: tally.counts[kind] for kind in KINDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--precision", nargs="+", choices=("no", "bf16"), default=["no", "bf16"], help="by default both"
    )
    parser.add_argument("flags", nargs="*", help="of train.py, after --")
    options = parser.parse_args()
    found = {
        precision: {
            way: count_step(precision, way, options.flags)
            for way in WAYS
            if precision == "bf16" or way != "--bf16_weights True"
        }
        for precision in options.precision
    }
    print("| precision | step | " + " | ".join(KINDS) + " |\n|---|---|" + "---|" * len(KINDS))
    for precision, ways in found.items():
        for way, counts in ways.items():
            print(f"| {precision} | {way} | " + " | ".join(f"{counts[kind]:,}" for kind in KINDS) + " |")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
