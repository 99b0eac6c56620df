"""Random numbers by address, such as (seed, step, micro-batch, process), instead of one stream."""

import torch


def seed_everything(*key: int) -> None:
    """Seed PyTorch on the CPU and on this process's device: equal keys give equal random numbers, whatever was drawn before.

    Dropout uses (seed, step, micro-batch, process). Hence a resumed run needs no saved generator, and an extra evaluation
    changes nothing.
    """
    seed = mix(*key)
    if torch.cuda.is_initialized():
        # `torch.manual_seed` gives equal numbers, but asks every kind of device and seeds all GPUs, in each micro-batch.
        torch.default_generator.manual_seed(seed)
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
    elif torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # `torch.manual_seed` would record a stack trace each time, for accelerators that may be initialized later
        torch.default_generator.manual_seed(seed)


def mix(*key: int) -> int:
    """A 63-bit hash of integers: the finalizer of SplitMix64 (Steele et al. 2014), chained over `key`."""
    state = 0
    for value in key:
        state = (state + value + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1
