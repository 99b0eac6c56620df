"""Parameter groups, AdamW, and the learning rate of each step."""

import typing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from lib.config.sections import AdapterConfig, ModelConfig
from lib.config.train import OptimConfig, SchedulerName
from lib.errors import UserError
from lib.model.adapters.adapt import adapt
from lib.model.layers import freeze
from lib.training import optimizer as optim
from lib.training.optimizer import (
    advance_on_metric,
    advance_scheduler,
    build_optimizer,
    build_scheduler,
    learning_rate,
    parameter_groups,
    restore_optimizer,
    scheduler_settings,
)
from lib.training.plan import count_steps
from lib.training.step import gradient_norm
from tests.tiny_models import SETTINGS

CPU = torch.device("cpu")
TOTAL_STEPS = 20


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def rates(total_steps: int = TOTAL_STEPS, metric: str = "accuracy", **settings: typing.Any) -> list[float]:
    """The learning rate of each step under the schedule that `settings` describe."""
    config = OptimConfig(**settings)
    optimizer = build_optimizer(small_model(), config, CPU)
    scheduler = build_scheduler(optimizer, config, total_steps, metric)
    found = []
    for _ in range(total_steps):
        found.append(learning_rate(optimizer))
        optimizer.step()
        advance_scheduler(scheduler)
    return found


# ---------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("frozen", [(), (0,), (0, 1, 2), (0, 2, 4)])
def test_every_trainable_parameter_is_in_one_group_and_no_frozen_one(frozen: tuple[int, ...]) -> None:
    model = small_model()
    for index in frozen:
        model[index].requires_grad_(False)
    grouped = [id(p) for group in build_optimizer(model, OptimConfig(), CPU).param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_matrices_are_decayed_and_vectors_are_not() -> None:
    decayed, undecayed = parameter_groups(small_model(), OptimConfig(weight_decay=0.3))
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in undecayed["params"]} == {1}
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.3, 0.0)


# ---------------------------------------------------------------------------------------------------- rates by depth

BY_DEPTH = OptimConfig(learning_rate=1.0, layerwise_lr_decay=0.5, head_learning_rate=10.0)
EMBEDDINGS = ("embeddings", "embeddings_project", "wte", "wpe")


def tiny_classifier(kind: str, **settings: typing.Any) -> typing.Any:
    return AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(kind, **SETTINGS.get(kind, {}) | settings)
    )


