"""Tiny models with random weights, one for each task; every text differs to them, as their weights are large."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedConfig,
    RobertaConfig,
    T5Config,
)

from lib.config.sections import ModelConfig
from lib.model.load import build_model, load_tokenizer
from lib.model.source import LoadingInfo
from tests.conftest import tiny_tokenizer

SIZES = {"vocab_size": 128, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
ENCODER = SIZES | {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 80,
    "initializer_range": 0.5,
}
NAMES = ["bad", "good", "mixed"]
SMALL = {
    "vocab_size": 128,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "bert": SMALL,
    "roberta": SMALL | {"max_position_embeddings": 80},
    "distilbert": {"vocab_size": 128, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "electra": SMALL | {"embedding_size": 8},
    "deberta-v2": SMALL | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "modernbert": SMALL | {"pad_token_id": 1},
    "gpt2": {"vocab_size": 128, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "pad_token_id": 1},
}
"""By model type, the settings of a configuration with two layers."""


def labels(names: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def save_classifier(kind: str, folder: Path, num_labels: int = 3, dtype: torch.dtype = torch.float32) -> Path:
    """A classifier of one of the model types in `SETTINGS`, with random weights and a tokenizer, saved to `folder`."""
    torch.manual_seed(0)
    settings = SETTINGS["roberta" if kind == "xlm-roberta" else kind]
    config = AutoConfig.for_model(kind, num_labels=num_labels, **settings)
    AutoModelForSequenceClassification.from_config(config).to(dtype).save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def save(config: PreTrainedConfig, kind: type, folder: Path) -> Path:
    """A model with random weights, saved with its tokenizer as a pretrained one."""
    torch.manual_seed(0)
    kind.from_config(config).eval().save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def build_from(folder: Path, *overrides: str, **settings: Any) -> tuple[Any, LoadingInfo]:
    """The model in `folder` as a classifier of `NAMES`, built as train.py builds it."""
    config = ModelConfig(str(folder), config_overrides=overrides, **settings)
    return build_model(config, NAMES, load_tokenizer(config))


def classifier(folder: Path, **settings) -> Path:
    settings = labels(NAMES) | {"problem_type": "single_label_classification"} | settings
    return save(RobertaConfig(**ENCODER, **settings), AutoModelForSequenceClassification, folder)


def entailer(folder: Path) -> Path:
    names = ["contradiction", "neutral", "entailment"]
    return save(BertConfig(**ENCODER, **labels(names)), AutoModelForSequenceClassification, folder)


def masked(folder: Path) -> Path:
    return save(RobertaConfig(**ENCODER), AutoModelForMaskedLM, folder)


def tagger(folder: Path) -> Path:
    names = ["B-PER", "B-LOC", "I-PER", "O", "I-LOC"]
    return save(BertConfig(**ENCODER, **labels(names)), AutoModelForTokenClassification, folder)


def reader(folder: Path) -> Path:
    return save(RobertaConfig(**ENCODER), AutoModelForQuestionAnswering, folder)


def decoder(folder: Path) -> Path:
    config = GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5)
    return save(config, AutoModelForCausalLM, folder)


def deciding_decoder(folder: Path) -> Path:
    """A classifier on a decoder that was trained without padding, as those of the GPT family are."""
    sizes = SIZES | {"pad_token_id": None, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    config = GPT2Config(**sizes, initializer_range=0.5, **labels(NAMES))
    return save(config, AutoModelForSequenceClassification, folder)


def bart(folder: Path) -> Path:
    config = BartConfig(
        **SIZES,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=80,
        init_std=0.5,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    )
    return save(config, AutoModelForSeq2SeqLM, folder)


def t5(folder: Path) -> Path:
    """Told its task by words before the text, as the published T5 models are."""
    prefixes = {
        "summarization": {"prefix": "the plot was "},
        "translation_en_to_fr": {"prefix": "the actor felt "},
    }
    config = T5Config(
        **SIZES,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        decoder_start_token_id=1,
        initializer_factor=5.0,
        task_specific_params=prefixes,
    )
    return save(config, AutoModelForSeq2SeqLM, folder)


def any_classifier(name: str, folder: Path, layers: int = 2) -> Path:
    """A classifier of an architecture, with dropout in its head and between its layers where it has any."""
    wide = SIZES | {"initializer_range": 0.5}
    both = ENCODER | {"num_hidden_layers": layers}
    modern = {key: value for key, value in both.items() if key != "max_position_embeddings"} | {
        "max_position_embeddings": 80,
        "global_attn_every_n_layers": 2,
        "local_attention": 4,
        "classifier_dropout": 0.1,
        "cls_token_id": 0,
        "sep_token_id": 2,
    }
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
    llama = both | {"num_key_value_heads": 1}
    configs = {
        "albert": lambda: AlbertConfig(**both, embedding_size=8),
        "bart": lambda: BartConfig(**SIZES, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2),
        "bert": lambda: BertConfig(**both),
        "deberta": lambda: DebertaV2Config(**both, **relative, conv_kernel_size=3, pooler_hidden_size=16),
        "distilbert": lambda: DistilBertConfig(**wide, dim=16, n_layers=layers, n_heads=2, hidden_dim=32),
        "electra": lambda: ElectraConfig(**both, embedding_size=8),
        "gpt2": lambda: GPT2Config(**wide, n_embd=16, n_layer=layers, n_head=2, n_positions=64),
        "llama": lambda: LlamaConfig(**llama),
        "modernbert": lambda: ModernBertConfig(**modern),
        "modernbert-mean": lambda: ModernBertConfig(**modern, classifier_pooling="mean"),
        "roberta": lambda: RobertaConfig(**both),
    }
    config = configs[name]()
    for number, label in enumerate(NAMES):
        config.id2label[number], config.label2id[label] = label, number
    return save(config, AutoModelForSequenceClassification, folder)
