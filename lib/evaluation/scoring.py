"""Predict every sample of a split once and score the predictions; the only place where evaluation gathers from processes."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from lib.config.sections import MULTI_LABEL, REGRESSION
from lib.data.batching import Indices
from lib.data.labels.targets import hard_labels
from lib.data.loader import Split, Tensors, build_loader, to_device
from lib.evaluation.batch_size import FLAG, BatchSize, split_batches
from lib.evaluation.calibration import fit_temperature, store_temperature, stored_temperature
from lib.evaluation.predictions import Predictions
from lib.evaluation.scores import compute_metrics
from lib.evaluation.thresholds import has_thresholds, store_thresholds, stored_thresholds, tune_thresholds
from lib.model.forward import compute_logits
from lib.model.losses import PLAIN, Loss
from lib.model.masks import is_padded, with_ready_mask
from lib.model.sharding import is_sharded, without_gradients
from lib.runtime.launch_checks import read_sharding
from lib.runtime.memory import StartAgain, is_out_of_memory
from lib.runtime.precision import cast_weights
from lib.runtime.processes import agree_to_stop, any_process
from lib.runtime.watchdog import beat


class Scored(NamedTuple):
    """The scores of a split and what they were computed from."""

    scores: dict[str, float]
    predictions: Predictions


def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    split: Split,
    metrics: Sequence[str],
    batch_size: BatchSize,
    tune_thresholds_first: bool = False,
    two_classes: bool = False,
    thresholds: np.ndarray | None = None,
) -> Scored:
    """Scores and predictions of a split, equal on every process; metrics are computed once, on the main process.

    A model uses the temperature and the thresholds stored with it. With `tune_thresholds_first`, for validation only, they
    are fitted on this split before, also on the main process, and stored; the threshold of two classes only with
    `two_classes`. `thresholds` are the user's own, in place of those that are stored.
    """
    predictions = predict(accelerator, model, split, batch_size)
    config, problem = accelerator.unwrap_model(model).config, split.problem_type
    found: list[Any] = [None]
    beat("evaluation, scores")
    if accelerator.is_main_process:
        temperature = used = None
        if problem != REGRESSION:
            temperature = fit_temperature(predictions) if tune_thresholds_first else stored_temperature(config)
        predictions = dataclasses.replace(predictions, temperature=temperature)
        if has_thresholds(problem, split.num_outputs):
            tuned = tune_thresholds_first and (problem == MULTI_LABEL or two_classes)
            used = tune_thresholds(predictions) if tuned else stored_thresholds(config)
            used = used if thresholds is None else thresholds
        predictions = dataclasses.replace(predictions, thresholds=used)
        found = [(compute_metrics(predictions, metrics), temperature, used)]
    scores, temperature, used = broadcast_object_list(found)[0]
    if tune_thresholds_first and temperature is not None:
        store_temperature(config, temperature)
    if tune_thresholds_first and used is not None:
        store_thresholds(config, used)
    given = thresholds is not None
    return Scored(
        scores, dataclasses.replace(predictions, temperature=temperature, thresholds=used, thresholds_given=given)
    )


def predict(accelerator: Accelerator, model: nn.Module, split: Split, batch_size: BatchSize) -> Predictions:
    """Logits and loss of every sample of a split, each computed once, by one of the processes.

    Batches depend only on the lengths of the texts and on `batch_size`, so any number of processes computes the same
    numbers. Each process writes its samples into zeros and the arrays are summed; a count of writes proves that no sample
    is missing or counted twice. After an out-of-memory error, batches are halved on all processes; of a model in shards,
    by the next start, for which StartAgain is raised. Raises RuntimeError if a sample is missing or counted twice, Stopped
    if a process was asked to stop.
    """
    started = time.perf_counter()
    training = {module: module.training for module in model.modules()}
    model.eval()
    results = None
    with cast_weights(model, "no" if is_sharded(model) else accelerator.mixed_precision):
        while results is None:
            try:
                results = predict_table(accelerator, model, split, split_batches(split, batch_size))
            except (RuntimeError, MemoryError) as error:  # of a model in shards: else there are no results
                if not is_out_of_memory(error):
                    raise
                smaller = batch_size.halved(split.positions, split.packed)
                raise StartAgain(smaller.name, smaller.number, FLAG) from error
            if results is None:
                batch_size = batch_size.halved(split.positions, split.packed)
    for module, mode in training.items():
        module.training = mode
    summed = results if accelerator.num_processes == 1 else accelerator.reduce(results, "sum")  # else a copy
    table = summed.cpu().numpy()
    check_counts(table[:, -1])
    seconds = time.perf_counter() - started
    wanted = np.asarray(split.tokens["labels"][:])
    labels = hard_labels(wanted, split.problem_type)
    targets = None if np.array_equal(labels, wanted) else wanted.astype(np.float64)  # of soft labels
    labels = labels.astype(np.float32 if split.problem_type == REGRESSION else np.int64)
    logits, losses = table[:, : split.num_outputs], table[:, split.num_outputs]
    return Predictions(logits, labels, losses, batch_size, seconds, split.problem_type, targets=targets)


def predict_table(
    accelerator: Accelerator, model: nn.Module, split: Split, batches: list[Indices]
) -> torch.Tensor | None:
    """Logits, loss and a one for each sample of this process, zeros elsewhere; None after an out-of-memory error."""
    results = torch.zeros(len(split.tokens), split.num_outputs + 2, device=accelerator.device)
    loss = PLAIN[split.problem_type]

    def compute(indices: torch.Tensor, batch: Tensors) -> None:
        rows = predict_batch(model, batch, loss, split.unpadded)
        results.index_add_(0, indices, rows[: len(indices)])  # none of a stand-in

    with without_gradients(model):
        masked = None if split.unpadded or split.packed else model
        return results if share_batches(accelerator, split, batches, compute, "evaluation", masked) else None


def predict_batch(model: nn.Module, batch: Tensors, loss: Loss, unpadded: bool) -> torch.Tensor:
    """float32 (samples, outputs + 2): logits, loss, and a one."""
    inputs = dict(batch)
    labels = inputs.pop("labels")
    logits = compute_logits(model, inputs, unpadded)
    losses = loss(logits, labels)
    return torch.cat([logits, losses[:, None], torch.ones_like(losses)[:, None]], dim=1)


def share_batches(
    accelerator: Accelerator,
    split: Split,
    batches: list[Indices],
    compute: Callable[[torch.Tensor, Tensors], None],
    what: str,
    masked: nn.Module | None = None,
) -> bool:
    """Call `compute` with the indices and tensors of each batch of this process; False after an out-of-memory error.

    The tensors hold the mask that is ready for `masked`, where one is given.
    All processes advance from batch to batch together, so they can agree to stop, or to start again with smaller batches.
    Where a model is in shards, all of them compute every time: one that has no batch left gets a text and no indices; and
    an out-of-memory error is raised, since the others cannot be told.
    """
    rounds, sharding = -(-len(batches) // accelerator.num_processes), read_sharding()
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    own = len(mine)
    if sharding and own < rounds:
        mine = [*mine, batches[0][-1:]]
    loader = iter(build_loader(split.tokens, mine, split.collator))
    places: Sequence[torch.Tensor] = ()
    for index in range(rounds):
        beat(f"{what}, batch {index + 1} of {rounds}")
        agree_to_stop(accelerator)
        failed = False
        if index < len(mine):
            try:
                places = places or place_once(mine, accelerator.device)
                tensors = next(loader)
                batch = to_device(tensors, accelerator.device)
                if masked is not None:  # by itself it would look for padding, and wait for the device
                    batch = with_ready_mask(masked, batch, accelerator.mixed_precision, is_padded(tensors))
                compute(places[index] if index < own else places[index][:0], batch)
            except (RuntimeError, MemoryError) as error:
                if sharding or not is_out_of_memory(error):
                    raise
                failed = True
        if any_process(accelerator, failed):
            return False
    return True


def place_once(batches: list[Indices], device: torch.device) -> Sequence[torch.Tensor]:
    """The indices of all batches on `device`, by one copy: each copy from memory that is not pinned waits for a GPU."""
    return torch.from_numpy(np.concatenate(batches)).to(device).split([len(batch) for batch in batches])


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