def peak_rates(model: typing.Any, config: OptimConfig) -> dict[str, float]:
    """The rate at which each trainable parameter learns, by its name; each must be in one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, config, CPU).param_groups
    rates = [(names[id(p)], group["lr"]) for group in groups for p in group["params"]]
    assert len(rates) == len(dict(rates)) == sum(p.requires_grad for p in model.parameters())
    return dict(rates)


def rate_by_name(name: str, backbone: str) -> float:
    """The rate under `BY_DEPTH` of a parameter of a model with two layers, by its name."""
    first, *parts = name.split(".")
    if first != backbone:
        return 10.0
    if "0" in parts:
        return 0.5
    return 0.25 if parts[0] in EMBEDDINGS else 1.0


@pytest.mark.parametrize("kind", SETTINGS)
def test_layer_learns_slower_than_the_one_above_it_and_the_head_at_its_own_rate(kind: str) -> None:
    model = tiny_classifier(kind)
    rates = peak_rates(model, BY_DEPTH)
    assert rates == {name: rate_by_name(name, model.base_model_prefix) for name in rates}
    assert set(rates.values()) == {0.25, 0.5, 1.0, 10.0}


@pytest.mark.parametrize("kind", ["roberta", "modernbert"])
@pytest.mark.parametrize("method", ["bottleneck", "lora", "dora"])
def test_adapters_learn_at_the_rate_of_their_layer(kind: str, method: str, tmp_path: Path) -> None:
    """Names collide: ModernBERT calls its backbone `model`, and peft calls the adapted model so."""
    model = adapt(tiny_classifier(kind), AdapterConfig(adapter=method), ModelConfig(model=str(tmp_path)), [])
    rates = peak_rates(model, BY_DEPTH)
    assert {rate for name, rate in rates.items() if ".0." in name} == {0.5}
    assert {rate for name, rate in rates.items() if ".1." in name} == {1.0}
    assert {rate for name, rate in rates.items() if "classifier" in name} == {10.0}


def test_frozen_layers_are_in_no_group() -> None:
    model = tiny_classifier("roberta")
    freeze(model, "1")
    assert set(peak_rates(model, BY_DEPTH).values()) == {1.0, 10.0}
    freeze(model, "backbone")
    assert set(peak_rates(model, BY_DEPTH).values()) == {10.0}


def test_without_decay_and_head_rate_there_are_two_groups() -> None:
    groups = build_optimizer(tiny_classifier("roberta"), OptimConfig(learning_rate=3e-4), CPU).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(3e-4, 0.01), (3e-4, 0.0)]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "albert",
            {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 8},
            "AlbertModel does not show its 3",
        ),
        ("bart", {"encoder_layers": 2, "decoder_layers": 2, "d_model": 16}, "has an encoder and a decoder"),
    ],
)
def test_models_without_a_list_of_layers_are_refused(kind: str, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"--layerwise_lr_decay: .*{message}"):
        build_optimizer(tiny_classifier(kind, vocab_size=16, **settings), BY_DEPTH, CPU)


@pytest.mark.parametrize("name", typing.get_args(SchedulerName))
def test_all_rates_follow_one_schedule_and_the_logged_one_is_learning_rate(name: str) -> None:
    config = OptimConfig(learning_rate=1e-3, layerwise_lr_decay=0.5, head_learning_rate=1e-2, lr_scheduler_type=name)
    optimizer = build_optimizer(tiny_classifier("roberta"), config, CPU)
    scheduler = build_scheduler(optimizer, config, TOTAL_STEPS, "accuracy")
    for step in range(TOTAL_STEPS):
        told = learning_rate(optimizer)
        found = sorted({round(group["lr"] / told, 9) for group in optimizer.param_groups}) if told else []
        assert found == ([0.25, 0.5, 1.0, 10.0] if told else [])
        assert told == pytest.approx(rates(lr_scheduler_type=name, learning_rate=1e-3)[step])
        optimizer.step()
        advance_scheduler(scheduler)


def test_checkpoint_with_other_parameter_groups_is_refused() -> None:
    model = tiny_classifier("roberta")
    one, two = (build_optimizer(model, config, CPU) for config in (OptimConfig(), BY_DEPTH))
    scheduler = build_scheduler(two, BY_DEPTH, TOTAL_STEPS, "accuracy")
    with pytest.raises(
        UserError, match=r"other parameter groups: --layerwise_lr_decay.*--resume_from_checkpoint never"
    ):
        restore_optimizer(two, scheduler, one.state_dict(), scheduler.state_dict())


# ---------------------------------------------------------------------------------------------------- AdamW


def test_fused_adamw_equals_the_plain_one() -> None:
    config = OptimConfig(learning_rate=1e-2, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    ours, plain = small_model(), small_model()
    optimizers = (
        build_optimizer(ours, config, CPU),
        torch.optim.AdamW(
            parameter_groups(plain, config), lr=1e-2, betas=(0.8, 0.95), eps=1e-6, foreach=False, fused=False
        ),
    )
    assert optimizers[0].defaults["fused"]
    start = [parameter.detach().clone() for parameter in ours.parameters()]
    inputs = torch.arange(7)
    for _ in range(5):
        for model, optimizer in zip((ours, plain), optimizers, strict=True):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
    for first, second, before in zip(ours.parameters(), plain.parameters(), start, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
        assert not torch.equal(first, before)


# ------------------------------------------------------------------------------------------- tables of embeddings


class Reader(nn.Module):
    """Looks rows up in a large table and in a small one; the head shares the weights of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.shared = (
            nn.Embedding(40, 8, padding_idx=0),
            nn.Embedding(5, 8),
            nn.Embedding(40, 8),
        )
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.shared.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(ids) + self.places(ids % 5) + self.shared(ids))


def reader() -> Reader:
    torch.manual_seed(0)
    return Reader()


BATCHES = [torch.tensor(ids) for ids in ([3, 3, 0, 7], [7, 9, 39, 39], [1, 0, 0, 0])]


