"""Frozen linear layers below an adapter: held in half precision or quantized from the moment they are read."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from lib.config.sections import AdapterConfig, ModelConfig
from lib.config.train import TrainConfig
from lib.errors import UserError
from lib.inference.merged_export import export_merged
from lib.model import frozen_weights as room
from lib.model.adapters.adapt import adapt, frozen_layers
from lib.model.build import check_trainable
from lib.model.frozen_weights import FLOAT32, FrozenWeights, import_bitsandbytes, is_half, is_quantized, restore
from lib.model.layers import count_parameters
from lib.model.load import build_model, load_classifier, load_tokenizer
from lib.model.padding import find_leak
from lib.model.weights import save_model, saved_tensors
from lib.runtime.precision import keep_in_dtype
from lib.runtime.signals import Stopped
from tests.conftest import results_of, sentences, write_csv
from tests.resuming import same_tensors
from tests.tiny_models import NAMES, any_classifier

BF16 = FrozenWeights(dtype=torch.bfloat16)
TEXTS = ["a good film", "the plot was very dull and not fine", "great"]


def build(folder: Path, frozen: FrozenWeights = FLOAT32, method: str = "lora", **options):
    """(model with a new adapter, tokenizer), after the seed of a run."""
    source = ModelConfig(model=str(folder))
    tokenizer = load_tokenizer(source)
    torch.manual_seed(0)
    model, weights = build_model(source, NAMES, tokenizer, frozen=frozen)
    return adapt(model, AdapterConfig(adapter=method, **options), source, weights.new), tokenizer


def randomize(model) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in saved_tensors(model).values():
            parameter.normal_(0, 0.3)


def logits(model, tokenizer, texts=TEXTS, precision: str = "no") -> torch.Tensor:
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return model(**tokenizer(list(texts), padding=True, return_tensors="pt")).logits.float()


class SeenDtypes(TorchDispatchMode):
    """Notes the tensors that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.made += [made] if isinstance(made, torch.Tensor) else []
        return made

    def of_size(self, count: int) -> set[torch.dtype]:
        return {tensor.dtype for tensor in self.made if tensor.numel() == count}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "method"), [("bert", "lora"), ("gpt2", "lora"), ("llama", "ia3"), ("bert", "bottleneck")]
)
def test_weights_read_in_half_precision_are_those_rounded_later(tmp_path, kind, method, stored):
    """Also the random numbers of head, adapter, and a pooler that the checkpoint lacks: it is trained in float32."""
    folder = any_classifier(kind, tmp_path / kind)
    more = {"add_pooling_layer": False} if kind == "bert" else {}
    AutoModel.from_pretrained(folder, **more).to(stored).save_pretrained(folder)
    found = []
    for frozen in (FLOAT32, BF16):
        model, _ = build(folder, frozen, method)
        assert any(map(is_half, model.modules())) == (frozen is BF16)
        keep_in_dtype(frozen_layers(model), "bf16")
        found.append(dict(model.state_dict()) | {"random": torch.get_rng_state()})
    assert same_tensors(*found)
    assert all(tensor.dtype == torch.float32 for tensor in saved_tensors(model).values())


def test_adapter_loaded_over_a_base_in_half_precision_has_the_same_scores(tmp_path):
    model, tokenizer = build(any_classifier("llama", tmp_path / "base"), BF16)
    randomize(model)
    wanted = logits(model, tokenizer, precision="bf16")
    save_model(model, tmp_path / "model")
    loaded = load_classifier(ModelConfig(str(tmp_path / "model")), tokenizer, "bf16")
    assert any(map(is_half, loaded.modules()))
    assert torch.equal(logits(loaded, tokenizer, precision="bf16"), wanted)


