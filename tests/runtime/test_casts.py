"""Weights and inputs cast once give what autocast gives, with fewer casts, and leave the model as it was."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from lib.runtime.cpu.casts import use_shared_casts
from lib.runtime.precision import cast_weights

INPUTS = [{"input_ids": torch.randint(5, 30, (2, n), generator=torch.Generator().manual_seed(n))} for n in (3, 7, 4)]

CASTS = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)


class Casts(TorchDispatchMode):
    """Counts the casts to bfloat16 of tensors of the given shapes."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in CASTS and args[0].dtype == torch.float32 and result.dtype == torch.bfloat16:
            self.count += args[0].shape in self.shapes
        return result


@pytest.fixture(params=["bert", "deberta-v2", "modernbert", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 36}
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2} if request.param == "gpt2" else sizes
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = AutoConfig.for_model(request.param, vocab_size=40, num_labels=3, **ids, **sizes)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


@torch.inference_mode()
def all_logits(model: torch.nn.Module, mixed: bool = False) -> list[np.ndarray]:
    """Logits of each batch; a forward has an autocast of its own, as in Accelerate."""
    logits = []
    for batch in INPUTS:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logits.append(model(**batch).logits.float().numpy())
    return logits


def test_logits_are_those_of_autocast_to_the_last_bit(model: PreTrainedModel) -> None:
    plain = all_logits(model)
    autocast = all_logits(model, mixed=True)
    with cast_weights(model, "bf16"):
        cast = all_logits(model, mixed=True)
    for a, b, c in zip(plain, autocast, cast, strict=True):
        np.testing.assert_array_equal(b, c)
        assert not np.array_equal(a, b), "autocast was off"


def test_each_linear_weight_is_cast_once_and_not_once_a_forward(model: PreTrainedModel) -> None:
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    shapes = {layer.weight.shape for layer in layers}
    with Casts(shapes) as every_time:
        all_logits(model, mixed=True)
    with Casts(shapes) as once, cast_weights(model, "bf16"):
        all_logits(model, mixed=True)
    assert every_time.count >= len(INPUTS) * len(layers)
    assert once.count <= every_time.count - (len(INPUTS) - 1) * len(layers)


def test_parameters_are_the_same_objects_afterwards_also_after_an_error(model: PreTrainedModel) -> None:
    before = {name: (id(p), p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    within: set[torch.dtype] = set()
    hook = model.register_forward_pre_hook(lambda *_: within.update(p.dtype for p in model.parameters()))
    with pytest.raises(ValueError, match="input_ids"), cast_weights(model, "bf16"):
        model(input_ids=None)
    hook.remove()
    assert within == {torch.float32, torch.bfloat16}
    assert {name: (id(p), p.dtype, p.requires_grad) for name, p in model.named_parameters()} == before


def test_weights_that_layers_share_are_cast_once() -> None:
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.weight = first.weight
    with cast_weights(torch.nn.Sequential(first, second), "bf16"):
        assert first.weight is second.weight
        assert first.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["no", "fp8"])
def test_nothing_is_cast_where_precision_is_not_mixed(roberta: Path, precision: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(roberta)
    with cast_weights(model, precision):
        assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.fixture
def unshared() -> Iterator[None]:
    """Nothing is shared but between `use_shared_casts` and the end of the test."""
    stop_sharing()
    yield
    stop_sharing()


def stop_sharing() -> None:
    use_shared_casts().remove()
    use_shared_casts.cache_clear()


def training_step(model: PreTrainedModel, mixed: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Logits and all gradients, without dropout."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        logits = model(**INPUTS[1]).logits.float()
    logits.square().sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logits.detach().numpy(), torch.cat(gradients).numpy()


@pytest.mark.usefixtures("unshared")
def test_shared_casts_of_inputs_change_no_logit_and_gradients_by_less_than_autocast_does(
    model: PreTrainedModel,
) -> None:
    _, exact = training_step(model, mixed=False)
    logits, gradients = training_step(model)
    use_shared_casts()
    shared_logits, shared_gradients = training_step(model)
    np.testing.assert_array_equal(logits, shared_logits)
    error, shared_error = (np.linalg.norm(found - exact) for found in (gradients, shared_gradients))
    assert 0 < shared_error < 1.1 * error
    assert np.linalg.norm(shared_gradients - gradients) < error


@pytest.mark.usefixtures("unshared")
@pytest.mark.parametrize("model", ["bert"], indirect=True)
def test_the_input_of_queries_keys_and_values_is_cast_once(model: PreTrainedModel) -> None:
    shape = {torch.Size((2, 7, 24))}
    with Casts(shape) as apart:
        training_step(model)
    use_shared_casts()
    with Casts(shape) as shared:
        training_step(model)
    layers = model.config.num_hidden_layers
    assert apart.count - shared.count == 2 * layers


@pytest.mark.usefixtures("unshared")
def test_an_input_that_was_changed_in_place_is_cast_anew() -> None:
    torch.manual_seed(0)
    layer, scale = torch.nn.Linear(3, 3), torch.ones(3, requires_grad=True)
    use_shared_casts()
    with torch.autocast("cpu", torch.bfloat16):
        states = torch.randn(2, 3) * scale
        before = layer(states)
        states.add_(1)
        after = layer(states)
        np.testing.assert_array_equal(after.detach().float(), layer(states + 0).detach().float())
    assert not torch.equal(before, after)


@pytest.mark.usefixtures("unshared")
def test_what_no_gradient_goes_through_is_left_to_autocast(model: PreTrainedModel) -> None:
    shape = {torch.Size((2, 7, 24))}
    counts = []
    for share in (False, True):
        if share:
            use_shared_casts()
        for no_gradient in (torch.no_grad, torch.inference_mode):
            with Casts(shape) as casts, no_gradient(), torch.autocast("cpu", torch.bfloat16):
                model(**INPUTS[1])
            counts.append(casts.count)
    assert len(set(counts)) == 1
