"""Random numbers by address: equal keys give equal numbers, others independent ones."""

import pytest
import torch
from torch.nn.functional import dropout

from lib.runtime.seeds import mix, seed_everything


def test_mix_is_splitmix64() -> None:
    """The first output of the published generator for the states 0 and 1234567, without the lowest bit."""
    assert mix(0) == 0xE220A8397B1DCDAF >> 1
    assert mix(1234567) == 0x599ED017FB08FC85 >> 1


def test_mix_keeps_its_values() -> None:
    assert mix(42, 1, 0, 0) == 790956889137220401


def test_mix_tells_neighboring_keys_and_their_order_apart() -> None:
    keys = [
        (seed, step, piece, rank) for seed in range(8) for step in range(8) for piece in range(4) for rank in range(4)
    ]
    assert len({mix(*key) for key in keys}) == len(keys)
    assert len({mix(1, 2), mix(2, 1), mix(3), mix(0, 3), mix(1, 2, 0)}) == 5


def test_mix_flips_half_of_the_bits_between_neighbors() -> None:
    flips = [(mix(seed, step) ^ mix(seed, step + 1)).bit_count() for seed in range(20) for step in range(20)]
    assert sum(flips) / len(flips) == pytest.approx(63 / 2, abs=1)
    assert all(0 <= mix(seed, 5) < 2**63 for seed in range(1000))


@pytest.mark.parametrize("rank", [0, 1])
def test_process_with_a_gpu_seeds_its_own_generators_with_the_numbers_of_manual_seed(rank, monkeypatch) -> None:
    def refuse(_: int) -> None:
        raise AssertionError("torch.manual_seed asks every device, in each micro-batch")

    gpus = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for name, value in (
        ("is_initialized", lambda: True),
        ("current_device", lambda: rank),
        ("default_generators", gpus),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    wanted = torch.Generator().manual_seed(mix(42, 3, 0, rank))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "manual_seed", refuse)
        seed_everything(42, 3, 0, rank)
    expected = torch.rand(9, generator=wanted)
    assert torch.equal(torch.rand(9), expected)
    assert torch.equal(torch.rand(9, generator=gpus[rank]), expected)
    assert gpus[1 - rank].initial_seed() == 1


def dropped(*key: int) -> torch.Tensor:
    seed_everything(*key)
    return dropout(torch.ones(200), 0.5)


def test_equal_keys_give_equal_dropout_whatever_was_drawn_before() -> None:
    first = dropped(42, 3, 0, 1)
    torch.rand(17)
    assert torch.equal(dropped(42, 3, 0, 1), first)


@pytest.mark.parametrize("other", [(43, 3, 0, 1), (42, 4, 0, 1), (42, 3, 1, 1), (42, 3, 0, 0), (42, 3, 1, 0)])
def test_different_keys_give_different_dropout(other: tuple[int, ...]) -> None:
    assert not torch.equal(dropped(*other), dropped(42, 3, 0, 1))
