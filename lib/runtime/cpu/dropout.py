"""Dropout masks on a CPU, several times faster than PyTorch's."""

import contextlib
import warnings
from collections.abc import Iterator

import numpy as np
import torch

STEPS = 2**16


def fast_bernoulli(mask: torch.Tensor, p: float = 0.5, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """`torch.Tensor.bernoulli_`: ones with probability `p`, rounded to 2^-16, else zeros.

    The bits are those of SFC64 (O'Neill's PractRand; numpy), seeded by one draw from PyTorch's generator: equal seeds
    give equal masks, with any number of threads.
    """
    seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
    count = mask.numel()
    draws = np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.uint16)[:count]
    ones = np.less(draws, np.uint16(round(p * STEPS))) if round(p * STEPS) < STEPS else np.ones(count, dtype=bool)
    return mask.copy_(torch.from_numpy(ones.view(np.uint8)).view(mask.shape))


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
