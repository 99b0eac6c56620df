"""Dropout masks of the CPU kernel: their share, independence and seeds, and all that PyTorch's `bernoulli_` takes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn.functional import dropout, scaled_dot_product_attention

from lib.runtime.cpu.dropout import fast_bernoulli
from lib.runtime.cpu.kernels import use_cpu_kernels

SIZE = 400_000


def mask(p: float, seed: int = 0) -> np.ndarray:
    torch.manual_seed(seed)
    return fast_bernoulli(torch.empty(SIZE), p).numpy()


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5, 0.9, 1.0])
def test_share_of_ones_is_the_probability(p: float) -> None:
    drawn = mask(p)
    assert set(np.unique(drawn)) <= {0.0, 1.0}
    assert drawn.mean() == pytest.approx(p, abs=5 * np.sqrt(p * (1 - p) / SIZE))


@pytest.mark.parametrize("p", [1e-6, 1.3e-5, 2**-16])
def test_rare_ones_and_rare_zeros_are_as_frequent_as_their_probability(p: float) -> None:
    """Sixteen random bits alone would round 1e-6 to 0 and 1 - 1e-6 to 1."""
    size = 20_000_000
    torch.manual_seed(1)
    ones = fast_bernoulli(torch.empty(size, dtype=torch.bool), p).count_nonzero().item()
    zeros = size - fast_bernoulli(torch.empty(size, dtype=torch.bool), 1 - p).count_nonzero().item()
    for found in (ones, zeros):
        assert found == pytest.approx(size * p, abs=4 * np.sqrt(size * p))
        assert found > 0


@pytest.mark.parametrize("p", [0.5, 0.25, 0.75])
def test_sixteen_bits_decide_where_the_probability_has_no_more(p: float) -> None:
    torch.manual_seed(5)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    wanted = np.random.SFC64(seed).random_raw(SIZE // 4).view(np.uint16) < p * 2**16
    assert np.array_equal(mask(p, seed=5), wanted)


def test_masks_do_not_depend_on_threads() -> None:
    threads, masks = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            masks.append(mask(0.1))
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(masks[0], masks[1])
    assert np.array_equal(masks[0], masks[2])


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 32, 384])
def test_neighbors_are_uncorrelated(distance: int) -> None:
    drawn = mask(0.9)
    assert abs(np.corrcoef(drawn[:-distance], drawn[distance:])[0, 1]) < 5 / np.sqrt(SIZE)


def test_equal_seeds_give_equal_masks_and_others_do_not() -> None:
    assert np.array_equal(mask(0.9, 1), mask(0.9, 1))
    assert abs(np.corrcoef(mask(0.9, 1), mask(0.9, 2))[0, 1]) < 5 / np.sqrt(SIZE)
    torch.manual_seed(0)
    first, second = (fast_bernoulli(torch.empty(64), 0.5) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.usefixtures("kernels")
def test_dropout_of_modules_and_of_attention_draws_from_the_kernel() -> None:
    states = torch.ones(2, 3, 5, 8, requires_grad=True)
    torch.manual_seed(3)
    kept = dropout(states, 0.25)
    torch.manual_seed(3)
    wanted = fast_bernoulli(torch.empty(2, 3, 5, 8), 0.75)
    torch.testing.assert_close(kept, wanted / 0.75)
    kept.sum().backward()
    assert states.grad is not None
    assert torch.equal(states.grad, kept.detach())
    torch.manual_seed(4)
    attended = scaled_dot_product_attention(states, states, states, dropout_p=0.5)
    torch.manual_seed(4)
    wanted = fast_bernoulli(torch.empty(2, 3, 5, 5), 0.5)
    torch.testing.assert_close(attended[..., 0], wanted.sum(-1) / 0.5 / 5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "given",
    [
        torch.full((7,), 9, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.uint8, torch.int64)
    ]
    + [torch.empty(0), torch.empty(3, 0), torch.empty(()), torch.empty(3, 5).t(), torch.empty(4, 6)[:, ::2]],
    ids=lambda given: f"{given.dtype}-{tuple(given.shape)}-{given.stride()}".removeprefix("torch."),
)
def test_every_dtype_and_layout_is_filled_in_place(given: torch.Tensor) -> None:
    drawn = given.bernoulli_(0.5)
    assert drawn is given
    assert set(drawn.flatten().tolist()) <= {0, 1}
    assert bool((given.bernoulli_(1) == 1).all())
    assert bool((given.bernoulli_(0) == 0).all())


@pytest.mark.usefixtures("kernels")
def test_view_is_filled_without_touching_its_neighbors() -> None:
    whole = torch.full((4, 6), 9.0)
    whole[:, ::2].bernoulli_(0.5)
    assert set(whole[:, ::2].flatten().tolist()) == {0.0, 1.0}
    assert bool((whole[:, 1::2] == 9).all())


REFUSED = {
    "p above 1": lambda: torch.empty(3).bernoulli_(1.5),
    "p below 0": lambda: torch.empty(3).bernoulli_(-0.1),
    "p NaN": lambda: torch.empty(3).bernoulli_(float("nan")),
    "p tensor out of range": lambda: torch.empty(2).bernoulli_(torch.tensor([0.5, 1.5])),
    "complex": lambda: torch.empty(3, dtype=torch.complex64).bernoulli_(0.5),
    "overlapping memory": lambda: torch.empty(3).expand(4, 3).bernoulli_(0.5),
}


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_errors_are_those_of_pytorch(call: Callable[[], torch.Tensor]) -> None:
    errors = []
    for wanted in (False, True):
        use_cpu_kernels(wanted)
        with pytest.raises((RuntimeError, NotImplementedError)) as raised:
            call()
        errors.append((raised.type, str(raised.value).splitlines()[0]))
    assert errors[0] == errors[1]


@pytest.mark.usefixtures("kernels")
def test_given_generator_is_used_instead_of_the_global_one() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (
        torch.empty(64).bernoulli_(0.5, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("kernels")
def test_transformations_and_inference_mode_draw_masks() -> None:
    given = torch.zeros(4, 200)
    with torch.inference_mode():
        assert set(torch.empty(200).bernoulli_(0.5).tolist()) == {0.0, 1.0}
    different = torch.func.vmap(lambda row: torch.bernoulli(row, 0.5), randomness="different")(given)
    assert not torch.equal(different[0], different[1])
    same = torch.func.vmap(lambda row: row * torch.empty(200).bernoulli_(0.5), randomness="same")(given + 1)
    assert set(same.flatten().tolist()) == {0.0, 1.0}
    assert torch.equal(same[0], same[1])
    gradient = torch.func.grad(lambda row: dropout(row, 0.5).sum())(given)
    assert set(gradient.flatten().tolist()) == {0.0, 2.0}
