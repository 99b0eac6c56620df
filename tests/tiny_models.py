"""Tiny models with random weights, one for each task; the weights are large, so that outputs differ between texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    GPT2Config,
    PreTrainedConfig,
    RobertaConfig,
    T5Config,
)

from lib.config.sections import AdapterConfig, ModelConfig
from lib.model.adapters.adapt import adapt
from lib.model.load import build_model, load_tokenizer
from lib.model.source import LoadingInfo
from lib.model.weights import save_model, saved_tensors
from tests.conftest import WORDS, tiny_tokenizer

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
SETTINGS: dict[str, dict[str, Any]] = {
    "bert": ENCODER,
    "roberta": ENCODER,
    "distilbert": ENCODER | {"hidden_dim": 32},
    "electra": ENCODER | {"embedding_size": 8},
    "deberta-v2": ENCODER | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "modernbert": ENCODER,
    "gpt2": ENCODER | {"max_position_embeddings": 64},
}
"""By model type, the settings of a configuration with two layers."""


def labels(names: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


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


def adapter(folder: Path, method: str) -> tuple[Path, Any, Any]:
    """(its folder, model, tokenizer): an adapter with random weights over a classifier, saved with a model card."""
    base = ModelConfig(str(classifier(folder / "base")))
    tokenizer = load_tokenizer(base)
    model, weights = build_model(base, NAMES, tokenizer)
    config = AdapterConfig(adapter=method, num_virtual_tokens=3 if method == "prompt" else 20)  # type: ignore[arg-type]
    model = adapt(model, config, base, weights.new)
    with torch.no_grad():
        for parameter in saved_tensors(model).values():
            parameter.normal_(0, 0.5)
    save_model(model, folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "README.md").write_text("the card of the adapter")
    return folder / "model", model, tokenizer


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
    """A classifier on a decoder without a padding token, such as those of the GPT family."""
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
    """A T5 with a prefix for each task, like the published ones."""
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


def save_classifier(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A classifier of a model type with random weights, saved to `folder` with its tokenizer."""
    torch.manual_seed(0)
    names = {} if "num_labels" in changes else labels(NAMES)
    config = AutoConfig.for_model(kind, **SETTINGS.get(kind, ENCODER) | names | changes)
    AutoModelForSequenceClassification.from_config(config).to(dtype).save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def any_classifier(name: str, folder: Path, layers: int = 2) -> Path:
    """A classifier of an architecture or a variant of one, with dropout in its head and between its layers if it has any."""
    modern = {"global_attn_every_n_layers": 2, "local_attention": 4, "classifier_dropout": 0.1}
    modern |= {"cls_token_id": 0, "sep_token_id": 2}
    changes = {
        "albert": {"embedding_size": 8},
        "bart": {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_layers": 1, "decoder_attention_heads": 2},
        "deberta": {"position_buckets": 4, "conv_kernel_size": 3, "pooler_hidden_size": 16},
        "llama": {"num_key_value_heads": 1},
        "modernbert": modern,
        "modernbert-mean": modern | {"classifier_pooling": "mean"},
    }
    kind = {"deberta": "deberta-v2", "modernbert-mean": "modernbert"}.get(name, name)
    return save_classifier(kind, folder, num_hidden_layers=layers, **changes.get(name, {}))


def trainable(kind: str, folder: Path) -> Path:
    """A classifier of an architecture with the kind of tokenizer that such models have."""
    small = {"n_layer": 2, "n_head": 2}
    one = {"num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    changes: dict[str, dict[str, Any]] = {
        "big_bird": {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1},
        "convbert": {"embedding_size": 16, "conv_kernel_size": 3, "head_ratio": 1},
        "fnet": {"tpu_short_seq_length": 80},
        "funnel": {"block_sizes": [1, 1], "n_head": 2, "d_head": 8, "d_inner": 32, "initializer_std": 0.5} | one,
        "longformer": {"attention_window": 4},
        "openai-gpt": {"n_positions": 64, "n_embd": 16} | small,
        "qwen2": {"num_key_value_heads": 1},
        "t5": {"d_kv": 8, "d_ff": 32, "decoder_start_token_id": 1, "initializer_factor": 5.0} | one,
        "xlnet": {"d_model": 16, "d_inner": 32} | small,
    }
    if kind not in changes:
        any_classifier(kind, folder)
    else:
        settings = {name: value for name, value in ENCODER.items() if not refused(kind, name)}
        config = AutoConfig.for_model(kind, **settings | labels(NAMES) | changes[kind])
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        tiny_tokenizer(folder)
    if kind in ("gpt2", "llama", "openai-gpt", "qwen2"):
        plain_tokenizer(folder)
    if kind in ("t5", "xlnet"):
        piece_tokenizer(folder)
    return folder


def refused(kind: str, name: str) -> bool:
    """Whether a configuration has no such setting."""
    return (kind, name) in (
        ("funnel", "num_hidden_layers"),
        ("t5", "max_position_embeddings"),
        ("xlnet", "max_position_embeddings"),
    )


def plain_tokenizer(folder: Path) -> None:
    """`tiny_tokenizer` as decoders have it: nothing around a text, no token to pad with, no limit of its own."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = None
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def piece_tokenizer(folder: Path) -> None:
    """A tokenizer of pieces, as SentencePiece makes them, whose vocabulary holds the special tokens themselves."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = [(f"▁{word}", -2.0) for word in [*WORDS, *map(str, range(40))]]
    pieces = [*((token, 0.0) for token in special), *words, ("▁", -4.0), *((letter, -6.0) for letter in "<>/sapd[]")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
    )
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
