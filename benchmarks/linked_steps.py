"""Training steps of one process of several, without a run's folder: seconds of all but the first ones.

    linked_steps.py --way overlap|after|ddp FLAG ...      FLAGs are those of train.py, of which --max_steps ends it

`--weights FILE` keeps what was learned: all ways learn the same.

Started by benchmarks/limited_link.py, with the launcher's variables. The first process prints one line of JSON.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.limited_link import WAYS  # noqa: E402
from benchmarks.measuring import Measures  # noqa: E402
from lib.config.cli import parse_cli  # noqa: E402
from lib.config.train import TrainConfig  # noqa: E402
from lib.data.load import load_data  # noqa: E402
from lib.data.loader import Batches, MicroBatch, StepBatch, build_collator  # noqa: E402
from lib.evaluation.scores import Metrics  # noqa: E402
from lib.model.build import build_classifier  # noqa: E402
from lib.model.load import load_tokenizer  # noqa: E402
from lib.model.sharding import whole_weights  # noqa: E402
from lib.runtime.accelerator import build_accelerator  # noqa: E402
from lib.runtime.processes import buckets, copy_from, finish, lowest_of_each, start_sum  # noqa: E402
from lib.runtime.seeds import seed_everything  # noqa: E402
from lib.training import learner as learning  # noqa: E402
from lib.training import optimizer  # noqa: E402
from lib.training.learner import Learner, build_learner  # noqa: E402
from lib.training.objective import build_objective  # noqa: E402
from lib.training.plan import build_plan  # noqa: E402
from lib.training.step import clip_gradients  # noqa: E402
from train import forward_backward, train_step  # noqa: E402

WARM_UP = 3
"""Steps that are not timed: DDP lays out its buckets anew after the first one."""

Step = Callable[[Learner, StepBatch, TrainConfig], None]


class SumAfter:
    """Gradients as train.py summed them before it did so within backward: copied into buckets of 25 MiB afterwards.

    All buckets are on their way at once, and their sums are copied back.
    """

    def __init__(self, accelerator: Any, model: torch.nn.Module, _: Any) -> None:
        self.accelerator, self.model = accelerator, model

    def pad(self, pieces: list[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches of an attempt."""
        return pieces

    def begin(self) -> None:
        """Nothing is prepared."""

    def begin_last(self) -> None:
        """Nothing is sent yet."""

    def finish(self, failed: bool, relaxed: bool) -> tuple[bool, bool]:
        """Sum the gradients if no process must repeat the attempt; returns what `Gradients.finish` returns."""
        failed, relaxed = (not value for value in lowest_of_each(self.accelerator, [not failed, not relaxed]))
        if not (failed or relaxed):
            pending = []
            for bucket in buckets([p.grad for p in self.model.parameters() if p.grad is not None]):
                flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
                pending.append((bucket, flat, start_sum(flat)))
            for bucket, flat, work in pending:
                work.wait()
                copy_from(flat, bucket)
        return failed or relaxed, failed


def ddp_step(learner: Learner, batch: StepBatch, config: TrainConfig) -> None:
    """A step as a loop around DDP makes it: gradients are exchanged within backward, and scaled by what DDP divides by."""
    accelerator, state = learner.accelerator, learner.state
    loss = torch.zeros((), device=accelerator.device)
    for index, micro_batch in enumerate(batch.micro_batches):
        seed_everything(config.training.seed, state.step, index, accelerator.process_index)
        loss += forward_backward(learner, micro_batch, batch.weight / accelerator.num_processes)
    norm = clip_gradients(accelerator, learner.optimizer, config.optim.max_grad_norm)
    learner.optimizer.step()
    learner.step_schedule(norm)
    learner.optimizer.zero_grad()
    learner.count_step(batch, loss, norm)


def build(way: str, config: TrainConfig) -> tuple[Learner, Batches, Step]:
    """What train.py builds under this launch, or for DDP the same model wrapped by it."""
    accelerator = build_accelerator(config.device, shards=way == "fsdp2")
    tokenizer = load_tokenizer(config.model)
    with accelerator.main_process_first():
        data = load_data(config.data, tokenizer, ("train", "validation"))
    seed_everything(config.training.seed)
    if way == "after":
        learning.Gradients = SumAfter  # type: ignore[misc, assignment]
    if way == "ddp":  # which sums by itself, and does not know gradients that an embedding table keeps
        learning.Gradients, optimizer.LARGE_TABLE = lambda *_: None, sys.maxsize  # type: ignore[misc, assignment]
    model, _ = build_classifier(config, data, tokenizer, accelerator.device)
    plan = build_plan(config, data, Metrics(("accuracy",), "accuracy"), accelerator)
    learner = build_learner(accelerator, model, build_objective(config.objective, data), plan, config.optim)
    collator = build_collator(tokenizer, accelerator.mixed_precision, accelerator.device)
    batches = Batches(data, collator, learner.objective.weights)
    if way != "ddp":
        return learner, batches, train_step
    learner.model = torch.nn.parallel.DistributedDataParallel(learner.model)
    return learner, batches, ddp_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--weights", type=Path, metavar="FILE", help="keep what was learned")
    options, flags = parser.parse_known_args()
    config = parse_cli(TrainConfig, flags)
    learner, batches, step = build(options.way, config)
    accelerator, measures = learner.accelerator, Measures()
    for number, batch in enumerate(learner.plan.step_batches(batches)):
        if number == WARM_UP:
            accelerator.wait_for_everyone()
            measures.begin_epoch()
        step(learner, batch, config)
        measures.step()
        measures.train_samples += batch.num_samples * (number >= WARM_UP)
    measures.end_epoch()
    model = accelerator.unwrap_model(learner.model)
    with whole_weights(model):
        if accelerator.is_main_process and options.weights:
            torch.save([parameter.detach() for parameter in model.parameters()], options.weights)
    if accelerator.is_main_process:
        print(measures.report(), flush=True)
    finish(accelerator, learner.model, learner.optimizer)


if __name__ == "__main__":
    main()
