"""--gradient_checkpointing: the same gradients to the last bit, with less memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from lib.config.cli import parse
from lib.config.sections import AdapterConfig, ModelConfig
from lib.config.train import TrainConfig
from lib.errors import UserError
from lib.model.adapters.adapt import adapt
from lib.model.layers import find_layers, freeze, set_train_mode
from lib.model.recomputation import recompute_layers
from tests.conftest import Command, read_lines, results_of
from tests.resuming import run_flags, same_tensors
from tests.tiny_models import ENCODER, SETTINGS, build_from, save

DECODERS = {"llama": ENCODER, "qwen3": ENCODER | {"head_dim": 8, "num_key_value_heads": 2}}
KINDS = SETTINGS | DECODERS


def model_of(kind: str, folder: Path) -> Path:
    """A tiny model with dropout; a large vocabulary, since ModernBERT names tokens of its own beyond 128."""
    return save(AutoConfig.for_model(kind, **KINDS[kind]), AutoModelForSequenceClassification, folder)


def backward(folder: Path, wanted: bool, part: str | None = None, method: Any = None) -> tuple[dict[str, Any], int]:
    """Gradients of a batch with padding, dropout on, and the bytes that were kept for them."""
    torch.manual_seed(0)
    model, info = build_from(folder)
    freeze(model, part)
    config = AdapterConfig(adapter=method, num_virtual_tokens=3 if method == "prompt" else 20)
    model = recompute_layers(adapt(model, config, ModelConfig(str(folder)), info.new), wanted)
    set_train_mode(model)
    ids = torch.randint(5, 100, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, 8:], mask[0, 8:] = 1, 0
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(7)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, attention_mask=mask).logits.square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | gradients, sum(kept.values())


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_layers_have_equal_gradients_and_keep_less_than_half_of_the_memory(kind, tmp_path):
    folder = model_of(kind, tmp_path)
    plain, memory = backward(folder, False)
    recomputed, less = backward(folder, True)
    assert same_tensors(plain, recomputed)
    assert less < memory / 2


@pytest.mark.parametrize("method", ["bottleneck", "lora", "prompt"])
def test_adapters_have_equal_gradients_too(method, tmp_path):
    folder = model_of("roberta", tmp_path)
    plain, memory = backward(folder, False, method=method)
    recomputed, less = backward(folder, True, method=method)
    assert same_tensors(plain, recomputed)
    assert len(plain) > 3
    assert less < memory


def test_frozen_layers_are_not_recomputed_and_frozen_embeddings_keep_nothing(tmp_path):
    folder = model_of("roberta", tmp_path)
    plain, memory = backward(folder, False, "1")
    recomputed, less = backward(folder, True, "1")
    assert same_tensors(plain, recomputed)
    assert less < memory / 2
    model, _ = build_from(folder)
    freeze(model, "1")
    recompute_layers(model, True)
    assert [layer.gradient_checkpointing for layer in find_layers(model, "")] == [False, True]
    embeddings = model.roberta.embeddings
    assert not embeddings(input_ids=torch.ones(1, 3, dtype=torch.int64)).requires_grad


def test_what_cannot_be_recomputed_is_refused(tmp_path):
    folder = model_of("roberta", tmp_path)
    model, _ = build_from(folder)
    freeze(model, "backbone")
    with pytest.raises(UserError, match="--gradient_checkpointing"):
        recompute_layers(model, True)
    mpnet = save(AutoConfig.for_model("mpnet", **ENCODER), AutoModelForSequenceClassification, tmp_path / "mpnet")
    with pytest.raises(UserError, match=r"--gradient_checkpointing .*mpnet"):
        recompute_layers(build_from(mpnet)[0], True)
    with pytest.raises(UserError, match="prefix"):
        parse(TrainConfig, ["--gradient_checkpointing", "True", "--adapter", "prefix"])


@pytest.mark.parametrize("flags", [(), ("--freeze", "1"), ("--adapter", "lora")])
def test_a_run_with_recomputed_layers_has_the_same_losses_and_weights(flags, call: Command, roberta, tmp_path):
    outputs = []
    for wanted in ("False", "True"):
        name = ["--run_name", wanted, "--gradient_checkpointing", wanted]
        results = results_of(call("train.py", *run_flags(tmp_path, roberta), *flags, *name))
        lines = read_lines(tmp_path / "outputs" / wanted / "metrics.jsonl")
        (weights,) = (tmp_path / "outputs" / wanted / "model").glob("*model.safetensors")
        outputs.append((results["eval/loss"], [line.get("train/loss") for line in lines], weights.read_bytes()))
    assert outputs[0] == outputs[1]
    assert len(outputs[0][1]) > 3
