"""LoRA adapts the queries and values of every architecture, or all linear layers below the head."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from lib.config.sections import AdapterConfig, ModelSource
from lib.errors import UserError
from lib.model.adapters.adapt import adapt, describe_adapter
from tests.tiny_models import ENCODER, NAMES, labels

FAMILIES = {
    "bert roberta xlm-roberta electra albert camembert big_bird convbert longformer megatron-bert": "query value",
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text smollm3 olmo2 opt bart stablelm starcoder2": "q_proj v_proj",
    "mpnet t5 mt5 umt5": "q v",
    "gpt_neox bloom falcon": "query_key_value",
    "deberta-v2": "query_proj value_proj",
    "deberta": "in_proj",
    "distilbert": "q_lin v_lin",
    "modernbert": "Wqkv",
    "gpt2": "c_attn",
    "phi": "fc1 fc2 q_proj v_proj",
    "phi3": "qkv_proj",
}
TARGETS = {kind: names.split() for kinds, names in FAMILIES.items() for kind in kinds.split()}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
MORE = {
    "convbert": {"embedding_size": 16, "conv_kernel_size": 3, "head_ratio": 1},
    "big_bird": {"attention_type": "original_full"},
    "longformer": {"attention_window": 4},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 32},
    "bart": {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 1}
    | {"encoder_attention_heads": 2, "decoder_attention_heads": 2},
    **dict.fromkeys(("t5", "mt5", "umt5"), T5),
    **{kind: {"head_dim": 8, "num_key_value_heads": 1} for kind in ("gemma", "gemma2", "gemma3_text", "qwen3")},
    **{kind: {"num_key_value_heads": 1} for kind in ("llama", "mistral", "qwen2", "smollm3", "phi3", "starcoder2")},
}


def build(kind: str):
    settings = {
        name: value for name, value in ENCODER.items() if kind not in ("t5", "mt5", "umt5", "bart") or "h" not in name
    }
    config = AutoConfig.for_model(kind, **settings | MORE.get(kind, {}) | labels(NAMES))
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


def adapted_names(model) -> list[str]:
    """The paths of adapted layers in the model itself."""
    found = (name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A"))
    return sorted(found)


@pytest.mark.parametrize("kind", TARGETS)
def test_lora_adapts_queries_and_values_in_every_layer(kind):
    model = adapt(build(kind), AdapterConfig(adapter="lora"), ModelSource("x"), [])
    names = adapted_names(model)
    assert sorted({name.rpartition(".")[2] for name in names}) == TARGETS[kind]
    layers = 1 if kind in ("t5", "mt5", "umt5", "bart", "albert") else 2
    assert len(names) >= layers * len(TARGETS[kind])
    described = describe_adapter(model)
    assert described == f"lora of rank 8, alpha 16, on {', '.join(TARGETS[kind])}"


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "gpt2", "llama", "modernbert", "deberta-v2", "t5"])
def test_all_linear_adapts_every_linear_layer_below_the_head(kind):
    plain = build(kind)
    prefix = f"{plain.base_model_prefix}."
    linear = [n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"]
    config = AdapterConfig(adapter="lora", adapter_target_modules=("all-linear",))
    new = [f"{name}.weight" for name in linear if "pooler" in name]
    model = adapt(plain, config, ModelSource("x"), new)
    wanted = sorted(name for name in linear if name.startswith(prefix) and "pooler" not in name)
    assert adapted_names(model) == wanted
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained
    assert all("modules_to_save" in name for name in trained)


def test_projections_that_nobody_knows_are_asked_for():
    """XLNet's are no layers of their own."""
    config = AutoConfig.for_model("xlnet", d_model=16, n_head=2, n_layer=1, d_inner=32, vocab_size=64)
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(UserError, match="--adapter_target_modules NAME"):
        adapt(model, AdapterConfig(adapter="lora"), ModelSource("x"), [])


@pytest.mark.parametrize(
    "more", [{"adapter": "ia3"}, {"adapter": "lora", "adapter_target_modules": ("all-linear", "q")}]
)
def test_all_linear_stands_alone_and_is_for_lora(more):
    with pytest.raises(UserError, match="all-linear stands alone"):
        AdapterConfig(**{"adapter_target_modules": ("all-linear",)} | more)


def test_saved_targets_load_again(tmp_path: Path):
    from lib.config.sections import ModelConfig
    from lib.model.load import load_classifier
    from lib.model.weights import save_model

    plain = build("gpt2")
    plain.save_pretrained(tmp_path / "base")
    config = AdapterConfig(adapter="dora", adapter_target_modules=("all-linear",))
    model = adapt(plain, config, ModelSource(str(tmp_path / "base")), [])
    save_model(model, tmp_path / "model")
    assert adapted_names(load_classifier(ModelConfig(str(tmp_path / "model")))) == adapted_names(model)
