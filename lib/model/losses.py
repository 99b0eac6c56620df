"""What training minimises: a loss per sample, and how much each sample counts."""

from collections.abc import Callable

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, log_softmax, one_hot, softmax

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits float32 (samples, outputs), labels (samples, ...)) -> losses float32 (samples,)."""

# ---------------------------------------------------------------------------------------------------- one label of many


def plain_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross entropy in nats."""
    return cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def focal_loss(logits: torch.Tensor, labels: torch.Tensor, gamma: float) -> torch.Tensor:
    """-(1 - p)^gamma log p for the probability p of the label, in nats (Lin et al. 2017, equation 4).

    1 - p is summed from the other classes, so that neither the loss nor its gradient suffers where p rounds to 1.
    """
    log_probabilities = log_softmax(logits, dim=-1)
    is_label = one_hot(labels, logits.shape[-1]).bool()
    log_others = log_probabilities.masked_fill(is_label, -torch.inf).logsumexp(dim=-1)
    return torch.exp(gamma * log_others) * plain_cross_entropy(logits, labels)


def ordinal_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Squared distance of the cumulative probabilities from those of the label: the further off, the dearer.

    The squared earth mover's distance of Hou, Yu and Samaras (2016), known in forecasting as the ranked probability score
    (Epstein 1969), which is lowest for the true probabilities; half the Brier score when there are two classes. Classes
    are graded in the order of their numbers. Losses lie between 0 and the number of classes less one.
    """
    grades = torch.arange(logits.shape[-1], device=logits.device)
    at_most = (grades[:, None] >= grades).to(logits.dtype)  # summed below; cumsum is not deterministic on a GPU
    cumulative = (softmax(logits, dim=-1)[:, None, :] * at_most).sum(dim=-1)
    return (cumulative - (grades >= labels[:, None]).to(logits.dtype)).square().sum(dim=-1)


# ---------------------------------------------------------------------------------------------------- other problems


def squared_error(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(prediction - number)^2 of one output; its mean is transformers' loss of a regression."""
    return (logits[:, 0] - labels.to(logits.dtype)).square()


def mean_binary_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy in nats, averaged over the labels; its mean is transformers' loss of several labels."""
    return binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(dim=-1)


# ---------------------------------------------------------------------------------------------------- choosing

PLAIN: dict[str, Loss] = {
    CLASSIFICATION: plain_cross_entropy,
    REGRESSION: squared_error,
    MULTI_LABEL: mean_binary_cross_entropy,
}
"""The loss of each problem type (`problem_type` of a transformers configuration) that evaluation reports: the same for
every objective, so that the runs of one can be compared with those of another."""


# ---------------------------------------------------------------------------------------------------- weights
