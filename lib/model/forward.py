"""Logits of a batch; those of a text in several windows are the mean of its windows'."""

import torch
from torch import nn


def compute_logits(model: nn.Module, batch: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """float32 (samples, outputs): the model's logits, or where `batch` has `num_windows` their mean over each text.

    The counts stay where they are, on the CPU, so that nothing waits for the device; sums over contiguous rows do not
    depend on the order in which a GPU works.
    """
    counts = batch.get("num_windows")
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items() if name != "num_windows"}
    logits = model(**inputs).logits.float()
    return logits if counts is None else pool_logits(logits, counts.tolist())


def pool_logits(logits: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The means (samples, outputs) of the next `counts` rows of (windows, outputs)."""
    return torch.stack([part.mean(dim=0) for part in logits.split(counts)])
