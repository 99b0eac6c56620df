"""What an optimizer step needs besides its forward and backward in train.py: retries when memory is short, and clipping."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from lib.data.loader import MicroBatch, StepBatch
from lib.model.masks import is_padded, with_ready_mask
from lib.model.sharding import is_sharded, norm_over_shards, own_part
from lib.runtime.determinism import demand, relax
from lib.runtime.memory import StartAgain, halve, has_own_memory, is_out_of_memory
from lib.runtime.processes import lowest
from lib.runtime.watchdog import beat
from lib.training.learner import Learner
from lib.training.memory_forecast import lighter_methods

ForwardBackward = Callable[[Learner, MicroBatch, float], torch.Tensor]
"""(learner, micro-batch, weight of the whole step) -> summed loss; adds to the gradients of the parameters."""

MICRO_BATCHES = "--per_device_train_batch_size"
"""The flag that makes micro-batches smaller."""


class Attempt:
    """One try at the gradients of a step: `with attempt as micro_batches` swallows errors after which another may succeed.

    These are a lack of memory, and an operation that has no deterministic algorithm, which is allowed from then on. Where
    the model is in shards, a lack of memory raises StartAgain.
    """

    def __init__(self, learner: Learner, batch: StepBatch) -> None:
        self.learner, self.batch = learner, batch
        self.failed = False
        """Whether memory was too short."""
        self.relaxed = False
        """Whether an operation had no deterministic algorithm."""
        self.loss = torch.zeros((), device=learner.accelerator.device)
        """Summed loss of the micro-batches so far."""

    def __enter__(self) -> Iterator[MicroBatch]:
        demand(strict=True)
        self.learner.gradients.begin()
        self.learner.working.refresh()
        return self.micro_batches()

    def micro_batches(self) -> Iterator[MicroBatch]:
        """The share of this process on its device; other processes may have more micro-batches, or fewer."""
        learner = self.learner
        pieces = learner.gradients.pad(self.batch.pieces(learner.state.micro_batch_positions))
        for index, piece in enumerate(pieces):
            if index == len(pieces) - 1:
                learner.gradients.begin_last()
            moved = piece.to(learner.accelerator.device)
            precision, padded = learner.accelerator.mixed_precision, is_padded(piece.inputs)
            inputs = with_ready_mask(learner.model, moved.inputs, precision, padded)
            yield dataclasses.replace(moved, inputs=inputs)

    def __exit__(self, _: Any, error: BaseException | None, trace: TracebackType | None) -> bool:
        demand(strict=False)
        self.learner.working.expire()
        if self.learner.graphs.recording:
            return False
        self.failed, self.relaxed = is_out_of_memory(error), relax(error)
        if self.failed and is_sharded(self.learner.model):
            smaller = halve(self.largest(), MICRO_BATCHES, "positions")
            raise StartAgain("micro_batch_positions", smaller, MICRO_BATCHES) from error
        return self.failed or self.relaxed

    def largest(self) -> int:
        """Positions of the largest micro-batch that can still be cut, 0 if there is none."""
        pieces = self.batch.pieces(self.learner.state.micro_batch_positions)
        return max((piece.positions for piece in pieces if len(piece) > 1), default=0)


def attempts(learner: Learner, batch: StepBatch, phase: str = "") -> Iterator[Attempt]:
    """Attempts at the gradients of a step until one succeeds on all processes; `phase` is what the watchdog shows.

    The gradients of every process are then the sum over all of them. If an attempt fails, all processes drop their gradients
    and try again: where memory was too short, with at most half the positions per forward. That limit is kept: later steps
    of longer texts are cut, those of shorter ones are not. Raises UserError if a single sample does not fit.
    """
    accelerator, state = learner.accelerator, learner.state
    beat(phase or f"step {state.step + 1}")
    while True:
        attempt = Attempt(learner, batch)
        yield attempt
        again, failed = learner.gradients.finish(attempt.failed, attempt.relaxed)  # the same on all processes
        if not again:
            return
        learner.optimizer.zero_grad()
        if failed:
            # A process whose share did fit has no say.
            largest = lowest(accelerator, attempt.largest() if attempt.failed else sys.maxsize)
            remedies = ", ".join(method.flags for method in lighter_methods(learner.inner_model))
            state.micro_batch_positions = halve(largest, MICRO_BATCHES, "positions", remedies)


def try_longest_batch(learner: Learner, batch: StepBatch, forward_backward: ForwardBackward) -> None:
    """On a GPU, forward and backward of the longest samples, so that a lack of memory shows now; nothing is learned.

    Room is left for AdamW's two moments, which the first step makes. An operation without a deterministic algorithm shows
    now, too.
    """
    accelerator, model = learner.accelerator, learner.model
    if not has_own_memory(accelerator.device):
        return
    trained = sum(own_part(p).nbytes for p in model.parameters() if p.requires_grad)
    made = bool(learner.optimizer.state)
    moments = None if made else torch.empty(2 * trained, dtype=torch.uint8, device=accelerator.device)
    for attempt in attempts(learner, batch, "trying the longest batch"):
        with attempt as micro_batches:
            for micro_batch in micro_batches:
                forward_backward(learner, micro_batch, batch.weight)
    learner.optimizer.zero_grad()
    del moments


def clip_gradients(accelerator: Accelerator, optimizer: Any, max_norm: float | None) -> torch.Tensor:
    """Have the next step of AdamW clip the gradients to `max_norm` (None: not), or change nothing if they are not finite.

    Nothing waits for the device: fused AdamW reads a divisor and a flag that lie there, as GradScaler sets them. With fp16
    there is a GradScaler, which unscales the gradients here and skips such a step by itself. Returns the norm before
    clipping, on the device.
    """
    limit = max_norm or math.inf
    inner = getattr(optimizer, "optimizer", optimizer)
    if accelerator.scaler is not None:
        accelerator.scaler.unscale_(inner)
    if accelerator.scaler is not None or not inner.defaults.get("fused"):
        return nn.utils.clip_grad_norm_([p for group in inner.param_groups for p in group["params"]], limit)
    gradients = inner.gradients()
    norm = norm_over_shards(gradient_norm([part for g in gradients if (part := own_part(g)).numel()]), gradients)
    inner.found_inf = (~torch.isfinite(norm)).float()
    inner.grad_scale = None if math.isinf(limit) else ((norm + 1e-6) / limit).clamp(min=1.0)
    return norm


def gradient_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all numbers in `gradients`.

    On a CPU the squares of a block of 512 numbers are added in float32, and the sums of blocks in float64. Whatever the
    order within a block, the relative error is at most 512 * 2^-25 = 1.5e-5 (Higham 2002, 4.2). A block belongs to one
    thread, so that the bits do not depend on their number. `vector_norm` and `dot` of a whole embedding table are up to
    5e-4 off: they add millions of squares to a few float32 sums, as many as the processor and its BLAS like.
    """
    block = 512
    if not gradients or any(gradient.device.type != "cpu" for gradient in gradients):
        return nn.utils.get_total_norm(gradients)
    norms = []
    for gradient in gradients:
        numbers = gradient.reshape(-1)
        whole = len(numbers) // block * block
        if whole:
            norms.append(torch.linalg.vector_norm(numbers[:whole].view(-1, block), dim=1))
        if whole < len(numbers):
            norms.append(torch.linalg.vector_norm(numbers[whole:]).view(1))
    total = np.square(torch.cat(norms).double().numpy()).sum()  # by numpy: on one thread, without BLAS
    return torch.tensor(np.sqrt(total), dtype=torch.float32)
