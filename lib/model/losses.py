"""Losses per sample: of one label out of several, of a number, and of several labels at once; labels may be soft."""

from collections.abc import Callable

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, log_softmax, one_hot, softmax
from torch.special import entr

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits float32 (samples, outputs), labels (samples, ...)) -> losses float32 (samples,).

Labels are class numbers, numbers, or float32 (samples, outputs): multi-hot, or probabilities of classes or labels.
"""


def plain_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross entropy in nats, of class numbers or of probabilities (samples, classes)."""
    return cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def kl_divergence(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """KL divergence in nats of the prediction from the probabilities: cross entropy less their entropy, so 0 at best.

    It has the gradient of cross entropy, since the entropy is constant.
    """
    return plain_cross_entropy(logits, probabilities) - entr(probabilities).sum(dim=-1)


def mean_binary_kl_divergence(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """`kl_divergence` of each label and its absence, averaged over the labels."""
    entropies = entr(probabilities) + entr(1 - probabilities)
    return mean_binary_cross_entropy(logits, probabilities) - entropies.mean(dim=-1)


def distillation_loss(
    logits: torch.Tensor, probabilities: torch.Tensor, loss: Loss, temperature: float, exclusive: bool
) -> torch.Tensor:
    """T^2 `loss` of the predicted and the wanted probabilities at temperature T (Hinton, Vinyals and Dean 2015).

    Logits are divided by T, and probabilities become p^(1/T), scaled to the sum 1: over the classes where these are
    `exclusive`, else over each label and its absence. T^2 keeps the size of the gradients.
    """
    if exclusive:
        wanted = softmax(probabilities.log() / temperature, dim=-1)
    else:
        wanted = torch.sigmoid((probabilities.log() - torch.log1p(-probabilities)) / temperature)
    return temperature**2 * loss(logits / temperature, wanted)


def focal_loss(logits: torch.Tensor, labels: torch.Tensor, gamma: float) -> torch.Tensor:
    """-(1 - p)^gamma log p for the probability p of the label, in nats (Lin et al. 2017, equation 4).

    1 - p is the sum over the other classes, so that loss and gradient stay accurate where p rounds to 1.
    """
    log_probabilities = log_softmax(logits, dim=-1)
    is_label = one_hot(labels, logits.shape[-1]).bool()
    log_others = log_probabilities.masked_fill(is_label, -torch.inf).logsumexp(dim=-1)
    return torch.exp(gamma * log_others) * plain_cross_entropy(logits, labels)


def ordinal_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Squared earth mover's distance between the predicted distribution and the label, for classes in graded order.

    Hou, Yu and Samaras 2016; in forecasting, the ranked probability score (Epstein 1969): a proper score, lowest for the
    true probabilities, and half the Brier score for two classes. It lies between 0 and the number of classes - 1. Labels
    are class numbers, or probabilities (samples, classes).
    """
    grades = torch.arange(logits.shape[-1], device=logits.device)
    at_most = (grades[:, None] >= grades).to(logits.dtype)  # a sum, since cumsum is not deterministic on a GPU
    cumulative = (softmax(logits, dim=-1)[:, None, :] * at_most).sum(dim=-1)
    if labels.is_floating_point():
        wanted = (labels[:, None, :] * at_most).sum(dim=-1)
    else:
        wanted = (grades >= labels[:, None]).to(logits.dtype)
    return (cumulative - wanted).square().sum(dim=-1)


def squared_error(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(prediction - label)^2 of the only output; its mean is transformers' loss for regression."""
    return (logits[:, 0] - labels.to(logits.dtype)).square()


def mean_binary_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy in nats, averaged over the labels; its mean is transformers' multi-label loss."""
    return binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(dim=-1)


PLAIN: dict[str, Loss] = {
    CLASSIFICATION: plain_cross_entropy,
    REGRESSION: squared_error,
    MULTI_LABEL: mean_binary_cross_entropy,
}
"""The loss that evaluation reports, by problem type. It does not depend on --loss, so that runs can be compared."""

KL: dict[str, Loss] = {CLASSIFICATION: kl_divergence, MULTI_LABEL: mean_binary_kl_divergence}
"""The loss of --loss kl, by problem type."""
