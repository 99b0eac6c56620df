"""Train a tiny model without dropout on data of many sizes; save losses, learning rates and weights.

    world_size.py MODEL OUT MICRO_BATCH_SIZE SIZES FLAGS [FLAGS ...]

SIZES are numbers of samples, 5,19; FLAGS are options of train.py in one word, "--adapter bottleneck". Results are keyed
by (FLAGS, size). Run by tests on one process and, through the launcher, on several.
"""

import dataclasses
import gc
import shlex
import sys
from pathlib import Path

import torch

from lib.config.cli import parse_cli
from lib.config.train import TrainConfig
from lib.data.load import Data, load_data
from lib.model.load import load_tokenizer
from lib.runtime import processes
from lib.runtime.accelerator import build_accelerator
from lib.runtime.device_options import DeviceOptions
from lib.runtime.processes import finish
from lib.runtime.seeds import seed_everything
from lib.training import gradients
from tests import stepping
from tests.conftest import sentences, write_csv
from tests.stepping import build_experiment

# A large epsilon: AdamW divides by the size of the gradient, which amplifies rounding errors where that is near zero.
FIXED = "--lr 1e-2 --adam_epsilon 1e-2 --warmup_steps 1 --lr_scheduler_type cosine --epochs 2 --train_batch_size 16"

HEADER = ("text", "label", "score", "bad", "good", "plot")


def rows() -> list[list[str]]:
    """Sentences with a class, a number and three labels."""
    made = []
    for text, label in sentences(40):
        several = [str(int(word in text.split())) for word in ("bad", "good", "plot")]
        made.append([text, label, str(len(text.split()) / 4), *several])
    return made


def shorten(data: Data, size: int) -> Data:
    train = {"train": data.tokens["train"].select(range(size))}
    return dataclasses.replace(data, tokens=train, lengths={"train": data.lengths["train"][:size]})


def train(accelerator, config: TrainConfig, data: Data) -> dict:
    experiment = build_experiment(config, accelerator, data)
    assert (len(experiment.learner.gradients.buckets) > 1) == (accelerator.num_processes > 1)
    learner, losses, norms, rates = experiment.learner, [], [], []
    for batch in experiment.plan.step_batches(experiment.batches):
        loss, norm = experiment.step(batch)
        losses.append(loss)
        norms.append(norm)
        rates.append(learner.state.learning_rate)
    trained = torch.cat([p.detach().flatten() for p in learner.inner_model.parameters()]).clone()
    accelerator.free_memory(learner.model, learner.optimizer)
    return {"losses": losses, "norms": norms, "rates": rates, "samples": learner.state.samples_seen, "weights": trained}


def main(model_folder: str, out: str, micro_batch_size: str, sizes: str, *all_flags: str) -> None:
    accelerator = build_accelerator(DeviceOptions("no"))
    rank = accelerator.process_index
    stepping.seed_everything = lambda seed: seed_everything(seed + rank)  # another new head: that of process 0 counts
    processes.BUCKET_BYTES, gradients.FIRST_BUCKET = 2048, 512  # many buckets in a tiny model
    gc.freeze()  # `free_memory` collects garbage after each training; it need not scan the imported modules
    fixed = [*FIXED.split(), "--model", model_folder, "--per_device_train_batch_size", micro_batch_size]
    with accelerator.main_process_first():
        for role in ("train", "validation"):
            fixed += [f"--{role}_file", str(write_csv(Path(out) / f"{role}.csv", rows(), HEADER))]
    results: dict = {"world_size": accelerator.num_processes}
    for flags in all_flags:
        config = parse_cli(TrainConfig, [*fixed, *shlex.split(flags)])
        tokenizer = load_tokenizer(config.model)
        with accelerator.main_process_first():
            data = load_data(config.data, tokenizer)
        for size in map(int, sizes.split(",")):
            results[flags, size] = train(accelerator, config, shorten(data, size))
    if accelerator.is_main_process:
        torch.save(results, Path(out) / f"results-{accelerator.num_processes}-{micro_batch_size}.pt")
    finish(accelerator)


if __name__ == "__main__":
    main(*sys.argv[1:])