@pytest.mark.parametrize("alone", [True, False])
def test_reused_gradient_of_an_embedding_table_equals_a_fresh_one(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "is_alone", lambda: alone)
    config = OptimConfig(learning_rate=1e-2, weight_decay=0.1)
    plain, kept = reader(), reader()
    optimizers = [build_optimizer(plain, config, CPU)]
    monkeypatch.setattr(optim, "LARGE_TABLE", 320)
    optimizers.append(build_optimizer(kept, config, CPU))
    assert [table.sparse for table in (kept.words, kept.places, kept.shared)] == [True, False, False]
    where = kept.words.weight.grad.data_ptr()
    for ids in (*BATCHES, *BATCHES):
        for model in (plain, kept):
            for part in ids.split(3):  # two micro-batches
                model(part).square().sum().backward()
        for first, second in zip(plain.parameters(), kept.parameters(), strict=True):
            assert torch.equal(first.grad, second.grad)
        whole, touched = (optimizer.gradients() for optimizer in optimizers)
        torch.testing.assert_close(gradient_norm(touched), gradient_norm(whole))
        assert len(whole[0]) == 40
        assert len(touched[0]) == (len(ids[ids > 0].unique()) if alone else 40)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for first, second in zip(plain.parameters(), kept.parameters(), strict=True):
        assert torch.equal(first, second)
    assert kept.words.weight.grad.data_ptr() == where
    assert not kept.words.weight.grad.any()
    assert optimizers[1].kept[0][2] == []
    assert plain.words.weight.grad is None


def test_reused_gradient_forgets_numbers_that_were_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "LARGE_TABLE", 320)
    model = reader()
    optimizer = build_optimizer(model, OptimConfig(), CPU)
    (model(BATCHES[0]).sum() * float("nan")).backward()
    assert model.words.weight.grad.isnan().any()
    optimizer.zero_grad()
    assert not model.words.weight.grad.any()


def test_reused_gradient_is_right_for_a_table_used_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeBERTa uses its table of relative positions so."""
    monkeypatch.setattr(optim, "LARGE_TABLE", 320)
    model = reader()
    optimizer = build_optimizer(model, OptimConfig(), CPU)
    for _ in range(2):
        optimizer.zero_grad()
        (model(BATCHES[0]).sum() + model.words.weight.square().sum()).backward()
    kept, model = model.words.weight.grad, reader()
    (model(BATCHES[0]).sum() + model.words.weight.square().sum()).backward()
    torch.testing.assert_close(kept, model.words.weight.grad)


def test_gradients_of_frozen_tables_and_on_gpus_are_not_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "LARGE_TABLE", 1)
    model = reader()
    model.words.weight.requires_grad_(False)
    build_optimizer(model, OptimConfig(), CPU)
    assert (model.words.sparse, model.words.weight.grad, model.places.sparse) == (False, None, True)
    model = reader()
    build_optimizer(model, OptimConfig(), torch.device("meta"))
    assert model.words.weight.grad is None


def test_trained_parameters_are_not_memory_mapped(tmp_path: Path) -> None:
    """The first step would copy them page by page and take ten times as long as later ones."""
    path = str(tmp_path / "model.safetensors")
    save_file({"weight": torch.ones(600, 500), "bias": torch.zeros(600)}, path)
    model = nn.Linear(500, 600)
    for name, tensor in load_file(path).items():
        getattr(model, name).data = tensor
    model.bias.requires_grad_(False)
    assert lies_in(path, model.weight)
    build_optimizer(model, OptimConfig(), CPU)
    assert not lies_in(path, model.weight)
    assert lies_in(path, model.bias)
    assert torch.equal(model.weight, torch.ones(600, 500))


def lies_in(path: str, tensor: torch.Tensor) -> bool:
    """Whether the memory of `tensor` is mapped from the file `path`."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.endswith(path)
    return False


# ---------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("name", typing.get_args(SchedulerName))
def test_every_schedule_works_with_its_default_settings(name: str) -> None:
    peak = 1e-3
    found = rates(lr_scheduler_type=name, learning_rate=peak)
    assert all(0 <= rate <= peak * (1 + 1e-9) for rate in found)
    assert max(found) == pytest.approx(peak)


@pytest.mark.parametrize("warmup", [0, 1, 4, 20])
def test_linear_schedule_equals_its_closed_form(warmup: int) -> None:
    def closed_form(step: int) -> float:
        return step / warmup if step < warmup else (TOTAL_STEPS - step) / max(1, TOTAL_STEPS - warmup)

    found = rates(lr_scheduler_type="linear", learning_rate=2e-3, warmup_steps=warmup)
    assert found == pytest.approx([2e-3 * closed_form(step) for step in range(TOTAL_STEPS)], abs=1e-12)


@pytest.mark.parametrize(
    ("setting", "steps"), [(0, 0), (0.06, 2), (0.1, 2), (0.25, 5), (0.99, 20), (1, 1), (3, 3), (300, 300)]
)
def test_warmup_below_1_is_a_share_of_all_steps(setting: float, steps: int) -> None:
    assert count_steps(setting, TOTAL_STEPS) == steps


def test_rate_rises_during_warmup_and_not_after() -> None:
    found = rates(lr_scheduler_type="cosine", warmup_steps=0.25)
    assert found[:6] == sorted(found[:6])
    assert found[5:] == sorted(found[5:], reverse=True)


