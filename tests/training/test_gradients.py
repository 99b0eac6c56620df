"""Gradients are summed over processes within backward, whatever happens to one of them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lib.errors import UserError
from lib.runtime import processes
from lib.training import gradients
from lib.training.gradients import Gradients
from lib.training.step import Attempt
from lib.training.working_weights import WorkingWeights
from tests.conftest import WORKER_ENV, launch, tiny_roberta
from tests.tiny_models import any_classifier

SETS = [(2, "some"), pytest.param((2, "all"), marks=pytest.mark.slow), pytest.param((3, "all"), marks=pytest.mark.slow)]
"""Processes, and at how many places memory runs out."""


@pytest.fixture(scope="module", params=SETS, ids=str)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[dict]]:
    """What the processes of tests/workers/overlap.py did, by case; a process that waits for ever ends the launch."""
    folder = tmp_path_factory.mktemp("overlap")
    model = tiny_roberta(folder / "model", dropout=0.0, initializer_range=0.3)
    dropping = any_classifier("bart", folder / "dropping")
    number, places = request.param
    worker = ("tests/workers/overlap.py", model, dropping, folder, places)
    launch(*worker, cwd=folder, processes=number, env=WORKER_ENV, timeout=120)
    found = torch.load(folder / "results.pt")
    assert found.pop("world_size") == number
    assert all(len(cases) == number for cases in found.values())
    return found


def test_every_bucket_is_sent_before_the_last_backward_pass_ends(results) -> None:
    for result in results["plain"]:
        assert result["buckets"] >= 8
        assert result["within"] == [result["buckets"]] * 2  # steps
        assert result["sums"] == 2 * result["buckets"]


def test_memory_may_run_out_anywhere_on_any_process_and_all_go_on_with_the_same_step(results) -> None:
    cases = [case for case in results if case[0] == "memory"]
    wanted, number = results["plain"][0]["weights"], results["plain"][0]["buckets"]
    assert len(cases) in (5, 3 * (number + 3))
    sent = set()
    for case in cases:
        for rank, result in enumerate(results[case]):
            assert (result["failed"] is not None) == (rank in case[1]), case
            sent |= {result["failed"]}
            assert torch.equal(result["weights"], results[case][0]["weights"]), case
            torch.testing.assert_close(result["weights"], wanted, atol=1e-6, rtol=0)
            assert result["positions"] == results[case][0]["positions"] is not None, case
            assert (result["begun"], result["sums"]) == (3, 3 * number), case  # two steps, one of them twice
    # Buckets that were under way when memory ran out: none, some, and nearly all.
    assert {0} < sent - {None}
    assert max(sent - {None}) >= number - 2
    assert len(sent - {None}) >= (3 if len(cases) == 5 else number - 1)


def test_operation_without_deterministic_algorithm_on_one_process_repeats_the_step_on_all(results) -> None:
    for result in results["not deterministic"]:
        torch.testing.assert_close(result["weights"], results["tables"][0]["weights"], atol=0, rtol=0)
        assert (result["begun"], result["positions"]) == (3, None)


def test_gradients_of_large_tables_are_summed_in_the_memory_where_they_are_kept(results) -> None:
    for plain, tables in zip(results["plain"], results["tables"], strict=True):
        assert plain["shared"] == []
        assert tables["shared"] == [True, True]
        torch.testing.assert_close(plain["weights"], tables["weights"], atol=1e-6, rtol=0)
        assert tables["within"] == plain["within"]


def test_processes_that_drop_different_layers_stay_equal(results) -> None:
    first, *others = results["dropped layers"]
    assert len(first["used"]) == 5
    assert all(other["used"] != first["used"] for other in others)
    assert all(torch.equal(other["weights"], first["weights"]) for other in others)


def test_sums_with_dropped_layers_are_those_of_the_processes_that_did_not_drop_them(results) -> None:
    for result in results["dropped layers, by hand"]:
        assert all(result["same_missing"])
        assert max(result["differences"]) <= (0 if len(results["plain"]) == 2 else 1e-6)
    steps = [step for result in results["dropped layers, by hand"] for step in result["users"]]
    assert any(mine < anyones for mine, anyones, _ in steps)
    assert any(anyones < every for _, anyones, every in steps)


def test_several_backward_passes_are_noticed_and_summed_after_the_last(results) -> None:
    for result in results["twice"]:
        torch.testing.assert_close(result["weights"], results["plain"][0]["weights"], atol=1e-6, rtol=0)
        assert torch.equal(result["weights"], results["twice"][0]["weights"])
        assert not result["overlapping"]
        assert result["begun"] == 3  # the first step twice


def test_trying_the_longest_batch_learns_nothing(results) -> None:
    for tried, plain in zip(results["after trying"], results["tables"], strict=True):
        assert torch.equal(tried["weights"], plain["weights"])


# ---------------------------------------------------------------------------------------------------- one process


class Net(nn.Module):
    """Three layers, of which the middle one may be left out; the weight of the last one lies in memory column by column."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.last.weight = nn.Parameter(self.last.weight.detach().t().contiguous().t())

    def forward(self, x: torch.Tensor, middle: bool = True) -> torch.Tensor:
        x = self.first(x)
        return self.last(self.middle(x) if middle else x).square().sum()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What is sent, one bucket a parameter; the other process has no gradients."""
    tensors: list[torch.Tensor] = []

    def start_sum(tensor: torch.Tensor) -> Any:
        tensors.append(tensor.clone())
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(gradients, "start_sum", start_sum)
    monkeypatch.setattr(gradients, "lowest_of_each", lambda _, values: list(values))
    monkeypatch.setattr(gradients, "FIRST_BUCKET", 1)
    monkeypatch.setattr(processes, "BUCKET_BYTES", 1)
    return tensors


def sums_of(model: nn.Module, num_processes: int = 2) -> Gradients:
    return Gradients(SimpleNamespace(num_processes=num_processes), model)  # type: ignore[arg-type]


def test_one_process_has_neither_buckets_nor_hooks(sent) -> None:
    model = Net()
    sums = sums_of(model, 1)
    assert sums.buckets == []
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    sums.begin()
    sums.begin_last()
    model(torch.ones(2, 4)).backward()
    assert sums.finish(False, False) == (False, False)
    assert sums.finish(True, False) == (True, True)
    assert sums.finish(False, True) == (True, False)
    assert sent == []


def test_gradient_of_several_micro_batches_lies_in_its_bucket_with_the_strides_of_its_parameter(sent) -> None:
    model, plain, x = Net(), Net(), torch.arange(12.0).view(3, 4)
    sums = sums_of(model)
    for _ in range(2):
        sums.begin()
        for index in range(3):
            if index == 2:
                assert sent == []
                sums.begin_last()
            model(x + index).backward()
            plain(x + index).backward()
        assert len(sent) == 6
        sums.finish(False, False)
        for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(parameter.grad, other.grad)
            assert parameter.grad.stride() == other.grad.stride() == parameter.stride(), name
            flat = sums.bucket_of[parameter].flat
            assert parameter.grad.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
        assert not model.last.weight.grad.is_contiguous()
        model.zero_grad()
        plain.zero_grad()
        sent.clear()


def test_parameter_that_is_not_used_sends_zeros_and_has_no_gradient(sent) -> None:
    model, x = Net(), torch.ones(2, 4)
    sums = sums_of(model)
    for middle in (True, False):
        sent.clear()
        sums.begin()
        sums.begin_last()
        model(x, middle).backward()
        assert len(sent) == (6 if middle else 2)  # the bucket that is not full holds up those after it
        sums.finish(False, False)
        assert len(sent) == 6
        assert sent[2].any() == sent[3].any() == middle
        assert (model.middle.weight.grad is not None) == middle
        assert model.first.weight.grad is not None
        model.zero_grad()


def test_parameter_that_only_another_process_uses_gets_the_sum(sent, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    sums = sums_of(model)
    monkeypatch.setattr(gradients, "lowest_of_each", lambda _, values: [*values[:3], *[0] * len(values[3:])])
    sums.begin()
    sums.begin_last()
    model(torch.ones(2, 4), middle=False).backward()
    sums.finish(False, False)
    assert not model.middle.weight.grad.any()


def test_parameter_that_was_never_used_is_not_waited_for_until_it_is(sent) -> None:
    model, x = Net(), torch.ones(2, 4)
    sums = sums_of(model)
    counts, again = [], []
    for middle in (False, False, True, True):
        sent.clear()
        sums.begin()
        sums.begin_last()
        model(x, middle).backward()
        counts.append(len(sent))
        again.append(sums.finish(False, False)[0])
        model.zero_grad()
    assert counts == [2, 6, 6, 6]
    assert again == [False, False, True, False]  # sent before it arrived: the step is repeated
    assert sums.overlapping


def test_a_late_gradient_on_any_process_ends_the_overlap_on_all(sent, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = sums_of(model := Net())
    monkeypatch.setattr(gradients, "lowest_of_each", lambda _, values: [*values[:2], 0, *values[3:]])
    sums.begin()
    sums.begin_last()
    model(torch.ones(2, 4)).backward()
    assert sums.finish(False, False) == (True, False)
    assert not sums.overlapping


def test_late_gradient_of_a_parameter_that_was_never_used_does_not_end_the_overlap(
    sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = sums_of(model := Net())
    again = []
    word: list[int] = []
    monkeypatch.setattr(gradients, "lowest_of_each", lambda _, values: [*values[:2], *map(min, values[2:], word)])
    for on_time, unused in (
        (1, 1),
        (0, 0),
        (1, 0),
    ):  # on the other process: all arrived on time, the middle layer is unused
        word[:] = [on_time, *[unused] * 6]
        sums.begin()
        sums.begin_last()
        model(torch.ones(2, 4), middle=False).backward()
        again.append(sums.finish(False, False)[0])
        model.zero_grad()
    assert again == [False, True, False]
    assert sums.overlapping


@pytest.mark.parametrize("bucket", [0, 3])
def test_memory_that_is_short_where_a_sum_starts_ends_the_run(sent, bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other processes may have begun that sum: tried again here, it would meet another one of theirs."""
    sums = sums_of(model := Net())

    def start_sum(tensor: torch.Tensor) -> Any:
        if sums.sent == bucket:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(gradients, "start_sum", start_sum)
    learner: Any = SimpleNamespace(
        gradients=sums,
        working=WorkingWeights(model, False),
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        graphs=SimpleNamespace(recording=False),
    )

    def attempt() -> None:
        with Attempt(learner, None):  # type: ignore[arg-type]
            sums.begin_last()
            model(torch.ones(2, 4)).backward()

    with pytest.raises(UserError, match=r"sum their gradients.*2\.00 MiB"):
        attempt()
    assert [bucket.pending is None for bucket in sums.buckets] == [False] * bucket + [True] * (6 - bucket)
    sums.begin()
    assert all(bucket.pending is None for bucket in sums.buckets)
