"""Predict every sample of a split once, and score the predictions: the only place where processes put results together."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION
from lib.data.batching import Indices, eval_batches
from lib.data.load import Data
from lib.data.loader import Collator, build_loader
from lib.evaluation.predictions import Predictions
from lib.evaluation.scores import compute_metrics
from lib.evaluation.thresholds import store_thresholds, stored_thresholds, tune_thresholds
from lib.model.forward import compute_logits
from lib.model.losses import PLAIN, Loss
from lib.runtime.memory import halve, is_out_of_memory
from lib.runtime.precision import cast_weights
from lib.runtime.processes import agree_to_stop, any_process
from lib.runtime.watchdog import beat

Scored = tuple[dict[str, float], Predictions]
"""The scores of a split and what they were computed from."""


def predict(
    accelerator: Accelerator,
    model: nn.Module,
    tokens: Dataset,
    lengths: np.ndarray,
    collator: Collator,
    batch_size: int,
    num_classes: int,
    problem_type: str = CLASSIFICATION,
) -> Predictions:
    """Logits and loss of every sample of `tokens`, each computed once, by one of the processes.

    `lengths` counts the positions of each. Batches depend on them and on the batch size alone, so that any number of
    processes computes the very same numbers. Each process writes its samples into zeros and the arrays are added up; the
    count of writes proves that none is missing or double. Where memory is too short, batches are halved on all
    processes. Raises RuntimeError if a sample is missing or double, Stopped when a process is asked to stop.
    """
    started = time.perf_counter()
    training = {module: module.training for module in model.modules()}
    model.eval()
    results = None
    with cast_weights(model, accelerator.mixed_precision):
        while results is None:
            batches = eval_batches(lengths, batch_size)
            results = predict_table(accelerator, model, tokens, batches, collator, num_classes, PLAIN[problem_type])
            if results is None:
                batch_size = halve(min(batch_size, len(tokens)), "--per_device_eval_batch_size")
    for module, mode in training.items():
        module.training = mode
    table = accelerator.reduce(results, "sum").cpu().numpy()
    check_counts(table[:, -1])
    seconds = time.perf_counter() - started
    labels = np.asarray(tokens["labels"][:], dtype=np.float32 if problem_type == REGRESSION else np.int64)
    return Predictions(table[:, :num_classes], labels, table[:, num_classes], batch_size, seconds, problem_type)


@torch.inference_mode()
def predict_table(
    accelerator: Accelerator,
    model: nn.Module,
    tokens: Dataset,
    batches: list[Indices],
    collator: Collator,
    num_classes: int,
    loss: Loss,
) -> torch.Tensor | None:
    """Logits, loss and a one for each sample of this process, zeros elsewhere; None when memory was too short for one."""
    results = torch.zeros(len(tokens), num_classes + 2, device=accelerator.device)

    def compute(indices: torch.Tensor, batch: dict[str, torch.Tensor]) -> None:
        results.index_add_(0, indices, predict_batch(model, batch, accelerator.device, loss))

    return results if share_batches(accelerator, tokens, batches, collator, compute, "evaluation") else None


def share_batches(
    accelerator: Accelerator,
    tokens: Any,
    batches: list[Indices],
    collator: Collator,
    compute: Callable[[torch.Tensor, dict[str, torch.Tensor]], None],
    what: str,
) -> bool:
    """Call `compute` with the indices and tensors of each batch that falls to this process; False when one did not fit.

    All processes go from batch to batch together, so that they can agree to stop or to start again with smaller ones.
    """
    rounds = -(-len(batches) // accelerator.num_processes)
    batches = batches[accelerator.process_index :: accelerator.num_processes]
    loader = iter(build_loader(tokens, batches, collator))
    for index in range(rounds):
        beat(f"{what}, batch {index + 1} of {rounds}")
        agree_to_stop(accelerator)
        failed = False
        if index < len(batches):
            try:
                compute(torch.from_numpy(batches[index].copy()).to(accelerator.device), next(loader))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = True
        if any_process(accelerator, failed):
            return False
    return True


def predict_batch(model: nn.Module, batch: dict[str, torch.Tensor], device: torch.device, loss: Loss) -> torch.Tensor:
    """float32 (samples, classes + 2): logits, loss, and a one."""
    inputs = dict(batch)
    labels = inputs.pop("labels").to(device, non_blocking=True)
    logits = compute_logits(model, inputs, device)
    losses = loss(logits, labels)
    return torch.cat([logits, losses[:, None], torch.ones_like(losses)[:, None]], dim=1)


def check_counts(counts: np.ndarray) -> None:
    """Raise RuntimeError unless every sample was evaluated exactly once."""
    missing, double = np.flatnonzero(counts == 0), np.flatnonzero(counts > 1)
    if len(missing) or len(double):
        raise RuntimeError(
            f"evaluation is not complete: {len(missing)} samples missing (first {missing[:3].tolist()}), "
            f"{len(double)} counted more than once (first {double[:3].tolist()})"
        )


def prefix(split: str) -> str:
    """The word before the slash in the keys of a split's scores: `eval/accuracy` for validation, as Trainer has it."""
    return "eval" if split == "validation" else split


def evaluate_split(
    accelerator: Accelerator,
    model: nn.Module,
    data: Data,
    split: str,
    collator: Collator,
    batch_size: int,
    metrics: Sequence[str],
    tune: bool = False,
) -> Scored:
    """Scores and predictions of a split, equal on every process; metrics are computed once, on the main process.

    Where a text may have several labels, their thresholds are those that the model brings along; with `tune`, which is for
    validation alone, they are tuned on this split first and handed to the model, which is then saved with them.
    """
    tokens, lengths, problem = data.tokens[split], data.positions(split), data.problem_type
    predictions = predict(accelerator, model, tokens, lengths, collator, batch_size, len(data.label_names), problem)
    if problem == MULTI_LABEL:
        config = accelerator.unwrap_model(model).config
        if tune:
            store_thresholds(config, tune_thresholds(predictions))
        predictions = dataclasses.replace(predictions, thresholds=stored_thresholds(config))
    scores = [compute_metrics(predictions, metrics) if accelerator.is_main_process else None]
    return broadcast_object_list(scores)[0], predictions
