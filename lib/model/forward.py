"""The forward pass: logits of a batch, where a text in several windows gets the mean of its windows' logits."""

import torch
from torch import nn


def compute_logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """float32 (samples, outputs): the model's logits; with `num_windows` in `inputs`, their mean over each text.

    `inputs` are on the model's device, except for `num_windows` (windows of each text) on the CPU.
    """
    counts = inputs.get("num_windows")
    logits = model(**{name: tensor for name, tensor in inputs.items() if name != "num_windows"}).logits.float()
    return logits if counts is None else pool_logits(logits, counts.tolist())


def pool_logits(logits: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """(samples, outputs): the means of consecutive groups of rows of (windows, outputs); `counts` are the group sizes.

    Sums over contiguous rows are deterministic on a GPU, unlike those of scatter operations.
    """
    return torch.stack([part.mean(dim=0) for part in logits.split(counts)])
