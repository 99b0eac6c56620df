"""What a step does when memory is short or a gradient is not finite; the laws of the step are in test_laws.py."""

import copy
import dataclasses
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

from lib.config.sections import DataConfig, ModelConfig
from lib.config.train import OptimConfig, TrainingConfig
from lib.data.load import load_data
from lib.data.loader import Window, build_collator, split_micro_batches
from lib.errors import UserError
from lib.model.layers import set_train_mode
from lib.model.load import build_model, load_tokenizer
from lib.model.losses import plain_cross_entropy
from lib.runtime.memory import halve
from lib.runtime.processes import buckets
from lib.training import step as training
from lib.training.optimizer import build_optimizer
from lib.training.plan import all_windows, build_plan
from lib.training.state import State
from lib.training.step import gradient_norm, optimizer_step, try_longest_batch
from tests.conftest import sentences, write_csv

# A large epsilon: AdamW divides by the size of the gradient, and would blow rounding errors up where that is zero.
OPTIM = OptimConfig(learning_rate=1e-2, adam_epsilon=1e-2)


@pytest.fixture
def parts(roberta_without_dropout: Path, tmp_path: Path) -> SimpleNamespace:
    """Everything that a step takes, for steps of 8 samples."""
    accelerator = Accelerator(cpu=True)
    source = ModelConfig(model=str(roberta_without_dropout))
    tokenizer = load_tokenizer(source)
    files = {
        f"{role}_file": str(write_csv(tmp_path / f"{role}.csv", sentences(20))) for role in ("train", "validation")
    }
    data = load_data(DataConfig(**files), tokenizer)
    torch.manual_seed(0)
    model, _ = build_model(source, data.label_names, tokenizer)
    config = TrainingConfig(train_batch_size=8, num_train_epochs=1)
    plan = build_plan(config, len(data.tokens["train"]), 1)
    optimizer = build_optimizer(model, OPTIM, accelerator.device)
    collator = build_collator(tokenizer, "no", accelerator.device)
    model, optimizer = accelerator.prepare(model, optimizer)
    set_train_mode(model)
    windows = sorted(all_windows(plan, config, data, collator, 0), key=lambda window: -window.num_samples)
    scheduler = LambdaLR(optimizer.optimizer, lambda _: 1.0)
    return SimpleNamespace(**{k: v for k, v in locals().items() if k != "self"})


def step(parts: SimpleNamespace, state: State, window: Window) -> tuple[torch.Tensor, torch.Tensor]:
    fixed = (parts.accelerator, parts.model, parts.optimizer, parts.scheduler, plain_cross_entropy)
    return optimizer_step(*fixed, window, OPTIM, 0, state)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).clone()


def fail_above(monkeypatch: pytest.MonkeyPatch, size: int) -> list[int]:
    """Lets forwards of more than `size` samples run out of memory; returns the sizes that were tried."""
    loss, tried = training.micro_batch_loss, []

    def short(model, micro_batch, *arguments):
        tried.append(len(micro_batch["labels"]))
        if tried[-1] > size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss(model, micro_batch, *arguments)

    monkeypatch.setattr(training, "micro_batch_loss", short)
    return tried


def test_a_step_that_does_not_fit_is_made_in_smaller_pieces_with_the_same_result(parts, monkeypatch):
    before = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
    whole, _ = step(parts, State(), parts.windows[0])
    wanted = weights(parts.model)
    parts.model.load_state_dict(before)
    parts.optimizer.optimizer.state.clear()
    state, tried = State(), fail_above(monkeypatch, 3)
    pieces, _ = step(parts, state, parts.windows[0])
    assert tried == [8, 4, 2, 2, 2, 2]
    assert (state.step, state.samples_seen, state.micro_batch_size) == (1, 8, 2)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(weights(parts.model), wanted, atol=1e-4, rtol=0)
    tried.clear()
    step(parts, state, parts.windows[1])
    assert max(tried) == 2  # the lesson is kept


def test_a_single_sample_that_does_not_fit_ends_the_run_with_advice(parts, monkeypatch):
    fail_above(monkeypatch, 0)
    with pytest.raises(UserError, match=r"with a single sample.*--max_length.*--freeze"):
        step(parts, State(), parts.windows[0])


