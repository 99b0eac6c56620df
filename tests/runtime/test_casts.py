"""Inputs of linear layers cast once give what autocast gives, and are not seen by hooks, subclasses and transformations."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from lib.runtime.cpu.casts import shared_casts

pytestmark = pytest.mark.usefixtures("no_kernels")

BATCH = {"input_ids": torch.randint(5, 30, (2, 7), generator=torch.Generator().manual_seed(7))}


def model(kind: str) -> PreTrainedModel:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 36}
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2} if kind == "gpt2" else sizes
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = AutoConfig.for_model(kind, vocab_size=40, num_labels=3, **ids, **sizes)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


def logits_and_gradients(model: PreTrainedModel, mixed: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Without dropout."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        logits = model(**BATCH).logits.float()
    logits.square().sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logits.detach().numpy(), torch.cat(gradients).numpy()


@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "modernbert", "gpt2"])
def test_logits_stay_the_same_and_gradients_as_near_to_float32_as_those_of_autocast(kind: str) -> None:
    classifier = model(kind)
    _, exact = logits_and_gradients(classifier, mixed=False)
    logits, gradients = logits_and_gradients(classifier)
    with shared_casts():
        shared_logits, shared_gradients = logits_and_gradients(classifier)
    np.testing.assert_array_equal(logits, shared_logits)
    error, shared_error = (np.linalg.norm(found - exact) for found in (gradients, shared_gradients))
    assert 0 < shared_error < 1.1 * error
    assert np.linalg.norm(shared_gradients - gradients) < error


def heads_and_states() -> tuple[nn.ModuleList, torch.Tensor]:
    """Three layers that read the same activations, which have a graph."""
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(64, 64) for _ in range(3)), torch.randn(5, 64, requires_grad=True) * 2


def gradient_of_states(layers: nn.ModuleList, states: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        result = torch.stack([layer(states) for layer in layers]).sum(0)
    return torch.autograd.grad(result.float().square().sum(), states)[0]


def test_gradients_of_layers_with_one_input_are_added_before_they_are_cast_back() -> None:
    layers, states = heads_and_states()
    apart = gradient_of_states(layers, states)
    with shared_casts():
        shared = gradient_of_states(layers, states)
    assert torch.equal(shared, shared.bfloat16().float())  # one number of bf16, which a sum of three is not
    assert not torch.equal(apart, apart.bfloat16().float())
    torch.testing.assert_close(shared, apart, rtol=2**-6, atol=2**-6 * apart.abs().max().item())


def observed_by_hook(layer: nn.Linear, seen: list[torch.dtype]) -> None:
    layer.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0].dtype))


def observed_by_pre_hook(layer: nn.Linear, seen: list[torch.dtype]) -> None:
    layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].dtype))


def observed_by_backward_hook(layer: nn.Linear, seen: list[torch.dtype]) -> None:
    layer.register_full_backward_hook(lambda _, of_inputs, __: seen.append(of_inputs[0].dtype))


def observed_by_own_forward(layer: nn.Linear, seen: list[torch.dtype]) -> None:
    layer.forward = lambda states: (seen.append(states.dtype), nn.Linear.forward(layer, states))[1]  # type: ignore


def observed_by_subclass(layer: nn.Linear, seen: list[torch.dtype]) -> None:
    class Other(nn.Linear):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            seen.append(states.dtype)
            return super().forward(states)

    layer.__class__ = Other


@pytest.mark.parametrize(
    "observe",
    [observed_by_hook, observed_by_pre_hook, observed_by_backward_hook, observed_by_own_forward, observed_by_subclass],
)
def test_layer_with_a_hook_gets_its_float32_input(
    observe: Callable[[nn.Linear, list[torch.dtype]], None],
) -> None:
    layers, states = heads_and_states()
    seen: list[torch.dtype] = []
    observe(layers[1], seen)
    with shared_casts():
        gradient_of_states(layers, states)
    assert seen == [torch.float32]


def test_input_changed_in_place_is_cast_anew() -> None:
    layers, states = heads_and_states()
    with shared_casts(), torch.autocast("cpu", torch.bfloat16):
        before = layers[0](states)
        states.add_(1)
        after = layers[0](states)
        assert torch.equal(after, layers[0](states + 0))
    assert not torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_autocast_nothing_is_cast(dtype: torch.dtype) -> None:
    layer = nn.Linear(3, 3, dtype=dtype)
    with shared_casts():
        assert layer(torch.ones(2, 3, dtype=dtype, requires_grad=True) * 2).dtype == dtype


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_result_is_that_of_autocast(context: Callable) -> None:
    classifier = model("bert")
    with context(), torch.autocast("cpu", torch.bfloat16):
        wanted = classifier(**BATCH).logits
        with shared_casts():
            assert torch.equal(classifier(**BATCH).logits, wanted)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    layers, states = heads_and_states()

    def run(states: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.stack([layer(states) for layer in layers]).sum(0)

    with shared_casts():
        wanted = torch.autograd.grad(run(states).float().square().sum(), [states, *layers.parameters()])
        recomputed = checkpoint(run, states * 1, use_reentrant=False)
        found = torch.autograd.grad(recomputed.float().square().sum(), [states, *layers.parameters()])
    assert all(map(torch.equal, found, wanted))


def test_torch_func_sees_what_it_sees_without() -> None:
    layers, states = heads_and_states()
    states = states.detach()

    def loss(states: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.stack([layer(states * 2) for layer in layers]).sum(0).float().square().sum()

    for transform in (torch.func.grad(loss), torch.func.vmap(torch.func.grad(loss))):
        wanted = transform(states)
        with shared_casts():
            assert torch.equal(transform(states), wanted)


def test_activations_can_be_saved_and_loaded() -> None:
    layers, states = heads_and_states()
    file = io.BytesIO()
    with shared_casts():
        gradient_of_states(layers, states)
    torch.save(states, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), states)
