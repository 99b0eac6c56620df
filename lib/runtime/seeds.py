"""Random numbers by address: (seed, step, micro-batch, process) and not a stream."""

import torch


def seed_everything(*key: int) -> None:
    """Set PyTorch's random numbers by address: equal keys give equal numbers, whatever was drawn before.

    Dropout takes (seed, step, micro-batch, process); a resumed run therefore needs no saved generator, and an extra
    evaluation changes nothing.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(mix(*key))
    else:  # where there is none, `torch.manual_seed` notes the stack each time, for devices that may come
        torch.default_generator.manual_seed(mix(*key))


def mix(*key: int) -> int:
    """A 63-bit hash of integers (the finaliser of SplitMix64, Steele et al. 2014, chained over `key`)."""
    state = 0
    for value in key:
        state = (state + value + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1