def test_other_errors_are_not_taken_for_a_lack_of_memory(parts, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(training, "micro_batch_loss", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        step(parts, State(), parts.windows[0])


def test_the_longest_samples_are_tried_first_and_nothing_is_learnt_from_them(parts, monkeypatch):
    monkeypatch.setattr(training, "has_own_memory", lambda _: True)
    before, state, tried = weights(parts.model), State(), fail_above(monkeypatch, 4)
    try_longest_batch(
        parts.accelerator,
        parts.model,
        parts.optimizer,
        parts.plan,
        parts.data,
        parts.collator,
        plain_cross_entropy,
        state,
    )
    assert tried == [8, 4, 4]
    assert (state.step, state.micro_batch_size) == (0, 4)
    assert torch.equal(weights(parts.model), before)
    assert all(parameter.grad is None for parameter in parts.model.parameters())
    assert not parts.optimizer.optimizer.state


def test_a_step_whose_gradient_is_not_finite_leaves_weights_and_moments_alone(parts, monkeypatch):
    state = State()
    step(parts, state, parts.windows[0])
    before = weights(parts.model)
    moments = [value["exp_avg"].clone() for value in parts.optimizer.optimizer.state.values()]
    loss = training.micro_batch_loss
    monkeypatch.setattr(training, "micro_batch_loss", lambda *arguments: loss(*arguments) * float("nan"))
    loss_sum, norm = step(parts, state, parts.windows[1])
    assert torch.isnan(loss_sum)
    assert torch.isnan(norm)
    assert torch.equal(weights(parts.model), before)
    kept = [value["exp_avg"] for value in parts.optimizer.optimizer.state.values()]
    assert all(map(torch.equal, kept, moments))
    monkeypatch.setattr(training, "micro_batch_loss", loss)
    step(parts, state, parts.windows[2])
    assert not torch.equal(weights(parts.model), before)


@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e6, None])
def test_gradients_are_clipped_as_pytorch_clips_them(parts, max_norm):
    twin = copy.deepcopy(parts.model)
    other = build_optimizer(twin, OPTIM, parts.accelerator.device)
    for window in parts.windows[:2]:
        batch = dict(window.micro_batches[0])
        labels, weight = batch.pop("labels"), batch.pop("sample_weight")
        other.zero_grad()
        losses = plain_cross_entropy(twin(**batch).logits, labels) * weight
        (losses.sum() / window.weight).backward()
        wanted = torch.nn.utils.clip_grad_norm_(twin.parameters(), max_norm or math.inf)
        other.step()
        fixed = (parts.accelerator, parts.model, parts.optimizer, parts.scheduler, plain_cross_entropy)
        _, norm = optimizer_step(*fixed, window, dataclasses.replace(OPTIM, max_grad_norm=max_norm), 0, State())
        torch.testing.assert_close(norm, wanted)
        torch.testing.assert_close(weights(parts.model), weights(twin), rtol=0, atol=1e-6)


def test_the_norm_of_a_large_gradient_is_exact():
    """`torch.linalg.vector_norm` is 5e-4 off for the table of words of BERT, more than clipping should be."""
    torch.manual_seed(0)
    gradients = [torch.randn(30_522, 384) * 1e-3, torch.randn(7)]
    exact = sum(gradient.double().square().sum() for gradient in gradients).sqrt()
    assert abs(gradient_norm(gradients).double() - exact) < 2e-5 * exact


def test_cut_micro_batches_hold_every_sample_once_in_order():
    micro = [{"labels": torch.arange(5), "input_ids": torch.arange(10).view(5, 2)}, {"labels": torch.arange(5, 7)}]
    micro[1]["input_ids"] = torch.arange(10, 14).view(2, 2)
    pieces = split_micro_batches(Window(micro, 7, 7.0), 2)
    assert [len(piece["labels"]) for piece in pieces] == [2, 2, 1, 2]
    assert torch.cat([piece["labels"] for piece in pieces]).tolist() == list(range(7))
    assert torch.cat([piece["input_ids"] for piece in pieces]).flatten().tolist() == list(range(14))
    assert split_micro_batches(Window(micro, 7, 7.0), None) is micro


def test_micro_batches_with_several_labels_a_sample_are_cut_as_well():
    micro = [{"labels": torch.zeros(5, 3), "input_ids": torch.arange(10).view(5, 2)}]
    assert [len(piece["input_ids"]) for piece in split_micro_batches(Window(micro, 5, 5.0), 2)] == [2, 2, 1]


def test_halving_goes_down_to_one():
    sizes = [13]
    while sizes[-1] > 1:
        sizes.append(halve(sizes[-1], "--flag"))
    assert sizes == [13, 6, 3, 1]


def test_gradients_travel_in_buckets_of_one_type_in_their_order(monkeypatch):
    monkeypatch.setattr("lib.runtime.processes.BUCKET_BYTES", 40)
    tensors = [torch.zeros(n, dtype=kind) for n, kind in ((4, torch.float32), (6, torch.float32), (1, torch.float32))]
    tensors += [torch.zeros(30), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)]
    sizes = [[len(tensor) for tensor in bucket] for bucket in buckets(tensors)]
    assert sizes == [[4, 6], [1], [30], [2, 2]]
    assert np.sum([sum(size) for size in sizes]) == sum(map(len, tensors))


class Count(TorchDispatchMode):
    """Counts the operations within, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_a_step_asks_the_device_for_a_number_only_where_transformers_looks_for_padding(parts):
    """Every such question waits for a GPU to finish. BertModel and its kin ask once a forward whether a mask is needed."""
    state = State()
    for window in parts.windows[:2]:
        with Count() as count:
            step(parts, state, window)
        assert count.operations["_local_scalar_dense"] == len(window.micro_batches) == 1
        assert count.operations["nonzero"] == 0
    assert sum(count.operations.values()) < 1200
