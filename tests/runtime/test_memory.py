"""Out of memory: how it is recognized, and the next smaller batch."""

import pytest
import torch

from lib.errors import UserError
from lib.runtime.memory import halve, is_out_of_memory, own_memory

FULL = [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "HIP out of memory. Tried to allocate 20.00 MiB",
    "HIP error: out of memory",
    "MPS backend out of memory (MPS allocated: 17.9 GB)",
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate",
]
OTHER = [
    "CUDA error: device-side assert triggered",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`",
    "mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)",
    "DataLoader worker (pid 7) is killed by signal: Killed",
]


@pytest.mark.parametrize("message", FULL)
def test_messages_of_the_libraries_that_memory_ran_out_are_known(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))
    assert is_out_of_memory(torch.AcceleratorError(message))


@pytest.mark.parametrize("message", OTHER)
def test_other_errors_are_not_taken_for_a_lack_of_memory(message: str) -> None:
    assert not is_out_of_memory(RuntimeError(message))


def test_what_failed_is_told_by_its_kind_where_it_has_one() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("whatever"))
    assert not is_out_of_memory(None)
    assert not is_out_of_memory(KeyError(FULL[0]))
    # Processes exchange data in it: one of them cannot try again alone.
    assert not is_out_of_memory(torch.distributed.DistBackendError(f"NCCL error: {FULL[1]}"))


def test_halving_goes_down_to_one_sample_and_then_ends_with_advice() -> None:
    sizes = [13]
    while sizes[-1] > 1:
        sizes.append(halve(sizes[-1], "--flag"))
    assert sizes == [13, 6, 3, 1]
    for nothing_to_halve in (1, 0):
        with pytest.raises(UserError, match="--max_length"):
            halve(nothing_to_halve, "--flag")


def test_flag_that_would_save_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("lib.runtime.memory.logger.warning", lambda text, *values: told.append(text % values))
    halve(8, "--flag", "positions", "--remedy True")
    halve(8, "--flag")
    assert "8 positions (rows x padded length)" in told[0]
    assert ["--remedy True" in text for text in told] == [True, False]
    with pytest.raises(UserError, match="--remedy True"):
        halve(1, "--flag", "positions", "--remedy True")


def test_process_holds_less_main_memory_than_it_could() -> None:
    held, most = own_memory(torch.device("cpu"))
    assert most is not None
    assert 0 < held < most
    assert own_memory(torch.device("meta")) == (0, None)
