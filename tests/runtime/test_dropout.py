"""Dropout with cheaper random numbers is still dropout: its share, its independence, its seeds."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn.functional import dropout, scaled_dot_product_attention

from lib.runtime.cpu import dropout as ours
from lib.runtime.cpu.dropout import fast_bernoulli, use_fast_dropout

SIZE = 400_000


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of the masks drawn by ours, which is in use within the test only."""
    use_fast_dropout.cache_clear()
    sizes: list[int] = []

    def noted(mask: torch.Tensor, p: float = 0.5, *, generator: torch.Generator | None = None) -> torch.Tensor:
        sizes.append(mask.numel())
        return fast_bernoulli(mask, p, generator=generator)

    monkeypatch.setattr(ours, "fast_bernoulli", noted)
    library = use_fast_dropout()
    yield sizes
    library._destroy()
    use_fast_dropout.cache_clear()


def mask(p: float, seed: int = 0) -> np.ndarray:
    torch.manual_seed(seed)
    return fast_bernoulli(torch.empty(SIZE), p).numpy()


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5, 0.9, 1.0])
def test_the_share_of_ones_is_the_probability(p: float) -> None:
    drawn = mask(p)
    assert set(np.unique(drawn)) <= {0.0, 1.0}
    assert drawn.mean() == pytest.approx(p, abs=5 * np.sqrt(p * (1 - p) / SIZE) + 1e-5 * (0 < p < 1))


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 32, 384])
def test_no_number_tells_of_its_neighbours(distance: int) -> None:
    drawn = mask(0.9)
    assert abs(np.corrcoef(drawn[:-distance], drawn[distance:])[0, 1]) < 5 / np.sqrt(SIZE)


def test_equal_seeds_give_equal_masks_and_others_do_not() -> None:
    assert np.array_equal(mask(0.9, 1), mask(0.9, 1))
    assert abs(np.corrcoef(mask(0.9, 1), mask(0.9, 2))[0, 1]) < 5 / np.sqrt(SIZE)
    torch.manual_seed(0)
    first, second = (fast_bernoulli(torch.empty(64), 0.5) for _ in range(2))
    assert not torch.equal(first, second)


def test_a_mask_has_the_shape_and_type_it_is_asked_for() -> None:
    for given in (torch.empty(7, dtype=torch.bfloat16), torch.empty(0), torch.empty(3, 5).t(), torch.empty(())):
        drawn = fast_bernoulli(given, 0.5)
        assert drawn is given
        assert set(drawn.flatten().tolist()) <= {0.0, 1.0}


def test_modules_and_attention_draw_from_it(fast: list[int]) -> None:
    states = torch.ones(2, 3, 5, 8, requires_grad=True)
    kept = dropout(states, 0.25)
    torch.testing.assert_close(kept.unique(), torch.tensor([0.0, 1 / 0.75]))
    kept.sum().backward()
    assert states.grad is not None
    assert torch.equal(states.grad, kept.detach())
    scaled_dot_product_attention(states, states, states, dropout_p=0.5)
    assert fast == [2 * 3 * 5 * 8, 2 * 3 * 5 * 5]
