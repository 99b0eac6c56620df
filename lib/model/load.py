"""Loading tokenizers and classifiers: a pretrained model to train, or a trained one as it is."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from lib.config.sections import CLASSIFICATION, ModelConfig, ModelSource
from lib.data.trained_on import KEY
from lib.errors import UserError
from lib.model.adapters.adapt import adapter_folder, base_of, load_adapter
from lib.model.layers import freeze
from lib.model.overrides import override
from lib.model.source import (
    LoadingInfo,
    load_hf_config,
    load_pretrained,
    loader_arguments,
    loading_errors,
    resolve_model,
)


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer of a model, or of an adapter's base model where the adapter has none of its own.

    A tokenizer without a padding token (a decoder's) pads with its end token. Raises UserError if it has neither, or
    cannot be loaded.
    """
    positions = overridden_length(source) if isinstance(source, ModelConfig) and source.config_overrides else None
    folder = adapter_folder(source)
    if folder is not None:
        source = ModelSource(str(folder)) if (folder / "tokenizer_config.json").is_file() else base_of(folder)
    with loading_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(source), **loader_arguments(source))
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UserError(
            f"--model {source.model}: its tokenizer has neither a padding token nor an end token; add a pad_token to it"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    return tokenizer


def build_model(
    config: ModelConfig, label_names: list[str], tokenizer: Any, problem_type: str = CLASSIFICATION
) -> tuple[PreTrainedModel, LoadingInfo]:
    """A classifier with one output for each of `label_names`, with --config_overrides, --from_scratch and --freeze applied.

    Weights are float32 whatever the checkpoint holds, since mixed precision needs a float32 master copy; a head of
    another size is replaced. Raises UserError if the model cannot be loaded or its configuration cannot be changed so.
    """
    with loading_errors(config):
        hf_config = load_hf_config(config)
    hf_config.num_labels = len(label_names)
    hf_config.id2label = dict(enumerate(label_names))
    hf_config.label2id = {name: number for number, name in enumerate(label_names)}
    hf_config.problem_type = problem_type
    for key in ("thresholds", KEY):  # of the labels and the data that a trained checkpoint had
        vars(hf_config).pop(key, None)
    hf_config.pad_token_id = tokenizer.pad_token_id if hf_config.pad_token_id is None else hf_config.pad_token_id
    override(hf_config, config.config_overrides)
    with loading_errors(config), override_errors(config):
        if config.from_scratch:
            trust = config.trust_remote_code
            model = AutoModelForSequenceClassification.from_config(
                hf_config, dtype=torch.float32, trust_remote_code=trust
            )
            info = LoadingInfo(new=sorted(model.state_dict()), unused=[])
        else:
            model, info = load_pretrained(config, AutoModelForSequenceClassification, hf_config)
    freeze(model, config.freeze)
    return model, info


def load_classifier(source: ModelSource) -> Any:
    """A trained classifier in float32 as it is: a whole model, or an adapter with its head over its base model.

    Raises UserError if it cannot be loaded, or its checkpoint has no trained head.
    """
    folder = adapter_folder(source)
    if folder is not None:
        return load_adapter(folder)
    return load_trained(source, AutoModelForSequenceClassification, "classifier")


def load_trained(source: ModelSource, kind: Any, name: str) -> PreTrainedModel:
    """A trained model of one of the Auto classes in float32 as it is; `name` is what messages call it.

    Raises UserError if it cannot be loaded or its checkpoint lacks weights. A pooler may be missing from a model
    without a head, which does not use it.
    """
    with loading_errors(source):
        model, info = load_pretrained(source, kind)
    missing = [weight for weight in info.new if not (kind is AutoModel and "pooler" in weight)]
    if missing:
        names = ", ".join(missing[:4])
        raise UserError(f"--model {source.model} is not a trained {name}: its weights lack {names}; train it first")
    return model


def label_names(model: PreTrainedModel) -> list[str]:
    """The names of a classifier's labels, in the order of its outputs."""
    return [model.config.id2label[number] for number in range(model.config.num_labels)]


def longest_input(model: Any) -> int | None:
    """The most tokens that a model has positions for; None where its number of positions is not known.

    Models of the RoBERTa family count positions from the id of the padding token + 1. The virtual tokens of prefix and
    prompt tuning take positions too.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None), -1)
    padding += getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0)
    return positions - padding - 1 if isinstance(positions, int) and positions > 0 else None


def overridden_length(config: ModelConfig) -> int | None:
    """`longest_input` under --config_overrides that change the number of positions; None under others."""
    with loading_errors(config), override_errors(config):
        hf_config = load_hf_config(config)
        before = getattr(hf_config, "max_position_embeddings", None)
        override(hf_config, config.config_overrides)
        if getattr(hf_config, "max_position_embeddings", None) == before:
            return None
        with torch.device("meta"):
            return longest_input(AutoModel.from_config(hf_config, trust_remote_code=config.trust_remote_code))


@contextlib.contextmanager
def override_errors(config: ModelConfig) -> Iterator[None]:
    """Raise UserError if no model can be built with --config_overrides."""
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        if not config.config_overrides:
            raise
        raise UserError(
            f"--config_overrides {' '.join(config.config_overrides)}: no model can be built from that: {error}"
        ) from error


def summarize_weight_names(names: list[str]) -> str:
    """Names of weights in one line: those of one layer, or of a pretraining head, as one; at most six."""
    short = dict.fromkeys(re.sub(r"(\.\d+)\..*|^((?:cls|lm_head|qa_outputs))\..*", r"\1\2.*", name) for name in names)
    return ", ".join(list(short)[:6]) + (f", ... ({len(names)} tensors)" if len(short) > 6 else "")
