"""Gradients of a step, summed over processes while the backward pass still runs."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lib.data.loader import MicroBatch
from lib.errors import UserError, first_line
from lib.runtime.memory import is_out_of_memory
from lib.runtime.processes import buckets, lowest_of_each, start_sum
from lib.training.working_weights import WorkingWeights

logger = logging.getLogger(__name__)

FIRST_BUCKET = 2**20
"""Bytes of the first bucket: a small one, so that sending begins early, as in DDP (Li et al. 2020)."""
AT_ONCE = 16 * 2**20
"""Bytes of gradients that wait within a backward pass to be moved together."""


class Bucket:
    """The gradients of some parameters, of one dtype, in one piece of memory that is summed at once."""

    def __init__(self, number: int, parameters: Sequence[nn.Parameter]) -> None:
        self.number, self.parameters = number, parameters
        sizes, first = [parameter.numel() for parameter in parameters], parameters[0]
        self.flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        self.views = {
            parameter: part.as_strided(parameter.shape, strides_of_gradient(parameter), part.storage_offset())
            for part, parameter in zip(self.flat.split(sizes), parameters, strict=True)
        }
        for parameter, view in self.views.items():
            if parameter.grad is not None:  # of a large embedding table, which keeps it: moved into the bucket
                parameter.grad.set_(view)
        self.awaited: set[nn.Parameter] = set()
        """Parameters whose gradient must arrive before the bucket is sent within a backward pass."""
        self.pending: Any = None
        """The sum under way."""


class Gradients:
    """Every process's gradients while it computes them; after `finish` their sum over all processes.

    From its first micro-batch on, the gradient of a parameter lies in a bucket. Within the last backward pass of a step, a
    bucket is sent as soon as it is full and all before it are sent, so that all processes send in the same order. **Every
    process sends every bucket once an attempt**, whatever becomes of its backward pass: none waits for one that gave up. A
    parameter that some process did not use, as with LayerDrop, counts as zero there; one that no process used is left
    without gradient. One process alone sends nothing, and has no buckets.

    The gradients of the copies of `working` are added to those of their weights, in float32, before a backward pass ends.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, working: WorkingWeights | None = None) -> None:
        self.accelerator, self.working = accelerator, working
        alone = accelerator.num_processes == 1
        trained = [] if alone else [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Backward goes from the head to the embeddings.
        self.buckets = [Bucket(*numbered) for numbered in enumerate(buckets(trained[::-1], FIRST_BUCKET))]
        self.bucket_of = {parameter: bucket for bucket in self.buckets for parameter in bucket.parameters}
        self.used: set[nn.Parameter] = set()
        """Parameters that this process used in this attempt."""
        self.ever_used: set[nn.Parameter] = set()
        """Parameters that any process used in a step so far: only these are waited for."""
        self.sent = 0
        """Buckets sent in this attempt."""
        self.overlapping = True
        """Whether buckets are sent within the last backward pass; else after it. The same on all processes."""
        self.is_last = self.is_late = False
        self.waiting: list[tuple[nn.Parameter, nn.Parameter]] = []
        """Parameters whose gradients are to be moved, each with what holds its gradient: itself, or its copy."""
        self.waiting_bytes = 0
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(functools.partial(self.arrived, parameter))
        for parameter, copy in working.of.items() if working else ():
            copy.register_post_accumulate_grad_hook(functools.partial(self.arrived, parameter))

    def pad(self, pieces: list[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches of an attempt: processes need not have as many."""
        return pieces

    def begin(self) -> None:
        """An attempt at a step begins: no parameter has a gradient yet."""
        self.used.clear()
        self.waiting, self.waiting_bytes = [], 0  # of an attempt that failed
        self.sent, self.is_last, self.is_late = 0, False, False
        for bucket in self.buckets:
            bucket.pending = None
            bucket.awaited = set(bucket.parameters) & (self.ever_used or self.bucket_of.keys())

    def begin_last(self) -> None:
        """The last micro-batch of the attempt comes next: what its backward pass completes is sent."""
        self.is_last = self.overlapping

    def arrived(self, parameter: nn.Parameter, holder: nn.Parameter) -> None:
        """The gradient of a micro-batch was added to `holder.grad`, of `parameter` or its copy; autograd calls this."""
        bucket = self.bucket_of.get(parameter)
        gradient = holder.grad
        if gradient is not None and (bucket is None or gradient.data_ptr() != bucket.views[parameter].data_ptr()):
            if not self.waiting:
                torch.autograd.Variable._execution_engine.queue_callback(self.end_backward)
            self.waiting.append((parameter, holder))
            self.waiting_bytes += gradient.nbytes
            if self.waiting_bytes >= AT_ONCE:
                self.move()
        self.used.add(parameter)
        if bucket is None or not self.is_last:
            return
        if bucket.number < self.sent:
            self.is_late = True
        bucket.awaited.discard(parameter)
        while self.sent < len(self.buckets) and not self.buckets[self.sent].awaited:
            self.send()

    def end_backward(self) -> None:
        """A backward pass is over: all gradients lie where the loop expects them."""
        self.move()
        if self.working is not None:
            self.working.lent = False

    @torch.no_grad()
    def move(self) -> None:
        """Move the gradients that wait into their places, in float32, in a few calls for all of them."""
        waiting, self.waiting, self.waiting_bytes = self.waiting, [], 0
        moved: dict[torch.dtype, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        added: list[tuple[nn.Parameter, torch.Tensor]] = []
        for parameter, holder in waiting:
            gradient: Any = holder.grad
            if holder is not parameter:
                holder.grad = None
                if parameter.grad is not None:
                    added.append((parameter, gradient))
                    continue
            place = self.bucket_of[parameter].views[parameter] if self.buckets else torch.empty_like(parameter)
            moved.setdefault(gradient.dtype, []).append((place, gradient))
            parameter.grad = place
        for pairs in moved.values():
            torch._foreach_copy_([place for place, _ in pairs], [gradient for _, gradient in pairs])
        if added:
            sums: Any = [parameter.grad for parameter, _ in added]
            torch._foreach_add_(sums, [gradient for _, gradient in added])

    def send(self) -> None:
        """Start the sum of the next bucket over all processes.

        Raises UserError if memory is short just then: the others may have begun this sum, so that it cannot be tried again.
        """
        self.move()
        bucket = self.buckets[self.sent]
        for parameter in bucket.parameters:
            if parameter not in self.used:
                bucket.views[parameter].zero_()
        try:
            bucket.pending = start_sum(bucket.flat)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"out of memory where processes sum their gradients, which cannot be tried again: {first_line(error)}\n"
                "Try a smaller --per_device_train_batch_size, which leaves room for that"
            ) from error
        self.sent += 1

    def finish(self, failed: bool, relaxed: bool) -> tuple[bool, bool]:
        """Send what is left and wait for the sums; every process must call this at the end of an attempt.

        `failed`: this process was short of memory; `relaxed`: it must repeat the attempt for another reason. Returns whether
        all processes must repeat it, and whether memory was short on any. If not, gradients are the sums.
        """
        self.is_last = False
        while self.sent < len(self.buckets):
            self.send()
        unused = [parameter not in self.used for parameter in self.bucket_of]
        word = lowest_of_each(self.accelerator, [not failed, not relaxed, not self.is_late, *unused])
        for bucket in self.buckets:
            bucket.pending.wait()
        failed, relaxed, late = (not value for value in word[:3])
        if not (failed or relaxed):
            used = [parameter for parameter, unused in zip(self.bucket_of, word[3:], strict=True) if not unused]
            # Late are the gradients of a second backward pass, or of a parameter that nobody used, or waited for, so far.
            if late and (not self.ever_used or self.ever_used.issuperset(used)):
                self.overlapping = False
                logger.info("a micro-batch runs several backward passes: gradients are summed after the last one")
            self.ever_used.update(used)
            for parameter in used:
                parameter.grad = self.bucket_of[parameter].views[parameter]
        return failed or relaxed or late, failed


def strides_of_gradient(parameter: nn.Parameter) -> tuple[int, ...]:
    """The strides that autograd gives the gradient of `parameter`, and fused AdamW expects."""
    return torch.empty_like(parameter, device="meta").stride()
