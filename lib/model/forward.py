"""Logits of a batch; those of a text in several windows are the mean of its windows'."""

import torch
from torch import nn


def compute_logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """float32 (samples, outputs): the model's logits, or where `inputs` has `num_windows` their mean over each text.

    `inputs` lie on the model's device, the counts of windows on the CPU. Means of contiguous rows do not depend on the
    order in which a GPU works.
    """
    counts = inputs.get("num_windows")
    logits = model(**{name: tensor for name, tensor in inputs.items() if name != "num_windows"}).logits.float()
    return logits if counts is None else pool_logits(logits, counts.tolist())


def pool_logits(logits: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The means (samples, outputs) of the next `counts` rows of (windows, outputs)."""
    return torch.stack([part.mean(dim=0) for part in logits.split(counts)])
