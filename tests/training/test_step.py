"""What a step does when memory is short or a gradient is not finite; the laws of the step are in test_laws.py."""

import copy
import dataclasses
import math
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

import train
from lib.config.sections import DataConfig, ModelConfig
from lib.config.train import OptimConfig, TrainConfig, TrainingConfig
from lib.data.loader import MicroBatch, StepBatch
from lib.errors import UserError
from lib.model.forward import compute_logits
from lib.model.losses import plain_cross_entropy
from lib.runtime import determinism
from lib.runtime.cpu.kernels import use_cpu_kernels
from lib.training import step
from lib.training.optimizer import build_optimizer
from lib.training.state import State
from lib.training.step import gradient_norm
from tests.conftest import sentences, write_csv
from tests.stepping import Experiment, build_experiment

# A large epsilon: AdamW divides by the size of the gradient, which amplifies rounding errors where that is near zero.
OPTIM = OptimConfig(learning_rate=1e-2, adam_epsilon=1e-2)


@pytest.fixture
def experiment(roberta_without_dropout: Path, tmp_path: Path) -> Experiment:
    """Steps of 8 samples."""
    roles = ("train", "validation")
    files = {f"{role}_file": str(write_csv(tmp_path / f"{role}.csv", sentences(20))) for role in roles}
    training = TrainingConfig(train_batch_size=8, num_train_epochs=1)
    source = ModelConfig(model=str(roberta_without_dropout))
    experiment = build_experiment(
        TrainConfig(source, DataConfig(**files), OPTIM, training=training), Accelerator(cpu=True)
    )
    experiment.learner.scheduler = LambdaLR(experiment.learner.optimizer.optimizer, lambda _: 1.0)
    return experiment


@pytest.fixture
def batches(experiment: Experiment) -> list[StepBatch]:
    return sorted(experiment.plan.step_batches(experiment.batches), key=lambda batch: -batch.num_samples)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).clone()


def fail_above(monkeypatch: pytest.MonkeyPatch, size: int) -> list[int]:
    """Let forwards of more than `size` samples run out of memory; returns the sizes that were tried."""
    tried = []

    def limited(model, inputs):
        tried.append(len(inputs["input_ids"]))
        if tried[-1] > size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return compute_logits(model, inputs)

    monkeypatch.setattr(train, "compute_logits", limited)
    return tried


def test_step_that_does_not_fit_in_memory_is_the_same_step_in_smaller_micro_batches(experiment, batches, monkeypatch):
    learner = experiment.learner
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    whole, _ = experiment.step(batches[0])
    wanted = weights(learner.model)
    learner.model.load_state_dict(before)
    learner.optimizer.optimizer.state.clear()
    learner.state, tried = State(), fail_above(monkeypatch, 3)
    pieces, _ = experiment.step(batches[0])
    length = batches[0].micro_batches[0].inputs["input_ids"].shape[1]
    assert tried == [8, 4, 2, 2, 2, 2]
    assert (learner.state.step, learner.state.samples_seen, learner.state.micro_batch_positions) == (1, 8, 2 * length)
    assert pieces == pytest.approx(whole, abs=1e-6)
    torch.testing.assert_close(weights(learner.model), wanted, atol=1e-4, rtol=0)


def test_micro_batches_are_cut_by_positions_so_that_steps_of_short_texts_stay_whole(experiment, batches, monkeypatch):
    """Memory grows with rows x padded length: what a long batch does not fit in says nothing of a short one."""
    learner, micro = experiment.learner, batches[1].micro_batches[0]
    cut_off = {name: tensor[:, :6] for name, tensor in micro.inputs.items()}
    short = StepBatch([MicroBatch(cut_off, micro.labels, micro.weights)], len(micro), float(len(micro)))
    long = max(batches, key=lambda batch: batch.micro_batches[0].positions)
    batches = [long, short, long, short]
    shapes = [tuple(batch.micro_batches[0].inputs["input_ids"].shape) for batch in batches]
    most = max(rows * length for rows, length in shapes) - 1
    assert min(rows * length for rows, length in shapes) <= most // 2
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    whole = [experiment.step(batch) for batch in batches]
    wanted = weights(learner.model)

    learner.model.load_state_dict(before)
    learner.optimizer.optimizer.state.clear()
    learner.state, tried = State(), []

    def limited(model, inputs):
        tried.append(tuple(inputs["input_ids"].shape))
        if inputs["input_ids"].numel() > most:
            raise torch.AcceleratorError("CUDA error: out of memory")
        return compute_logits(model, inputs)

    monkeypatch.setattr(train, "compute_logits", limited)
    cut = []
    for batch, shape in zip(batches, shapes, strict=True):
        tried.clear()
        cut.append(experiment.step(batch))
        assert (tried == [shape]) == (batch is short)
    assert learner.state.micro_batch_positions == (most + 1) // 2
    np.testing.assert_allclose(cut, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights(learner.model), wanted, atol=1e-4, rtol=0)


