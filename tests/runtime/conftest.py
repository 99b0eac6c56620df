"""Kernels of a test end with it."""

from collections.abc import Iterator

import pytest

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
