"""What training minimises: a loss per sample, and how much each sample counts."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, log_softmax, one_hot, softmax

from lib.config.problems import CLASSIFICATION, MULTI_LABEL, REGRESSION, words
from lib.config.sections import UserError
from lib.config.train import ObjectiveConfig
from lib.data.load import Data

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


def build_loss(config: ObjectiveConfig, problem_type: str) -> Loss:
    """The loss to train with. Raises UserError when there is no such loss for the problem."""
    if config.loss == "cross_entropy" and not config.label_smoothing_factor:
        return PLAIN[problem_type]
    if problem_type != CLASSIFICATION:
        flag = f"--loss {config.loss}" if config.loss != "cross_entropy" else "--label_smoothing_factor"
        raise UserError(f"{flag} is for data with one label of several, these are for {words(problem_type)}")
    losses: dict[str, Loss] = {
        "cross_entropy": functools.partial(plain_cross_entropy, label_smoothing=config.label_smoothing_factor),
        "focal": functools.partial(focal_loss, gamma=config.focal_gamma),
        "ordinal": ordinal_loss,
    }
    return losses[config.loss]


# ---------------------------------------------------------------------------------------------------- weights


@dataclasses.dataclass(frozen=True)
class Objective:
    """A step minimises sum(weight * loss) / sum(weight) over all its samples.

    `weights` holds a float32 for each sample of the train split; None: all count alike.
    """

    loss: Loss
    weights: np.ndarray | None = None


def build_objective(config: ObjectiveConfig, data: Data) -> Objective:
    """Loss and sample weights for the train split; what a user should know of them is added to the notes of `data`.

    Raises UserError when the settings do not fit the data.
    """
    loss = build_loss(config, data.problem_type)
    if config.loss == "ordinal":
        data.notes.append(f"ordinal loss: the classes are graded {' < '.join(data.label_names)}")
    if not config.class_weights:
        return Objective(loss)
    if data.problem_type != CLASSIFICATION:
        raise UserError(
            f"--class_weights is for data with one label of several, these are for {words(data.problem_type)}"
        )
    labels = np.asarray(data.tokens["train"]["labels"][:], dtype=np.int64)
    weights = class_weights(config.class_weights, labels, data.label_names)
    shown = ", ".join(f"{name} {weight:.4g}" for name, weight in zip(data.label_names[:20], weights, strict=False))
    data.notes.append(f"class weights: {shown}{', ...' if len(weights) > 20 else ''}")
    return Objective(loss, weights[labels].astype(np.float32))


def class_weights(given: Sequence[str], labels: np.ndarray, label_names: Sequence[str]) -> np.ndarray:
    """float64 (classes,): `balanced` is samples / (classes * samples of the class), as scikit-learn has it.

    Otherwise `given` holds class=weight, by name or else by number; classes that are not named weigh 1. A class without
    samples weighs 1. Raises UserError for a class that does not exist or is named twice.
    """
    weights = np.ones(len(label_names))
    if list(given) == ["balanced"]:
        from sklearn.utils.class_weight import compute_class_weight  # takes seconds to import

        present = np.unique(labels)
        weights[present] = compute_class_weight("balanced", classes=present, y=labels)
        return weights
    numbers = {str(number): number for number in range(len(label_names))}
    numbers |= {name: number for number, name in enumerate(label_names)}
    named = set()
    for name, weight in (item.rsplit("=", 1) for item in given):
        if name not in numbers or numbers[name] in named:
            problem = "is named twice" if name in numbers else "is not among the classes"
            raise UserError(f"--class_weights {name}={weight}: {name} {problem}: {', '.join(label_names[:20])}")
        named.add(numbers[name])
        weights[numbers[name]] = float(weight)
    return weights