def test_texts_in_several_windows_are_cut_between_texts_until_they_fit(experiment, batches, monkeypatch):
    """A text of many windows cannot be cut: the others beside it are."""
    micro = batches[0].micro_batches[0]
    counts = torch.tensor([5, 1, 2])
    inputs = {name: tensor[:1].expand(8, -1) for name, tensor in micro.inputs.items()} | {"num_windows": counts}
    batch = StepBatch([MicroBatch(inputs, micro.labels[:3], torch.ones(3))], 3, 3.0)
    tried = fail_above(monkeypatch, 5)
    experiment.step(batch)
    assert tried == [8, 5, 3]
    experiment.learner.state = State()
    fail_above(monkeypatch, 4)
    with pytest.raises(UserError, match="with a single sample"):  # not for ever: the long text stays as large as it is
        experiment.step(batch)


@pytest.mark.parametrize("message", ["RuntimeError", "does not have a deterministic implementation, but you set"])
def test_model_without_deterministic_algorithms_is_trained_without_and_says_so(
    experiment, message, monkeypatch, caplog
):
    monkeypatch.setattr(step, "has_own_memory", lambda _: True)
    monkeypatch.setattr(determinism, "uses_gpu", lambda: True)
    done = []

    def forward_backward(*arguments):
        if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(f"cumsum_cuda_kernel {message}")
        done.append(arguments)

    determinism.request_determinism(True)
    try:
        if message == "RuntimeError":
            with pytest.raises(RuntimeError, match="cumsum"):
                step.try_longest_batch(experiment.learner, experiment.batches.longest(4), forward_backward)
        else:
            step.try_longest_batch(experiment.learner, experiment.batches.longest(4), forward_backward)
            assert len(done) == 1
            assert "cumsum_cuda_kernel" in caplog.text
    finally:
        determinism.request_determinism(False)


def test_single_sample_that_does_not_fit_in_memory_ends_the_run_with_advice(experiment, batches, monkeypatch):
    fail_above(monkeypatch, 0)
    with pytest.raises(UserError, match=r"with a single sample.*--adapter lora.*--freeze.*--max_length"):
        experiment.step(batches[0])


