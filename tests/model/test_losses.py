"""Losses equal PyTorch's or their formula, sample by sample."""

import functools
import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div, one_hot

from lib.model.losses import (
    Loss,
    distillation_loss,
    focal_loss,
    kl_divergence,
    mean_binary_cross_entropy,
    mean_binary_kl_divergence,
    ordinal_loss,
    plain_cross_entropy,
)


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


def random_probabilities(samples: int = 50, classes: int = 5) -> torch.Tensor:
    """Distributions, of which the first ones are certain."""
    generator = torch.Generator().manual_seed(classes)
    probabilities = torch.randn(samples, classes, generator=generator).mul(2).softmax(-1)
    probabilities[:classes] = torch.eye(classes)
    return probabilities


@pytest.mark.parametrize("loss", [plain_cross_entropy, ordinal_loss])
def test_certain_probabilities_have_the_loss_and_gradient_of_hard_labels_bit_by_bit(loss: Loss) -> None:
    logits, labels = random_batch()
    hard, soft = loss(logits, labels), loss(logits, one_hot(labels, 5).float())
    assert torch.equal(hard, soft)
    assert torch.equal(gradient(hard, logits), gradient(soft, logits))


def test_kl_divergence_is_that_of_pytorch_and_has_the_gradient_of_cross_entropy() -> None:
    logits, _ = random_batch()
    wanted = random_probabilities()
    ours = kl_divergence(logits, wanted)
    torch.testing.assert_close(ours, kl_div(logits.log_softmax(-1), wanted, reduction="none").sum(-1))
    plain = cross_entropy(logits, wanted, reduction="none")
    assert torch.equal(gradient(ours, logits), gradient(plain, logits))
    torch.testing.assert_close(kl_divergence(wanted[5:].log(), wanted[5:]), torch.zeros(45), atol=1e-6, rtol=0)


def test_binary_kl_divergence_has_the_gradient_of_binary_cross_entropy_and_is_0_at_best() -> None:
    logits, _ = random_batch()
    wanted = random_probabilities()
    ours, plain = mean_binary_kl_divergence(logits, wanted), mean_binary_cross_entropy(logits, wanted)
    assert torch.equal(gradient(ours, logits), gradient(plain, logits))
    torch.testing.assert_close(
        mean_binary_kl_divergence(wanted.logit(1e-6), wanted), torch.zeros(50), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("temperature", [0.5, 2.0, 10.0])
def test_distillation_loss_is_that_of_hinton_2015(temperature: float) -> None:
    logits, _ = random_batch()
    teacher = torch.randn(50, 5, generator=torch.Generator().manual_seed(1)).mul(2)
    ours = distillation_loss(logits, teacher.softmax(-1), kl_divergence, temperature, exclusive=True)
    student, softened = (logits / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    theirs = temperature**2 * kl_div(student, softened, reduction="none").sum(-1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    ours = distillation_loss(logits, teacher.sigmoid(), mean_binary_cross_entropy, temperature, exclusive=False)
    theirs = binary_cross_entropy_with_logits(logits / temperature, (teacher / temperature).sigmoid(), reduction="none")
    torch.testing.assert_close(ours, temperature**2 * theirs.mean(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exclusive", [True, False])
def test_distillation_of_certain_probabilities_is_finite_and_at_temperature_1_the_loss_itself(exclusive: bool) -> None:
    logits, _ = random_batch()
    wanted = random_probabilities()
    loss = plain_cross_entropy if exclusive else mean_binary_cross_entropy
    losses = distillation_loss(logits, wanted, loss, 4.0, exclusive)
    assert losses.isfinite().all()
    assert gradient(losses, logits).isfinite().all()
    torch.testing.assert_close(distillation_loss(logits, wanted, loss, 1.0, exclusive), loss(logits, wanted))


def test_ordinal_loss_of_probabilities_is_the_distance_of_the_cumulative_distributions() -> None:
    logits, _ = random_batch()
    wanted = random_probabilities()
    theirs = (logits.softmax(-1).cumsum(-1) - wanted.cumsum(-1)).square().sum(-1)
    torch.testing.assert_close(ordinal_loss(logits, wanted), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [plain_cross_entropy, functools.partial(focal_loss, gamma=2.0), ordinal_loss])
def test_loss_of_a_sample_does_not_depend_on_its_batch(loss: Loss) -> None:
    logits, labels = random_batch()
    one_by_one = torch.cat([loss(logits[i : i + 1], labels[i : i + 1]) for i in range(len(labels))])
    torch.testing.assert_close(loss(logits, labels), one_by_one)