def test_padding_is_tried_in_float32_below_half_precision(tmp_path):
    model, tokenizer = build(any_classifier("bert", tmp_path / "bert"), BF16)
    batches = [
        tokenizer(texts, padding=True, return_tensors="pt") for texts in (["a"], ["a", "is"], ["a", "the film " * 9])
    ]
    assert find_leak(model, *map(dict, batches)) is None
    before = copy.deepcopy(model.state_dict())

    def see_padding(_, __, output):
        output.pooler_output = output.pooler_output + output.last_hidden_state.shape[1]

    model.get_base_model().bert.register_forward_hook(see_padding)
    assert find_leak(model, *map(dict, batches)) == "padding"
    assert same_tensors(before, dict(model.state_dict()))
    assert any(map(is_half, model.modules()))


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
@pytest.mark.parametrize("kind", ["roberta", "gpt2", "llama"])
def test_backbone_is_quantized_and_head_and_adapter_are_not(tmp_path, kind, load_in):
    folder = any_classifier(kind, tmp_path / kind)
    plain, tokenizer = build(folder)
    model, _ = build(folder, FrozenWeights(load_in))
    quantized = [name for name, layer in model.named_modules() if is_quantized(layer)]
    linear = [name for name, layer in plain.named_modules() if type(layer) in room.LINEAR and "lora_" not in name]
    prefix = f"base_model.model.{plain.get_base_model().base_model_prefix}."
    assert sorted(quantized) == sorted(name for name in linear if name.startswith(prefix))
    assert same_tensors(saved_tensors(model), saved_tensors(plain))
    assert count_parameters(model) == count_parameters(plain)
    for name in quantized:
        weight = plain.get_submodule(name).weight.detach()
        weight = weight.T if type(plain.get_submodule(name)) is Conv1D else weight
        error = (restore(model.get_submodule(name), torch.float32) - weight).norm() / weight.norm()
        assert 0 < error < (0.15 if load_in == "4bit" else 0.01)
    assert not torch.equal(logits(model, tokenizer), logits(plain, tokenizer))


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_quantized_layer_is_the_linear_layer_of_its_restored_weights(tmp_path, load_in):
    """Forward and backward, alone and in a batch, in training and in evaluation, in float32 and in the dtype of autocast."""
    model, _ = build(any_classifier("llama", tmp_path / "llama"), FrozenWeights(load_in))
    layer = next(layer for layer in model.modules() if is_quantized(layer))
    weight, hidden = restore(layer, torch.float32), torch.randn(3, 5, 16)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            inputs = [hidden.clone().requires_grad_() for _ in range(2)]
            outputs = [layer(inputs[0]), nn.functional.linear(inputs[1], weight)]
            for output in outputs:
                output.float().square().sum().backward()
            assert outputs[0].dtype == outputs[1].dtype == dtype
            assert torch.equal(*outputs)
            torch.testing.assert_close(
                inputs[0].grad, inputs[1].grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
            )
            assert torch.equal(layer.eval()(hidden), outputs[0])
            torch.testing.assert_close(layer(hidden[1:2]), outputs[0][1:2])
            layer.train()


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "prefix", "prompt", "bottleneck"])
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_adapter_of_each_method_is_trained_and_loaded_over_its_quantized_base(tmp_path, method, load_in):
    kind = "roberta" if method in ("bottleneck", "prefix") else "llama"
    more = {"num_virtual_tokens": 3} if method in ("prefix", "prompt") else {}
    more |= {"adapter_non_linearity": "tanh"} if method == "bottleneck" else {}  # the only unit of a relu may be dead
    model, tokenizer = build(any_classifier(kind, tmp_path / "base"), FrozenWeights(load_in), method, **more)
    randomize(model)
    model.train()(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    wanted = logits(model, tokenizer)
    save_model(model, tmp_path / "model")
    settings = json.loads((tmp_path / "model/config.json").read_text())
    assert settings["load_in"] == load_in
    assert "quantization_config" not in settings
    source = ModelConfig(str(tmp_path / "model"))
    assert torch.equal(logits(load_classifier(source, tokenizer), tokenizer), wanted)
    plain = load_classifier(source, tokenizer, quantized=False)
    assert not any(map(is_quantized, plain.modules()))
    assert not torch.equal(logits(plain, tokenizer), wanted)


def test_pooler_that_the_checkpoint_lacks_is_not_quantized(tmp_path):
    folder = any_classifier("bert", tmp_path / "bert")
    AutoModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(folder)
    plain, _ = build(folder)
    model, _ = build(folder, FrozenWeights("4bit"))
    assert any("pooler" in name for name in saved_tensors(model))
    assert same_tensors(saved_tensors(model), saved_tensors(plain))


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_checkpoint_that_is_quantized_already_is_adapted_as_it_is(tmp_path, load_in):
    """A causal language model: its files name their own head as not quantized, and lack that of a classifier."""
    folder = any_classifier("llama", tmp_path / "llama")
    settings = BitsAndBytesConfig(**{f"load_in_{load_in}": True}, llm_int8_skip_modules=["lm_head"])
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings).save_pretrained(folder)
    model, tokenizer = build(folder)
    assert any(map(is_quantized, model.modules()))
    assert all(tensor.dtype == torch.float32 for tensor in saved_tensors(model).values())
    randomize(model)
    model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.square().sum().backward()
    wanted = logits(model, tokenizer)
    save_model(model, tmp_path / "model")
    loaded = load_classifier(ModelConfig(str(tmp_path / "model")), tokenizer)
    assert torch.equal(logits(loaded, tokenizer), wanted)
    save_model(loaded, tmp_path / "again")  # the settings of its config.json do not grow with each saving
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "model" / "config.json").read_text()
    with pytest.raises(UserError, match="quantized in its own files"):
        export_merged(loaded, tokenizer, tmp_path / "merged")
    config = TrainConfig(model=ModelConfig(str(folder), load_in="4bit"), adapter=AdapterConfig(adapter="lora"))
    with pytest.raises(UserError, match=r"quantized already.*leave --load_in out"):
        check_trainable(config)


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_head_that_is_quantized_in_the_files_is_trained_from_its_restored_weights(tmp_path, load_in):
    folder = any_classifier("llama", tmp_path / "llama")
    settings = BitsAndBytesConfig(**{f"load_in_{load_in}": True}, llm_int8_skip_modules=[])
    whole = AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=settings)
    whole.save_pretrained(folder)
    model, tokenizer = build(folder)
    head = model.get_base_model().score.modules_to_save["default"].weight
    assert torch.equal(head, restore(whole.score, torch.float32))
    model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.square().sum().backward()
    assert head.grad is not None
    save_model(model, tmp_path / "model")
    loaded = load_classifier(ModelConfig(str(tmp_path / "model")), tokenizer)
    assert torch.equal(logits(loaded, tokenizer), logits(model, tokenizer))


