"""What training minimizes: a loss, and the weight of each sample."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from lib.config.sections import CLASSIFICATION, words
from lib.config.train import ObjectiveConfig
from lib.data.load import Data
from lib.errors import UserError
from lib.model.losses import KL, PLAIN, Loss, distillation_loss, focal_loss, ordinal_loss, plain_cross_entropy


@dataclasses.dataclass(frozen=True)
class Objective:
    """A step minimizes sum(weight * loss) / sum(weight) over all its samples.

    `weights` holds a float32 for each sample of the train split; None: all weigh 1. `notes` are lines for the start block.
    """

    loss: Loss
    weights: np.ndarray | None = None
    notes: tuple[str, ...] = ()


def build_objective(config: ObjectiveConfig, data: Data) -> Objective:
    """Loss and sample weights of the train split. Raises UserError if the settings do not fit the data."""
    is_soft = data.is_soft("train")
    loss = build_loss(config, data.problem_type, is_soft)
    notes: tuple[str, ...] = ()
    if config.loss == "ordinal":
        notes = (f"ordinal loss: the order of the classes is {' < '.join(data.label_names)}",)
    if not config.class_weights:
        return Objective(loss, notes=notes)
    if data.problem_type != CLASSIFICATION:
        raise UserError(f"--class_weights is for data with one label per text, this is {words(data.problem_type)}")
    labels = data.targets("train")
    weights = class_weights(config.class_weights, labels, data.label_names)
    shown = ", ".join(f"{name} {weight:.4g}" for name, weight in zip(data.label_names[:20], weights, strict=False))
    notes = (*notes, f"class weights: {shown}{', ...' if len(weights) > 20 else ''}")
    chosen = labels @ weights if is_soft else weights[labels]
    return Objective(loss, chosen.astype(np.float32), notes)


def build_loss(config: ObjectiveConfig, problem_type: str, is_soft: bool = False) -> Loss:
    """The training loss. Raises UserError if it does not fit the problem type, or labels that are soft or not."""
    temperature = config.distill_temperature
    if not is_soft and (config.loss == "kl" or temperature != 1):
        flag = "--loss kl" if config.loss == "kl" else f"--distill_temperature {temperature:g}"
        raise UserError(f"{flag} is for soft labels, and those of the train split are hard; leave it out")
    if is_soft and config.loss == "focal":
        raise UserError("--loss focal is for hard labels; with --soft_labels use cross_entropy, kl or ordinal")
    if config.loss in ("cross_entropy", "kl") and not config.label_smoothing_factor:
        loss = (PLAIN if config.loss == "cross_entropy" else KL)[problem_type]
        if temperature == 1:
            return loss
        exclusive = problem_type == CLASSIFICATION
        return functools.partial(distillation_loss, loss=loss, temperature=temperature, exclusive=exclusive)
    if problem_type != CLASSIFICATION:
        flag = f"--loss {config.loss}" if config.loss != "cross_entropy" else "--label_smoothing_factor"
        raise UserError(f"{flag} is for data with one label per text, this is {words(problem_type)}")
    losses: dict[str, Loss] = {
        "cross_entropy": functools.partial(plain_cross_entropy, label_smoothing=config.label_smoothing_factor),
        "focal": functools.partial(focal_loss, gamma=config.focal_gamma),
        "ordinal": ordinal_loss,
    }
    return losses[config.loss]


def class_weights(given: Sequence[str], labels: np.ndarray, label_names: Sequence[str]) -> np.ndarray:
    """float64 (classes,): `balanced` is samples / (classes * samples of the class), as in scikit-learn.

    `labels` are class numbers, or probabilities (samples, classes): of these each class has a share of every sample.
    Otherwise `given` holds class=weight, by class name or number; all other classes weigh 1, as do classes without samples.
    Raises UserError if a class does not exist or is named twice.
    """
    weights = np.ones(len(label_names))
    if list(given) == ["balanced"]:
        from sklearn.utils.class_weight import compute_class_weight  # takes seconds to import

        shares = None
        if labels.ndim == 2:
            labels, shares = np.broadcast_to(np.arange(labels.shape[1]), labels.shape).ravel(), labels.ravel()
            labels, shares = labels[shares > 0], shares[shares > 0].astype(np.float64)
        present = np.unique(labels)
        weights[present] = compute_class_weight("balanced", classes=present, y=labels, sample_weight=shares)
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
