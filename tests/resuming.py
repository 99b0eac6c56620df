"""Helpers of the tests of checkpoints and resuming: saved models, interrupted runs, and the comparison of finished ones."""

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from lib.config.sections import ModelConfig
from lib.config.train import TrainingConfig
from lib.model.load import build_model, load_tokenizer
from lib.model.losses import plain_cross_entropy
from lib.run.best_model import publish_model
from lib.run.checkpoint import Checkpointer, list_checkpoints
from lib.runtime.atomic import write_manifest
from lib.training.learner import Learner
from lib.training.objective import Objective
from lib.training.plan import Plan
from lib.training.state import State
from tests.conftest import WORKER_ENV, Command, read_lines, sentences, write_csv

NAMES = ["terrible", "fine", "größer"]
"""Label names of the models that `build` makes."""

TIMING = {"time", "train/samples_per_second", "samples_per_second", "train_seconds", "seconds", "run/peak_memory_gib"}
"""Fields that differ between any two runs."""


def build(folder: Path, seed: int = 0) -> PreTrainedModel:
    """A classifier with the architecture in `folder` and random weights that depend on `seed`."""
    config = ModelConfig(model=str(folder))
    model, _ = build_model(config, NAMES, load_tokenizer(config))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def publish(accelerator: Accelerator, model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Publish `model` as the best model in `folder`, with the tokenizer in `source`."""
    publish_model(accelerator, model, load_tokenizer(ModelConfig(model=str(source))), folder)


def equal_weights(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    weights = second.state_dict()
    return all(torch.equal(weight, weights[name]) for name, weight in first.state_dict().items())


def checkpointer(accelerator: Accelerator, folder: Path, model: PreTrainedModel, **settings: int) -> Checkpointer:
    """A checkpointer of `model` at step 3, with AdamW and a linear schedule."""
    optimizer = AdamW(model.parameters(), lr=1e-3, fused=True)
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / 10)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler.step()
    sizes = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 64} | settings
    state = State(step=3, micro_batch_positions=2, eval_batch_size=16)
    plan = Plan(TrainingConfig(), np.ones(8))
    learner = Learner(accelerator, model, Objective(plain_cross_entropy), optimizer, scheduler, plan, state)
    return Checkpointer(folder, TrainingConfig(), sizes, learner)


def make_checkpoints(folder: Path, *names: str) -> None:
    """Valid checkpoints with these names, each with one file."""
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_text(name)
        write_manifest(folder / name, {})


def run_flags(folder: Path, model: Path) -> list[Any]:
    """Flags of a run that is hard to resume: ragged batches in length groups, evaluations before, at and after an epoch's end."""
    files = [("train", 37), ("validation", 13), ("test", 11)]
    flags: list[Any] = ["--model", model]
    for seed, (split, count) in enumerate(files):
        flags += [f"--{split}_file", write_csv(folder / f"{split}.csv", sentences(count, seed))]
    flags += ["--lr", "1e-2", "--bs", 8, "--epochs", 2, "--logging_steps", 2, "--eval_steps", 3]
    flags += ["--per_device_train_batch_size", 3, "--per_device_eval_batch_size", 4, "--save_total_limit", 1]
    return [*flags, "--mixed_precision", "no", "--report_to", "none"]


def play(
    run: Command,
    folder: Path,
    model: Path,
    calls: list[dict[str, Any]],
    processes: int | None,
    config: str | None = None,
) -> None:
    """Make several calls of train.py in one process group; tests/workers/interrupted.py says what a call holds."""
    plan = folder / "plan.json"
    plan.write_text(json.dumps([call | {"folder": str(folder / call["folder"])} for call in calls]))
    flags = run_flags(folder, model)
    run("tests/workers/interrupted.py", plan, *flags, processes=processes, config=config, env=WORKER_ENV, timeout=400)


def without(value: Any, keys: set[str]) -> Any:
    """`value` without the fields `keys`, at any depth."""
    if isinstance(value, dict):
        return {key: without(item, keys) for key, item in value.items() if key not in keys}
    return [without(item, keys) for item in value] if isinstance(value, list) else value


def same_tensors(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return a == b


def differences(a: Path, b: Path, ignored: frozenset[str] = frozenset()) -> list[str]:
    """Names of what is not bitwise equal between two finished runs; settings and the fields `ignored` may differ."""
    found = []
    (first, *_), (second, *_) = list_checkpoints(a / "checkpoints"), list_checkpoints(b / "checkpoints")
    if first.name != second.name:
        found.append(f"{first.name} and {second.name}")
    names = [
        {str(file.relative_to(path)) for pattern in ("*.safetensors", "*.distcp") for file in path.rglob(pattern)}
        for path in (first, second)
    ]
    found += sorted(names[0] ^ names[1])
    found += [
        name for name in sorted(names[0] & names[1]) if (first / name).read_bytes() != (second / name).read_bytes()
    ]
    tensors = [torch.load(path / "optimizer.pt", weights_only=True) for path in (first, second)]
    if not same_tensors(*tensors):
        found.append("optimizer or schedule")
    for name, keys in (("state.json", TIMING | {"settings"} | ignored), ("results.json", TIMING | ignored)):
        one, two = [
            json.loads(((path if name[0] == "s" else path.parent.parent) / name).read_text())
            for path in (first, second)
        ]
        if without(one, keys) != without(two, keys):
            found.append(name)
    if [without(line, TIMING) for line in read_lines(a / "metrics.jsonl")] != [
        without(line, TIMING) for line in read_lines(b / "metrics.jsonl")
    ]:
        found.append("metrics.jsonl")
    models = [{file.name: file.read_bytes() for file in (run / "model").glob("*.safetensors")} for run in (a, b)]
    if not models[0] or models[0] != models[1]:
        found.append("model")
    return found


def leftovers(folder: Path) -> list[str]:
    """Drafts and files of running processes below the folder of a finished run."""
    found = [path for path in folder.rglob("*") if path.name in ("heartbeats", ".lock") or path.suffix == ".tmp"]
    return [str(path.relative_to(folder)) for path in [*found, *folder.rglob(".tmp-*"), *folder.rglob(".old-*")]]


def become_reaper() -> None:
    """Have Linux give the orphans of this process's children to this process, so that it can wait for them."""
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
