"""Losses equal PyTorch's or their formula, sample by sample."""

import functools
import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from lib.model.losses import Loss, focal_loss, ordinal_loss, plain_cross_entropy


def random_batch(samples: int = 50, classes: int = 5, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(samples + classes)
    logits = scale * torch.randn(samples, classes, generator=generator)
    return logits.requires_grad_(), torch.randint(classes, (samples,), generator=generator)


def gradient(losses: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(losses.sum(), logits)[0]


@pytest.mark.parametrize("classes", [2, 5])
def test_focal_loss_with_gamma_0_is_cross_entropy(classes: int) -> None:
    logits, labels = random_batch(classes=classes)
    ours, theirs = focal_loss(logits, labels, 0.0), cross_entropy(logits, labels, reduction="none")
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_loss_of_two_classes_is_the_binary_loss_of_the_paper(gamma: float) -> None:
    logits, labels = random_batch(classes=2)
    margin, target = logits[:, 1] - logits[:, 0], labels.float()
    p = margin.sigmoid()
    p_label = p * target + (1 - p) * (1 - target)
    theirs = (1 - p_label) ** gamma * binary_cross_entropy_with_logits(margin, target, reduction="none")
    ours = focal_loss(logits, labels, gamma)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits))


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_of_many_classes_is_its_formula(gamma: float) -> None:
    logits, labels = random_batch(classes=7)
    p = logits.double().softmax(-1)[torch.arange(len(labels)), labels]
    torch.testing.assert_close(
        focal_loss(logits, labels, gamma).double(), -((1 - p) ** gamma) * p.log(), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("margin", [20.0, 100.0, 1000.0, -1000.0])
def test_focal_loss_has_a_finite_gradient_at_saturated_probabilities(margin: float) -> None:
    logits = torch.tensor([[margin, 0.0, 0.0]], requires_grad=True)
    losses = focal_loss(logits, torch.tensor([0]), 0.5)
    assert losses.isfinite().all()
    assert gradient(losses, logits).isfinite().all()


def test_ordinal_loss_is_the_squared_difference_of_cumulative_distributions() -> None:
    logits, labels = random_batch(classes=5)
    p = logits.detach().double().softmax(-1).numpy()
    wanted = [
        sum((p[i, : grade + 1].sum() - (grade >= label)) ** 2 for grade in range(5))
        for i, label in enumerate(labels.tolist())
    ]
    np.testing.assert_allclose(ordinal_loss(logits, labels).detach().numpy(), wanted, rtol=1e-5, atol=1e-7)


def test_ordinal_loss_of_two_classes_is_half_the_brier_score() -> None:
    logits, labels = random_batch(classes=2)
    brier = (logits.softmax(-1) - torch.eye(2)[labels]).square().sum(-1)
    torch.testing.assert_close(ordinal_loss(logits, labels), brier / 2)


def test_ordinal_loss_grows_with_the_distance_and_cross_entropy_does_not() -> None:
    sure = 50 * torch.eye(5)
    losses = ordinal_loss(sure, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(losses, torch.arange(5.0))
    assert len(set(cross_entropy(sure, torch.zeros(5, dtype=torch.int64), reduction="none").tolist()[1:])) == 1


def test_ordinal_loss_is_lowest_for_the_true_probabilities() -> None:
    truth = torch.tensor([0.1, 0.5, 0.1, 0.3])
    expected = lambda p: (truth * ordinal_loss(p.log().expand(4, 4), torch.arange(4))).sum().item()  # noqa: E731
    for i, j in itertools.permutations(range(4), 2):
        shift = 0.01 * (torch.eye(4)[i] - torch.eye(4)[j])
        assert expected(truth + shift) > expected(truth)


@pytest.mark.parametrize("loss", [plain_cross_entropy, functools.partial(focal_loss, gamma=2.0), ordinal_loss])
def test_loss_of_a_sample_does_not_depend_on_its_batch(loss: Loss) -> None:
    logits, labels = random_batch()
    one_by_one = torch.cat([loss(logits[i : i + 1], labels[i : i + 1]) for i in range(len(labels))])
    torch.testing.assert_close(loss(logits, labels), one_by_one)