@pytest.mark.parametrize(
    ("error", "is_swallowed"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not match"), False),
        (KeyError("labels"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_attempt_swallows_out_of_memory_errors_only(experiment, batches, error, is_swallowed):
    attempt, caught = step.Attempt(experiment.learner, batches[0]), None
    try:
        with attempt:
            raise error
    except BaseException as other:
        caught = other
    assert caught is (None if is_swallowed else error)
    assert attempt.failed is is_swallowed


def test_failed_attempt_frees_its_activations_before_the_next(experiment, batches, monkeypatch):
    alive, backward = [], Accelerator.backward

    def failing_backward(accelerator, loss):
        if len(alive) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        backward(accelerator, loss)

    def observed(model, inputs):
        assert not [reference for reference in alive if reference() is not None]
        logits = compute_logits(model, inputs)
        alive.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(Accelerator, "backward", failing_backward)
    monkeypatch.setattr(train, "compute_logits", observed)
    experiment.step(batches[0])
    assert len(alive) == 3  # one of 8 samples that failed, two of 4


def test_trying_the_longest_samples_finds_the_size_that_fits_and_learns_nothing(experiment, monkeypatch):
    monkeypatch.setattr(step, "has_own_memory", lambda _: True)
    learner, tried = experiment.learner, fail_above(monkeypatch, 4)
    before = weights(learner.model)
    longest = experiment.batches.longest(experiment.plan.micro_batch_size)
    lengths = experiment.batches.data.lengths["train"]
    assert longest.micro_batches[0].inputs["attention_mask"].sum(dim=1).tolist() == sorted(lengths)[:-9:-1]
    step.try_longest_batch(learner, longest, train.forward_backward)
    assert tried == [8, 4, 4]
    length = longest.micro_batches[0].inputs["input_ids"].shape[1]
    assert (learner.state.step, learner.state.micro_batch_positions) == (0, 4 * length)
    assert torch.equal(weights(learner.model), before)
    assert all(parameter.grad is None for parameter in learner.model.parameters())
    assert not learner.optimizer.optimizer.state


def test_step_whose_gradient_is_not_finite_changes_neither_weights_nor_moments(experiment, batches, monkeypatch):
    model, optimizer = experiment.learner.model, experiment.learner.optimizer.optimizer
    experiment.step(batches[0])
    before = weights(model)
    moments = [value["exp_avg"].clone() for value in optimizer.state.values()]
    with monkeypatch.context() as patch:
        patch.setattr(train, "compute_logits", lambda *arguments: compute_logits(*arguments) * float("nan"))
        with pytest.raises(UserError, match="not finite at step 2 "):
            experiment.step(batches[1])
    assert torch.equal(weights(model), before)
    kept = [value["exp_avg"] for value in optimizer.state.values()]
    assert all(map(torch.equal, kept, moments))
    experiment.step(batches[2])
    assert not torch.equal(weights(model), before)


@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e6, None])
def test_gradients_are_clipped_as_pytorch_clips_them(experiment, batches, max_norm):
    learner = experiment.learner
    twin = copy.deepcopy(learner.model)
    other = build_optimizer(twin, OPTIM, learner.accelerator.device)
    experiment.config = dataclasses.replace(experiment.config, optim=dataclasses.replace(OPTIM, max_grad_norm=max_norm))
    for batch in batches[:2]:
        micro_batch = batch.micro_batches[0]
        other.zero_grad()
        losses = plain_cross_entropy(twin(**micro_batch.inputs).logits, micro_batch.labels) * micro_batch.weights
        (losses.sum() / batch.weight).backward()
        wanted = torch.nn.utils.clip_grad_norm_(twin.parameters(), max_norm or math.inf)
        other.step()
        _, norm = experiment.step(batch)
        assert norm == pytest.approx(wanted.item(), rel=1e-5)
        torch.testing.assert_close(weights(learner.model), weights(twin), rtol=0, atol=1e-6)


def test_norm_of_a_large_gradient_is_exact():
    """`torch.linalg.vector_norm` is 5e-4 off for the embedding table of BERT, more than clipping should be."""
    torch.manual_seed(0)
    gradients = [torch.randn(30_522, 384) * 1e-3, torch.randn(7), torch.randn(3, 512), torch.randn(0), torch.ones(())]
    exact = sum(gradient.double().square().sum() for gradient in gradients).sqrt()
    assert abs(gradient_norm(gradients).double() - exact) < 2e-5 * exact
    ascending = torch.linspace(0, 1, 30_522 * 384).square()  # small numbers first: the worst order for float32 sums
    # What the docstring proves for every order of additions; how much of it is used depends on the processor.
    assert abs(gradient_norm([ascending]).double() - ascending.double().norm()) < 2e-5 * ascending.double().norm()


def test_norm_of_a_gradient_does_not_depend_on_threads():
    torch.manual_seed(0)
    gradients = [torch.randn(size) for size in (1, 511, 512, 513, 32_768, 700_001)]
    threads, norms = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            norms.append(gradient_norm(gradients).item())
    finally:
        torch.set_num_threads(threads)
    assert len(set(norms)) == 1


class Count(TorchDispatchMode):
    """Counts the operations within, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_step_reads_nothing_from_the_device(experiment, batches):
    """Each read waits for a GPU to finish."""
    use_cpu_kernels(False)  # they never run on a GPU
    for batch in batches[:2]:
        with Count() as count:
            train.train_step(experiment.learner, batch, experiment.config)
        assert count.operations["_local_scalar_dense"] == count.operations["nonzero"] == 0
