"""bf16 weights beside float32 ones: equal to autocast bit by bit, with fewer casts, and never stale."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import train
from lib.config.sections import AdapterConfig, DataConfig, ModelConfig
from lib.config.train import OptimConfig, TrainConfig, TrainingConfig
from lib.data.loader import MicroBatch
from lib.model import compilation
from lib.model.forward import compute_logits
from lib.runtime.precision import cast_weights
from lib.training import gradients
from lib.training.gradients import Gradients
from lib.training.learner import Learner
from lib.training.working_weights import WorkingWeights, are_copied
from tests.conftest import Command, results_of, sentences, write_csv
from tests.resuming import differences, play, run_flags
from tests.stepping import METRICS, Experiment, build_experiment
from tests.tiny_models import SETTINGS, any_classifier

STEPS = 16
BF16 = ["--mixed_precision", "bf16"]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    roles = ("train", "validation")
    return {f"{role}_file": str(write_csv(tmp_path / f"{role}.csv", sentences(20))) for role in roles}


@pytest.fixture
def build(files: dict[str, str]) -> Iterator[Callable[..., Experiment]]:
    """`build(model, wanted)`: 16 steps of 8 samples in bf16, dropout on."""

    def call(model: Path, wanted: bool, adapter: Any = None, **settings: Any) -> Experiment:
        source = {name: settings.pop(name) for name in ("freeze",) if name in settings}
        options = {"train_batch_size": 8, "max_steps": STEPS, "bf16_weights": wanted} | settings
        config = TrainConfig(
            ModelConfig(model=str(model), **source),
            DataConfig(**files),
            OptimConfig(learning_rate=1e-2),
            training=TrainingConfig(**options),
            adapter=AdapterConfig(adapter=adapter),
        )
        return build_experiment(config, Accelerator(cpu=True, mixed_precision="bf16"))

    AcceleratorState._reset_state(reset_partial_state=True)  # of another precision
    yield call
    AcceleratorState._reset_state(reset_partial_state=True)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).clone()


def assert_equal_training(build: Callable[..., Experiment], model: Path, **settings: Any) -> Experiment:
    """Losses, norms and weights of all steps are equal with and without the copies; returns the experiment with them."""
    plain, copied = build(model, False, **settings), build(model, True, **settings)
    assert not plain.learner.working.of
    wanted, found = plain.train(), copied.train()
    assert len(wanted) == STEPS
    assert found == wanted
    assert torch.equal(weights(copied.learner.model), weights(plain.learner.model))
    assert len({loss for loss, _ in found}) > STEPS / 2, "it learned nothing"
    return copied


@pytest.mark.parametrize("kind", [*SETTINGS, "albert", "bart"])
def test_losses_and_weights_are_those_of_autocast_for_any_architecture(kind, build, tmp_path) -> None:
    copied = assert_equal_training(build, any_classifier(kind, tmp_path / kind))
    linear = [module for module in copied.learner.inner_model.modules() if type(module) is nn.Linear]
    assert {id(layer.weight) for layer in linear} <= {id(weight) for weight in copied.learner.working.of}


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 3},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "per_device_train_batch_size": 3},
        {"freeze": "1", "no_cache_features": True},
        {"freeze": "embeddings"},
        {"adapter": "lora"},
        {"adapter": "bottleneck"},
    ],
    ids=str,
)
def test_they_are_with_whatever_else_is_asked(settings, build, roberta) -> None:
    copied = assert_equal_training(build, roberta, **settings)
    assert bool(copied.learner.working.of) == ("adapter" not in settings)


def test_they_are_where_gradients_are_moved_in_parts(build, roberta, monkeypatch) -> None:
    monkeypatch.setattr(gradients, "AT_ONCE", 1500)
    assert_equal_training(build, roberta, per_device_train_batch_size=3)


@pytest.mark.slow
def test_they_are_with_compiled_layers(build, roberta, monkeypatch) -> None:
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compiled(self, backend="aot_eager", **how))
    monkeypatch.setattr(compilation, "check_compiler", lambda _: None)
    torch._dynamo.reset()
    assert_equal_training(build, roberta, compile=True)
    torch._dynamo.reset()


def test_they_are_with_evaluations_between_steps_which_use_the_same_memory(build, roberta) -> None:
    losses, scores = [], []
    for wanted in (False, True):
        experiment = build(roberta, wanted)
        learner, found = experiment.learner, []
        for batch in experiment.plan.step_batches(experiment.batches):
            found.append(experiment.step(batch))
            found.append(learner.evaluate(experiment.batches.split("validation"), METRICS).scores["loss"])
        losses.append(found)
        scores.append(weights(learner.model))
    assert losses[0] == losses[1]
    assert torch.equal(*scores)
    layer = learner.inner_model.classifier.dense
    kept = learner.working.of[layer.weight]
    with cast_weights(learner.inner_model, "bf16"):
        assert layer.weight is kept


def test_changed_weights_are_used_by_the_next_step_however_they_were_changed(build, roberta) -> None:
    """Loaded, averaged or edited by hand, also by ways that PyTorch does not count as a change."""
    plain, copied = build(roberta, False), build(roberta, True)
    for experiment in (plain, copied):
        for number, batch in enumerate(experiment.plan.step_batches(experiment.batches)):
            if number == 5:
                experiment.learner.model.load_state_dict(
                    {name: tensor * 0.5 for name, tensor in experiment.learner.model.state_dict().items()}
                )
            elif number == 9:
                for parameter in experiment.learner.model.parameters():
                    parameter.data.mul_(1.5)
            experiment.step(batch)
    assert torch.equal(weights(copied.learner.model), weights(plain.learner.model))


def test_out_of_memory_in_forward_or_backward_repeats_the_step_of_autocast(build, roberta, monkeypatch) -> None:
    failures: dict[int, str] = {}

    def fail(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def failing(learner: Learner, micro_batch: MicroBatch, weight: float) -> torch.Tensor:
        where = failures.pop(learner.state.step, None)
        if where == "forward":
            fail(compute_logits(learner.model, micro_batch.inputs))
        if where == "backward":  # after the gradients of all layers
            handle = learner.inner_model.roberta.embeddings.LayerNorm.weight.register_hook(fail)
            try:
                return FORWARD_BACKWARD(learner, micro_batch, weight)
            finally:
                handle.remove()
        return FORWARD_BACKWARD(learner, micro_batch, weight)

    monkeypatch.setattr(train, "forward_backward", failing)
    results = []
    for wanted in (False, True):
        experiment = build(roberta, wanted)
        failures |= {3: "forward", 6: "backward"}
        losses = experiment.train()
        assert not failures
        assert experiment.learner.state.micro_batch_positions is not None
        results.append((losses, weights(experiment.learner.model)))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_a_step_that_is_not_finite_changes_neither_weights_nor_what_follows(build, roberta) -> None:
    results = []
    for wanted in (False, True):
        experiment = build(roberta, wanted)
        learner, losses = experiment.learner, []
        for number, batch in enumerate(experiment.plan.step_batches(experiment.batches)):
            if number == 4:
                before = weights(learner.model)
                for micro_batch in batch.micro_batches:
                    micro_batch.weights.fill_(float("inf"))
            losses.append(experiment.step(batch)) if number != 4 else train.train_step(
                learner, batch, experiment.config
            )
            if number == 4:
                assert torch.equal(weights(learner.model), before)
        results.append((losses, weights(learner.model)))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_weights_are_in_their_places_after_a_step_that_was_given_up(error, build, roberta) -> None:
    experiment = build(roberta, True)
    learner = experiment.learner
    before = [id(parameter) for parameter in learner.model.parameters()]
    within: set[torch.dtype] = set()

    def stop(*_: Any) -> None:
        within.update(parameter.dtype for parameter in learner.model.parameters())
        raise error

    handle = learner.inner_model.classifier.register_forward_pre_hook(stop)
    with pytest.raises(error):
        experiment.train()
    handle.remove()
    assert within == {torch.float32, torch.bfloat16}
    assert [id(parameter) for parameter in learner.model.parameters()] == before


# ---------------------------------------------------------------------------------------------------- changed loops


def two_forwards(learner: Learner, micro_batch: MicroBatch, weight: float) -> torch.Tensor:
    """R-Drop without its divergence: the gradients of two forwards in one backward."""
    first, second = (compute_logits(learner.model, micro_batch.inputs) for _ in range(2))
    losses = sum(learner.objective.loss(logits, micro_batch.labels) for logits in (first, second)) / 2
    loss = (losses * micro_batch.weights).sum()
    learner.accelerator.backward(loss / weight)
    return loss.detach()


def two_backwards(learner: Learner, micro_batch: MicroBatch, weight: float) -> torch.Tensor:
    return sum(FORWARD_BACKWARD(learner, micro_batch, 2 * weight) for _ in range(2)) / 2


def penalty(learner: Learner, micro_batch: MicroBatch, weight: float) -> torch.Tensor:
    """A penalty on the parameters, which are read outside of the model's forward; and a use of one of its layers there."""
    parameters = list(learner.model.parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    loss = sum(parameter.square().sum() for parameter in parameters) * 1e-3
    head = learner.inner_model.classifier.dense
    learner.accelerator.backward(loss + head(torch.ones(1, head.in_features)).square().sum() * 1e-3)
    result = FORWARD_BACKWARD(learner, micro_batch, weight)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in parameters)
    return result


