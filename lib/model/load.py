"""Loading tokenizers and classifiers: a pretrained model to train, or a trained one as it is."""

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from lib.config.sections import CLASSIFICATION, ModelConfig, ModelSource
from lib.data.trained_on import KEY
from lib.errors import UserError
from lib.model.adapters.adapt import adapter_folder, base_of, load_adapter
from lib.model.folder import check_settings, check_vocabulary, limited_memory
from lib.model.layers import backbone_of, freeze
from lib.model.overrides import override
from lib.model.source import (
    LoadingInfo,
    load_hf_config,
    load_pretrained,
    loading_errors,
    read_tokenizer,
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
    tokenizer = read_tokenizer(source)
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
    if (folder := adapter_folder(config)) is not None:
        raise UserError(
            f"--model {config.model} is an adapter (adapter_config.json), and training starts from a whole model: give its "
            f"base, --model {base_of(folder).model}, and --adapter for a new adapter"
        )
    hf_config = load_hf_config(config)
    hf_config.num_labels = len(label_names)
    hf_config.id2label = dict(enumerate(label_names))
    hf_config.label2id = {name: number for number, name in enumerate(label_names)}
    hf_config.problem_type = problem_type
    for key in ("thresholds", KEY):  # of the labels and the data that a trained checkpoint had
        vars(hf_config).pop(key, None)
    hf_config.pad_token_id = tokenizer.pad_token_id if hf_config.pad_token_id is None else hf_config.pad_token_id
    override(hf_config, config.config_overrides)
    check_settings(config, hf_config)
    if config.from_scratch:
        model, info = build_from_scratch(config, hf_config)
    else:
        changed = bool(config.config_overrides)
        model, info = load_pretrained(config, AutoModelForSequenceClassification, hf_config, changed)
        if not changed:
            check_weights(config, model, info)
    check_vocabulary(config, model, tokenizer)
    freeze(model, config.freeze)
    return model, info


def build_from_scratch(config: ModelConfig, hf_config: Any) -> tuple[PreTrainedModel, LoadingInfo]:
    """A classifier with random weights. Raises UserError if memory does not suffice."""
    settings = {"config": hf_config, "dtype": torch.float32, "trust_remote_code": config.trust_remote_code}
    with loading_errors(config):
        with limited_memory(config, Path(resolve_model(config)), changed=True), torch.device("meta"):
            AutoModelForSequenceClassification.from_config(**copy.deepcopy(settings))
        model = AutoModelForSequenceClassification.from_config(**settings)
    return model, LoadingInfo(new=sorted(model.state_dict()), unused=[])


def check_weights(source: ModelSource, model: Any, info: LoadingInfo) -> None:
    """Raise UserError if the weights are not those of the architecture in config.json.

    The head may be new, and so may single weights of the backbone, such as a pooler; not its embeddings, a whole layer,
    or most of it. None of its weights may have another shape.
    """
    prefix = f"{model.base_model_prefix}."
    sizes = {name: weight.numel() for name, weight in model.state_dict().items() if name.startswith(prefix)}
    new = [name for name in info.new if name in sizes]
    file = f"config.json of --model {source.model}"
    for name in new:
        if name in info.shapes:
            stored, wanted = info.shapes[name]
            raise UserError(
                f"{file} does not fit its weights: {name} has the shape {stored} there, and {wanted} by config.json; one "
                "of the files is another model's (to change the architecture use --config_overrides)"
            )
    layers = [{name for name in sizes if name.startswith(layer)} for layer in layer_prefixes(sizes)]
    embeddings = {f"{prefix}{name}" for name, _ in backbone_of(model).named_parameters() if "word_embeddings" in name}
    lost = any(layer <= set(new) for layer in layers) or (embeddings and embeddings <= set(new))
    if lost or sum(sizes[name] for name in new) > sum(sizes.values()) / 2:
        unused = f", and have {summarize_weight_names(info.unused)} instead" if info.unused else ""
        raise UserError(
            f"{file} does not fit its weights: they lack {summarize_weight_names(new)}{unused}; one of the files is "
            "another model's or damaged (to start from random weights use --from_scratch)"
        )


def layer_prefixes(names: Iterable[str]) -> set[str]:
    """The layers that weights belong to: the names up to the first number."""
    found = (re.match(r"\D*?\.\d+\.", name) for name in names)
    return {match[0] for match in found if match}


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
    labeled = kind in (AutoModelForSequenceClassification, AutoModelForTokenClassification)
    model, info = load_pretrained(source, kind, load_hf_config(source, labels=labeled))
    missing = [weight for weight in info.new if not (kind is AutoModel and "pooler" in weight)]
    if missing:
        names = ", ".join(missing[:4])
        if len(info.shapes) == len(missing):
            stored, wanted = info.shapes[missing[0]]
            raise UserError(
                f"config.json of --model {source.model} does not fit its weights: {missing[0]} has the shape {stored} there, "
                f"and {wanted} by config.json (num_labels, id2label, sizes of layers); correct it"
            )
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
    hf_config = load_hf_config(config)
    before = getattr(hf_config, "max_position_embeddings", None)
    override(hf_config, config.config_overrides)
    check_settings(config, hf_config)
    with loading_errors(config):
        if getattr(hf_config, "max_position_embeddings", None) == before:
            return None
        with torch.device("meta"):
            return longest_input(AutoModel.from_config(hf_config, trust_remote_code=config.trust_remote_code))


def summarize_weight_names(names: list[str]) -> str:
    """Names of weights in one line: those of one layer, or of a pretraining head, as one; at most six."""
    short = dict.fromkeys(re.sub(r"(\.\d+)\..*|^((?:cls|lm_head|qa_outputs))\..*", r"\1\2.*", name) for name in names)
    return ", ".join(list(short)[:6]) + (f", ... ({len(names)} tensors)" if len(short) > 6 else "")
