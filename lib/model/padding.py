"""Whether padding and the other texts of a batch change a model's logits, tried on the model itself."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from lib.model.forward import Inputs, compute_logits
from lib.model.frozen_weights import widened
from lib.model.sharding import is_sharded, without_gradients
from lib.runtime.memory import is_out_of_memory

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest difference between logits, relative to the largest logit, that counts as rounding."""

FAILURES = (RuntimeError, ValueError, IndexError)
"""What models raise for a length that they do not take."""

UNPADDED = ("padding", "batch")
"""What is found in models that run texts of one length together, without padding."""

NOTES = {  # the worst first
    "length": "warning: this model takes no short text without padding, and may see the padding: scores and predictions "
    "change with --per_device_eval_batch_size; --pad_to_max_length in training and evaluation gives all texts one length",
    "batch": "warning: the logits of this model depend on the other texts of a batch, without padding too: scores and "
    "predictions change with --per_device_eval_batch_size",
    "padding": "padding changes the logits of this model: evaluation and prediction run texts of one length together, "
    "without padding; in training, a text still depends on the longest of its batch",
}


def same_logits(logits: torch.Tensor, others: torch.Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether logits that were computed in `dtype` are equal up to rounding."""
    return bool((logits - others).abs().max() <= TOLERANCE[dtype] * logits.abs().max())


def find_leak(model: Any, alone: Inputs, twice: Inputs, padded: Inputs) -> str | None:
    """What changes a text's logits: "padding", "batch" (the other texts too), or nothing that is more than rounding.

    The text is the first row of each batch: `alone`, in `twice` with another text of its length, in `padded` with a longer
    one. "length" is a model that computes it in `padded` only. Computed in float32 and eval mode, without drawing random
    numbers.
    """
    with in_full_precision(model):
        if (long := try_logits(model, padded)) is None:
            return None  # made for one fixed length: evaluation ends in the same error
        if (first := try_logits(model, alone)) is None:
            return "length"  # such as Canine, which pools four characters
        if same_logits(first, long[:1]):
            return None
        return "padding" if same_logits(first, compute_logits(model, twice)[:1]) else "batch"


def try_logits(model: Any, inputs: Inputs) -> torch.Tensor | None:
    """The logits; None from a model that does not take the length of `inputs`."""
    try:
        return compute_logits(model, inputs)
    except FAILURES as error:
        if is_sharded(model) and is_out_of_memory(error):
            raise  # of this process alone: the others compute on, and wait for its part
        return None


@contextlib.contextmanager
def in_full_precision(model: Any) -> Iterator[None]:
    """Within, the unwrapped `model` runs in eval mode and float32, uncompiled; random numbers are those of before after it."""
    training = {module: module.training for module in model.modules()}
    forward, plain = vars(model).get("forward"), vars(model).get("_original_forward")
    precision = torch.get_float32_matmul_precision()
    device = next(model.parameters()).device
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_gradients(model))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(widened(model))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            model.eval()
            torch.set_float32_matmul_precision("highest")
            if forward is not None and plain is not None:
                model.forward = plain  # accelerate's wrapper casts
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            if forward is not None and plain is not None:
                model.forward = forward
            for module, mode in training.items():
                module.training = mode