FORWARD_BACKWARD = train.forward_backward


@pytest.mark.parametrize("loop", [two_forwards, two_backwards, penalty])
def test_changed_loops_learn_what_they_learn_under_autocast(loop, build, roberta, monkeypatch) -> None:
    monkeypatch.setattr(train, "forward_backward", loop)
    assert_equal_training(build, roberta)


def test_a_copy_of_the_model_computes_with_its_own_weights(build, roberta) -> None:
    learner = build(roberta, True).learner
    twin = copy.deepcopy(learner.model)
    learner.working.refresh()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    ids = torch.ones(1, 3, dtype=torch.int64)
    assert not twin(input_ids=ids).logits.any()
    assert learner.model(input_ids=ids).logits.any()


# ---------------------------------------------------------------------------------------------------- what is copied


def test_weights_that_other_modules_read_are_left_to_autocast_and_shared_ones_stay_shared() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.head.weight, self.second.weight = self.table.weight, self.first.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.head(self.second(self.first(self.frozen(self.table(ids)))))

    found = []
    for wanted in (False, True):
        torch.manual_seed(0)
        model = Tied()
        working = WorkingWeights(model, wanted)
        sums = Gradients(SimpleNamespace(num_processes=1), model, working)  # type: ignore[arg-type]
        sums.begin(), working.refresh()
        for _ in range(2):
            model(torch.arange(7)).float().square().sum().backward()
        working.expire()
        found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert [id(p) for p in working.of] == [
        id(p) for p in (model.head.bias, model.first.weight, model.first.bias, model.second.bias)
    ]
    for plain, copied in zip(*found, strict=True):
        assert torch.equal(plain, copied)
        assert copied.dtype == torch.float32


