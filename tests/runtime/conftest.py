"""Kernels of a test end with it."""

from collections.abc import Iterator

import pytest
import torch

from lib.runtime.cpu import tuning
from lib.runtime.cpu.kernels import use_cpu_kernels


@pytest.fixture
def kernels() -> Iterator[None]:
    """CPU kernels are on within the test, and off after it."""
    use_cpu_kernels()
    yield
    use_cpu_kernels(False)


@pytest.fixture
def no_kernels() -> Iterator[None]:
    """CPU kernels are off before the test, and after it."""
    use_cpu_kernels(False)
    yield
    use_cpu_kernels(False)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A launch on the CPU, whose settings of threads and kernels end with the test; the allocator is left alone."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(tuning, "keep_freed_memory", lambda: None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    torch.set_num_threads(threads)
    use_cpu_kernels(False)
