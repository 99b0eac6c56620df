"""Dropout masks on a CPU, several times faster than PyTorch's."""

import contextlib
import math
import warnings
from collections.abc import Iterator

import numpy as np
import torch


def fast_bernoulli(mask: torch.Tensor, p: float = 0.5, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """`torch.Tensor.bernoulli_`: ones with probability `p`, exactly, else zeros.

    The bits are those of SFC64 (O'Neill's PractRand; numpy), seeded by one draw from PyTorch's generator: equal seeds
    give equal masks, with any number of threads.
    """
    bits = np.random.SFC64(int(torch.empty((), dtype=torch.int64).random_(generator=generator)))
    ones = draw_ones(bits, mask.numel(), p) if p < 1 else np.ones(mask.numel(), dtype=bool)
    return mask.copy_(torch.from_numpy(ones.view(np.uint8)).view(mask.shape))


def draw_ones(bits: np.random.BitGenerator, count: int, p: float) -> np.ndarray:
    """`count` booleans, True with probability `p` below 1.

    Each compares 16 random bits with the first 16 binary digits of `p`. Where they are equal, once in 65,536 times, the
    digits that follow decide in the same way, so that no digit of `p` is lost.
    """
    draws = bits.random_raw(-(-count // 4)).view(np.uint16)[:count]
    rest, first = math.modf(p * 2**16)
    ones = draws < np.uint16(first)
    if rest:
        undecided = np.flatnonzero(draws == np.uint16(first))
        if len(undecided):
            ones[undecided] = draw_ones(bits, len(undecided), rest)
    return ones


@contextlib.contextmanager
def fast_dropout() -> Iterator[None]:
    """Within, every `bernoulli_(p)` on a CPU, hence all dropout, also that inside attention, is `fast_bernoulli`.

    PyTorch draws one number after the other on one thread: 1.7 ms for 344,000 where ours takes 0.2 ms. It still answers
    for a `p` outside of [0, 1] and for complex numbers, with an error.
    """
    original = torch.library.get_kernel("aten::bernoulli_.float", "CPU")

    def bernoulli(
        keys: torch._C.DispatchKeySet, mask: torch.Tensor, p: float = 0.5, *, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        if mask.is_complex() or not 0 <= p <= 1:
            return original.call_boxed(keys, mask, p, generator=generator)
        return fast_bernoulli(mask, p, generator=generator)

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that a kernel is replaced, which is the purpose
        library.impl("bernoulli_.float", bernoulli, "CPU", with_keyset=True)
    try:
        yield
    finally:
        library._destroy()