@pytest.mark.parametrize(
    ("wanted", "precision", "device", "copied"),
    [
        (None, "bf16", "cuda", True),
        (None, "bf16", "cpu", False),  # no faster there
        (True, "bf16", "cpu", True),
        (False, "bf16", "cuda", False),
        (True, "fp16", "cuda", False),
        (True, "no", "cuda", False),
    ],
)
def test_copies_are_made_in_bf16_on_gpus_unless_the_user_decides(wanted, precision, device, copied) -> None:
    assert are_copied(wanted, precision, torch.device(device)) == copied
    model = nn.Linear(2, 2)
    assert bool(WorkingWeights(model, copied).of) == bool(model._forward_pre_hooks) == copied


class Casts(TorchDispatchMode):
    """Counts operations, and those that make bf16 of float32 or the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.all = 0
        self.casts = self.together = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.all += 1
        self.casts += func is torch.ops.aten._to_copy.default and args[0].is_floating_point()
        self.together += func in (torch.ops.aten._foreach_copy_.default, torch.ops.aten._foreach_add_.List)
        return result


@pytest.mark.parametrize("size", [8, 3])
def test_a_step_has_no_casts_of_weights_or_of_their_gradients(build, roberta, size) -> None:
    found = []
    for wanted in (False, True):
        experiment = build(roberta, wanted, per_device_train_batch_size=size)
        first, second, *_ = experiment.plan.step_batches(experiment.batches)
        experiment.step(first)
        number = sum(len(list(layer.parameters())) for layer in linear_layers(experiment.learner))
        with Casts() as casts:
            experiment.step(second)
        found.append(casts)
        micro_batches = len(second.pieces(None))
        assert micro_batches == (1 if size == 8 else 3)
    casts = 2 * number * micro_batches  # of each weight in forward, of its gradient in backward
    assert found[0].casts - found[1].casts == casts
    assert found[1].together == 1 + micro_batches  # once a step, and once a backward pass
    assert found[1].all <= found[0].all - casts + number + found[1].together


def linear_layers(learner: Learner) -> list[nn.Linear]:
    return [module for module in learner.inner_model.modules() if type(module) is nn.Linear]


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("flags", [(), ("--freeze", "1")])
def test_a_run_has_the_same_files_with_and_without_copies(flags, call: Command, roberta, tmp_path) -> None:
    for wanted in ("False", "True"):
        named = ["--output_dir", tmp_path / wanted, "--bf16_weights", wanted]
        results_of(call("train.py", *run_flags(tmp_path, roberta), *BF16, *flags, *named))
    assert not differences(tmp_path / "False", tmp_path / "True", frozenset({"config"}))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_resumes_bitwise_also_with_the_other_setting(processes, run: Command, roberta, tmp_path) -> None:
    on, off = [*BF16, "--bf16_weights", "True"], [*BF16, "--bf16_weights", "False"]
    calls = [
        {"folder": "whole", "flags": off},
        {"folder": "resumed", "stop": 4, "flags": on},
        {"folder": "resumed", "stop": 6, "flags": off},
        {"folder": "resumed", "flags": on},
    ]
    play(run, tmp_path, roberta, calls, processes)
    assert not differences(tmp_path / "whole", tmp_path / "resumed")
    for name in ("whole", "resumed"):
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert (results["run/num_processes"], results["run/mixed_precision"]) == (processes, "bf16")