def test_architecture_without_layers_to_quantize_is_refused(tmp_path):
    """All linear layers of I-BERT are its own."""
    folder = any_classifier("ibert", tmp_path / "ibert")
    with pytest.raises(UserError, match="--load_in 4bit has no effect"):
        build(folder, FrozenWeights("4bit"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(48, 128), (6, 16), (7, 3)])
def test_4bit_weights_restored_in_half_precision_are_the_rounded_ones_without_a_float32_copy(dtype, shape):
    import_bitsandbytes()
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(shape[1], shape[0], quant_type="nf4").to("cpu")
    rounded = restore(layer, torch.float32).to(dtype)
    with SeenDtypes() as seen:
        assert torch.equal(restore(layer, dtype), rounded)
    assert seen.of_size(rounded.numel()) <= {dtype, torch.bool}


def test_quantized_run_is_resumed_scored_used_and_merged(call, tmp_path):
    """By the scripts: the scores of its training, and a whole model of the base as it is."""
    folder = any_classifier("llama", tmp_path / "base")
    data = [
        f"--{role}_file={write_csv(tmp_path / f'{role}.csv', sentences(n, n))}"
        for role, n in (("train", 40), ("test", 21))
    ]
    flags = [
        *data,
        "--model",
        folder,
        "--adapter",
        "lora",
        "--load_in",
        "4bit",
        "--gradient_checkpointing",
        "--lr",
        "1e-2",
    ]
    flags += ["--max_steps", 4, "--eval_steps", 2, "--bs", 8, "--report_to", "none", "--mixed_precision", "bf16"]
    results = results_of(done := call("train.py", *flags, "--run_name", "whole"))
    assert "on q_proj, v_proj; the frozen linear layers in 4bit" in done.stdout
    with pytest.raises(Stopped):
        call("train.py", *flags, "--run_name", "parts", "--pause_at_step", 3)
    call("train.py", *flags, "--run_name", "parts")
    whole, parts = (tmp_path / "outputs" / name for name in ("whole", "parts"))
    for name in ("model/adapter_model.safetensors", "checkpoints/step-4/model.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert (whole / "checkpoints/step-4/model.safetensors").stat().st_size < (
        folder / "model.safetensors"
    ).stat().st_size
    scored = results_of(call("eval.py", "--run", whole))
    assert {name: scored[name] for name in scored if name.startswith("test/")} == {
        name: results[name] for name in results if name.startswith("test/")
    }
    merged = call("predict.py", "--model", whole, "--merge_adapter", "merged").stdout
    assert "trained over its base in 4bit" in merged
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert not any(map(is_quantized, plain.modules()))
    assert not hasattr(plain.config, "load_in")
    adapted = load_classifier(ModelConfig(str(whole / "model")), quantized=False)
    tokenizer = load_tokenizer(ModelConfig(str(folder)))
    torch.testing.assert_close(logits(plain, tokenizer), logits(adapted, tokenizer))


def test_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--load_in 4bit needs the package bitsandbytes.*pip install 'bitsandbytes"):
        room.frozen_weights("4bit", "no", FLOAT32.device)


def test_missing_package_of_a_trained_adapter_is_explained_by_its_training(tmp_path, monkeypatch):
    """The flag was not typed where the adapter is used."""
    model, tokenizer = build(any_classifier("llama", tmp_path / "base"), FrozenWeights("8bit"))
    save_model(model, tmp_path / "model")
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"model, which was trained with --load_in 8bit, needs the package bitsandbytes"
    ):
        load_classifier(ModelConfig(str(tmp_path / "model")), tokenizer)
