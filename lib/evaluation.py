"""Predict every sample of a split once, and score the predictions: the only place where processes put results together."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn

from lib.batching import Collator, Indices, build_loader, eval_batches
from lib.config import UserError
from lib.data import Data
from lib.losses import PLAIN, Loss
from lib.memory import halve, is_out_of_memory
from lib.processes import agree_to_stop, any_process
from lib.watchdog import beat
from lib.windows import compute_logits

METRICS = Path(__file__).parent / "metrics"
AVERAGES = ("macro", "micro", "weighted")


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Results of a split in input order, equal on every process.

    `logits` float32 (samples, classes); `labels` int64 (samples,); `losses` float32 (samples,): those of `losses.PLAIN`,
    cross entropy in nats.
    """

    logits: np.ndarray
    labels: np.ndarray
    losses: np.ndarray
    batch_size: int = 0
    """Samples per forward that memory was enough for."""
    seconds: float = 0.0
    """From tokens at hand to results at hand."""

    @property
    def predicted(self) -> np.ndarray:
        return self.logits.argmax(axis=1)

    @property
    def probabilities(self) -> np.ndarray:
        """float64 (samples, classes), rows summing to 1."""
        shifted = np.exp(self.logits.astype(np.float64) - self.logits.max(axis=1, keepdims=True))
        return shifted / shifted.sum(axis=1, keepdims=True)


def predict(
    accelerator: Accelerator,
    model: nn.Module,
    tokens: Dataset,
    lengths: np.ndarray,
    collator: Collator,
    batch_size: int,
    num_classes: int,
    loss: Loss,
) -> Predictions:
    """Logits and loss of every sample of `tokens`, each computed once, by one of the processes.

    Batches depend on lengths and batch size alone, so that any number of processes computes the very same numbers. Each
    process writes its samples into zeros and the arrays are added up; the count of writes proves that none is missing or
    double. Where memory is too short, batches are halved on all processes. Raises RuntimeError if a sample is missing or
    double, Stopped when a process is asked to stop.
    """
    started = time.perf_counter()
    training = {module: module.training for module in model.modules()}
    model.eval()
    results = None
    while results is None:
        batches = eval_batches(lengths, batch_size)
        results = predict_table(accelerator, model, tokens, batches, collator, num_classes, loss)
        if results is None:
            batch_size = halve(min(batch_size, len(tokens)), "--per_device_eval_batch_size")
    for module, mode in training.items():
        module.training = mode
    table = accelerator.reduce(results, "sum").cpu().numpy()
    check_counts(table[:, -1])
    seconds = time.perf_counter() - started
    labels = np.asarray(tokens["labels"], dtype=np.int64)
    return Predictions(table[:, :num_classes], labels, table[:, num_classes], batch_size, seconds)


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
    """Logits, loss and a one for each sample of this process, zeros elsewhere; None when memory was too short for one.

    All processes go from batch to batch together, so that they can agree to stop or to start again with smaller ones.
    """
    rounds = -(-len(batches) // accelerator.num_processes)
    batches = batches[accelerator.process_index :: accelerator.num_processes]
    results = torch.zeros(len(tokens), num_classes + 2, device=accelerator.device)
    loader = iter(build_loader(tokens, batches, collator))
    for index in range(rounds):
        beat(f"evaluation, batch {index + 1} of {rounds}")
        agree_to_stop(accelerator)
        failed = False
        if index < len(batches):
            try:
                rows = predict_batch(model, next(loader), accelerator.device, loss)
                results.index_add_(0, torch.from_numpy(batches[index].copy()).to(accelerator.device), rows)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = True
        if any_process(accelerator, failed):
            return None
    return results


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


def compute_metrics(predictions: Predictions, names: Sequence[str]) -> dict[str, float]:
    """`loss` (mean over samples, unweighted) and each metric of `names`, through the `evaluate` interface.

    Raises UserError for a metric that is not one of ours.
    """
    scores = {"loss": float(predictions.losses.astype(np.float64).mean())}
    for name in names:
        scores |= compute_metric(name, predictions.predicted, predictions.labels, predictions.logits.shape[1])
    return scores


def compute_metric(name: str, predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> dict[str, float]:
    """A metric by its name; a module may give several values."""
    module, settings = metric_settings(name, num_classes)
    result = load_metric(module).compute(predictions=predicted, references=labels, **settings)
    return {name if key == module else key: float(value) for key, value in result.items() if np.ndim(value) == 0}


def metric_settings(name: str, num_classes: int) -> tuple[str, dict[str, Any]]:
    """Module and settings of a metric: `f1_macro` is f1 averaged over all classes, `f1` that of class 1 of two.

    Raises UserError for f1, precision or recall of more than two classes without a way to average.
    """
    module, _, average = name.rpartition("_")
    module, average = (module, average) if average in AVERAGES else (name, "")
    if module not in ("f1", "precision", "recall"):
        return name, {}
    if average:
        return module, {"average": average, "labels": list(range(num_classes))}
    if num_classes != 2:
        raise UserError(f"--metrics {name} is for two classes, the data has {num_classes}; use {name}_macro")
    return module, {"average": "binary"}


def check_metrics(names: Sequence[str], num_classes: int) -> None:
    """Raise UserError for a metric that cannot be computed, before a run depends on it."""
    for name in names:
        module, _ = metric_settings(name, num_classes)
        if not (METRICS / module).is_dir():
            load_metric(module)


def load_metric(module: str) -> Any:
    """An `evaluate` module of ours, by its path. Raises UserError for others: one of the Hub is a program, run unseen."""
    ours = sorted(folder.name for folder in METRICS.iterdir() if folder.is_dir() and folder.name[0] != "_")
    if module not in ours:
        raise UserError(
            f"--metrics {module}: not one of ours ({', '.join(ours)}). Metrics of the Hub are programs and are not run; "
            f"read the one you mean, and put it into lib/metrics as {module}/{module}.py"
        )
    import evaluate  # takes seconds to import

    return evaluate.load(str(METRICS / module), keep_in_memory=True)


def evaluate_split(
    accelerator: Accelerator,
    model: nn.Module,
    data: Data,
    split: str,
    collator: Collator,
    batch_size: int,
    metrics: Sequence[str],
) -> tuple[dict[str, float], Predictions]:
    """Scores and predictions of a split, equal on every process; metrics are computed once, on the main process."""
    tokens, lengths, loss = data.tokens[split], data.lengths[split], PLAIN[data.problem_type]
    predictions = predict(accelerator, model, tokens, lengths, collator, batch_size, len(data.label_names), loss)
    scores = [compute_metrics(predictions, metrics) if accelerator.is_main_process else None]
    return broadcast_object_list(scores)[0], predictions
