"""A run with all that makes resuming hard, and the comparison of two finished runs."""

import json
from pathlib import Path
from typing import Any

import torch

from lib.run.checkpoint import list_checkpoints
from tests.conftest import read_lines, sentences, write_csv

TIMING = {"time", "train/samples_per_second", "samples_per_second", "train_seconds", "seconds", "run/peak_memory_gib"}


def run_flags(folder: Path, model: Path) -> list[Any]:
    """Ragged batches and micro-batches, length groups, evaluations before, at and after the ends of epochs."""
    files = [("train", 37), ("validation", 13), ("test", 11)]
    flags: list[Any] = ["--model", model]
    for seed, (split, count) in enumerate(files):
        flags += [f"--{split}_file", write_csv(folder / f"{split}.csv", sentences(count, seed))]
    flags += ["--lr", "1e-2", "--bs", 8, "--epochs", 2, "--logging_steps", 2, "--eval_steps", 3]
    flags += ["--per_device_train_batch_size", 3, "--per_device_eval_batch_size", 4, "--save_total_limit", 1]
    return [*flags, "--mixed_precision", "no", "--report_to", "none"]


def without(value: Any, keys: set[str]) -> Any:
    """`value` without the times and names that differ between any two runs."""
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
    """What is not equal, bit by bit, between two finished runs; settings and the fields `ignored` may differ."""
    found = []
    (first, *_), (second, *_) = list_checkpoints(a / "checkpoints"), list_checkpoints(b / "checkpoints")
    if first.name != second.name:
        found.append(f"{first.name} and {second.name}")
    names = [{str(file.relative_to(path)) for file in path.rglob("*.safetensors")} for path in (first, second)]
    found += sorted(names[0] ^ names[1])
    found += [
        name for name in sorted(names[0] & names[1]) if (first / name).read_bytes() != (second / name).read_bytes()
    ]
    tensors = [torch.load(path / "optimizer.pt", weights_only=True) for path in (first, second)]
    if not same_tensors(*tensors):
        found.append("optimizer or schedule")
    for name, keys in (("state.json", TIMING | {"settings"} | ignored), ("results.json", TIMING)):
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
    if (a / "model" / "model.safetensors").read_bytes() != (b / "model" / "model.safetensors").read_bytes():
        found.append("model")
    return found