def test_settings_that_are_numbers_are_read_as_numbers() -> None:
    given = ("min_lr=1e-6", "num_cycles=2", "decay_type=cosine", "formula=a=b")
    read = scheduler_settings(OptimConfig(lr_scheduler_kwargs=given))
    assert read == {"min_lr": 1e-6, "num_cycles": 2, "decay_type": "cosine", "formula": "a=b"}
    assert type(read["num_cycles"]) is int


def test_schedule_ends_at_min_lr() -> None:
    shape = {"lr_scheduler_type": "cosine_with_min_lr", "learning_rate": 1e-3, "warmup_steps": 0}
    found = rates(total_steps=1000, lr_scheduler_kwargs=("min_lr=1e-4",), **shape)
    assert found[0] == pytest.approx(1e-3)
    assert found[-1] == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("linear", "min_lr=1e-6"),
        ("constant", "min_lr=1e-6"),
        ("constant_with_warmup", "num_cycles=2"),
        ("cosine", "cycles=2"),
        ("polynomial", "lr_end=1"),
        ("polynomial", "lr_end=low"),
        ("warmup_stable_decay", "decay_type=steep"),
        ("reduce_lr_on_plateau", "patient=2"),
        ("greedy", "patient=2"),
    ],
)
def test_setting_that_the_schedule_does_not_accept_is_refused(name: str, setting: str) -> None:
    with pytest.raises(UserError, match=rf"--lr_scheduler_type {name} with --lr_scheduler_kwargs .*{setting[:6]}"):
        rates(lr_scheduler_type=name, lr_scheduler_kwargs=(setting,))


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *(("polynomial", "power=-1"), ("polynomial", "lr_end=-1"), ("cosine_with_restarts", "num_cycles=x")),
        *(("cosine_with_min_lr", "min_lr=nan_"), ("cosine_with_min_lr", "min_lr=1e30")),
    ],
)
def test_settings_that_give_no_learning_rate_are_refused(name: str, setting: str) -> None:
    with pytest.raises(UserError, match=rf"--lr_scheduler_type {name} with --lr_scheduler_kwargs"):
        rates(lr_scheduler_type=name, lr_scheduler_kwargs=(setting,))


# ---------------------------------------------------------------------------------------------------- metric schedules


def rate_after_bad_evaluations(name: str, metric: str, values: list[float], patience: int = 1) -> float:
    kwargs = (f"patience={patience}",)
    config = OptimConfig(lr_scheduler_type=name, learning_rate=1e-3, warmup_steps=0, lr_scheduler_kwargs=kwargs)
    optimizer = build_optimizer(small_model(), config, CPU)
    scheduler = build_scheduler(optimizer, config, TOTAL_STEPS, metric)
    for value in values:
        advance_on_metric(scheduler, value)
    return learning_rate(optimizer)


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_follow_a_metric_ignore_steps(name: str) -> None:
    assert set(rates(total_steps=200, lr_scheduler_type=name, learning_rate=1e-3)) == {1e-3}


def test_plateau_lowers_the_rate_if_the_metric_does_not_improve() -> None:
    falling, rising = [0.9, 0.8, 0.7, 0.6], [0.6, 0.7, 0.8, 0.9]
    assert rate_after_bad_evaluations("reduce_lr_on_plateau", "accuracy", falling) < 1e-3
    assert rate_after_bad_evaluations("reduce_lr_on_plateau", "accuracy", rising) == 1e-3
    assert rate_after_bad_evaluations("reduce_lr_on_plateau", "loss", falling) == 1e-3
    assert rate_after_bad_evaluations("reduce_lr_on_plateau", "loss", rising) < 1e-3


def test_greedy_lowers_the_rate_if_the_metric_gets_worse() -> None:
    worse = [0.9 - 0.05 * step for step in range(12)]
    assert rate_after_bad_evaluations("greedy", "accuracy", worse) < 1e-3
    assert rate_after_bad_evaluations("greedy", "loss", worse[::-1]) < 1e-3


def test_schedules_that_follow_steps_ignore_the_metric() -> None:
    config = OptimConfig(lr_scheduler_type="linear", learning_rate=1e-3, warmup_steps=0)
    optimizer = build_optimizer(small_model(), config, CPU)
    scheduler = build_scheduler(optimizer, config, TOTAL_STEPS, "accuracy")
    advance_on_metric(scheduler, 0.5)
    assert learning_rate(optimizer) == 1e-3
