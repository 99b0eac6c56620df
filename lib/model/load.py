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
from lib.model.adapters.adapt import adapter_folder, base_of, load_adapter, read_json
from lib.model.attention import set_attention
from lib.model.folder import check_settings, check_vocabulary, limited_memory
from lib.model.forward import attend_by_length, keep_no_cache
from lib.model.frozen_weights import FLOAT32, FrozenWeights
from lib.model.frozen_weights import KEY as LOAD_IN
from lib.model.layers import backbone_of, freeze
from lib.model.overrides import override
from lib.model.positions import FROM_PADDING, first_position
from lib.model.source import (
    ANSWER_SETTINGS,
    LoadingInfo,
    load_hf_config,
    load_pretrained,
    loading_errors,
    read_tokenizer,
    resolve_model,
)


def load_tokenizer(source: ModelSource, virtual_tokens: int = 0) -> Any:
    """The tokenizer of a model, or of an adapter's base model where the adapter has none of its own, ready for the model.

    `model_max_length` is at most the model's positions, of which --adapter prefix and prompt take `virtual_tokens`. Padding
    has a token, the end token where there is no other, and stands where it moves no text to other positions. Special
    tokens that a text spells out, such as [SEP], are text.

    Raises UserError if the tokenizer cannot be loaded or has no token to pad with, or if no position is left.
    """
    folder = adapter_folder(source)
    model_source = source if folder is None else base_of(folder)
    if folder is not None:
        virtual_tokens = read_json(folder / "adapter_config.json").get("num_virtual_tokens") or virtual_tokens
        source = ModelSource(str(folder)) if (folder / "tokenizer_config.json").is_file() else model_source
    tokenizer = read_tokenizer(source)
    if tokenizer.is_fast:  # slow ones would no longer know the words that users added either
        tokenizer.split_special_tokens = True
        tokenizer.init_kwargs["split_special_tokens"] = True  # saved with a trained model
    hf_config = None
    files = Path(resolve_model(model_source))
    if (files / "config.json").is_file() or not files.is_dir():
        hf_config = load_hf_config(model_source)
        if isinstance(model_source, ModelConfig):
            override(hf_config, model_source.config_overrides)
            check_settings(model_source, hf_config)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = padding_token(tokenizer, hf_config)
    if tokenizer.pad_token is None:
        raise UserError(
            f"--model {source.model}: its tokenizer has neither a padding token nor an end token; add a pad_token to it"
        )
    if hf_config is None:
        return tokenizer  # a folder of a tokenizer alone
    set_padding(hf_config, tokenizer)
    # XLNet reads the last position, which padding must not take; in other models padding on the left moves a text.
    tokenizer.padding_side = "left" if getattr(hf_config, "summary_type", None) == "last" else "right"
    positions = longest_input(hf_config)
    if positions is not None and positions <= virtual_tokens:
        if not virtual_tokens:
            raise UserError(
                f"config.json of --model {source.model}: pad_token_id {hf_config.pad_token_id} and max_position_embeddings "
                f"{hf_config.max_position_embeddings} leave no position for text, since positions are counted from padding"
            )
        raise UserError(
            f"{virtual_tokens} virtual tokens leave no room for text in the {positions} positions of the model"
        )
    if positions is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions - virtual_tokens)
    return tokenizer


def padding_token(tokenizer: Any, hf_config: Any) -> str | None:
    """What a tokenizer without a padding token pads with: the token that the model takes for padding, else the end token."""
    known = getattr(hf_config, "pad_token_id", None)
    if isinstance(known, int) and 0 <= known < len(tokenizer):
        return tokenizer.convert_ids_to_tokens(known)
    return tokenizer.eos_token


def build_model(
    config: ModelConfig,
    label_names: list[str],
    tokenizer: Any,
    problem_type: str = CLASSIFICATION,
    frozen: FrozenWeights = FLOAT32,
) -> tuple[PreTrainedModel, LoadingInfo]:
    """A classifier with one output for each of `label_names`, with --config_overrides, --from_scratch and --freeze applied.

    Weights are float32 whatever the checkpoint holds, since mixed precision needs a float32 master copy, except for what
    `frozen` says of the linear layers below an adapter; a head of another size is replaced. Raises UserError if the model
    cannot be loaded or its configuration cannot be changed so.
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
    for key in (*ANSWER_SETTINGS, KEY, LOAD_IN):  # of the labels and the data that a trained checkpoint had
        vars(hf_config).pop(key, None)
    if frozen.load_in:
        setattr(hf_config, LOAD_IN, frozen.load_in)
    set_padding(hf_config, tokenizer)
    override(hf_config, config.config_overrides)
    check_settings(config, hf_config)
    if config.from_scratch:
        model, info = build_from_scratch(config, hf_config)
    else:
        changed = bool(config.config_overrides)
        model, info = load_pretrained(config, AutoModelForSequenceClassification, hf_config, changed, frozen)
        if not changed:
            check_weights(config, model, info)
    check_vocabulary(config, model, tokenizer)
    freeze(model, config.freeze)
    return keep_no_cache(attend_by_length(model)), info


def build_from_scratch(config: ModelConfig, hf_config: Any) -> tuple[PreTrainedModel, LoadingInfo]:
    """A classifier with random weights. Raises UserError if memory does not suffice."""
    set_attention(config, AutoModelForSequenceClassification, hf_config)
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


def load_classifier(
    source: ModelSource,
    tokenizer: Any = None,
    mixed_precision: str = "no",
    device: torch.device = FLOAT32.device,
    quantized: bool = True,
) -> Any:
    """A trained classifier as it is: a whole model in float32, or an adapter with its head over its base model.

    Adapter and head are float32, too, and the linear layers of the base are held as in training, quantized on `device` or
    in the dtype of `mixed_precision`; without `quantized` they are not quantized. A model that does not know its padding
    token learns it from `tokenizer`. Raises UserError if it cannot be loaded, or its checkpoint has no trained head.
    """
    folder = adapter_folder(source)
    if folder is None:
        model: Any = load_trained(source, AutoModelForSequenceClassification, "classifier", tokenizer)
    else:
        adapter = load_adapter(folder, source.attn_implementation, mixed_precision, device, quantized)
        model = attend_by_length(adapter)
        if tokenizer is not None:
            set_padding(model.config, tokenizer)
    return keep_no_cache(model)


def load_trained(source: ModelSource, kind: Any, name: str, tokenizer: Any = None) -> PreTrainedModel:
    """A trained model of one of the Auto classes in float32 as it is; `name` is what messages call it.

    One that does not know its padding token learns it from `tokenizer`, before it is built: RoBERTa counts from there.
    Raises UserError if it cannot be loaded or its checkpoint lacks weights. A pooler may be missing from a model
    without a head, which does not use it.
    """
    labeled = kind in (AutoModelForSequenceClassification, AutoModelForTokenClassification)
    hf_config = load_hf_config(source, labels=labeled)
    if tokenizer is not None:
        set_padding(hf_config, tokenizer)
    model, info = load_pretrained(source, kind, hf_config)
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
    return attend_by_length(model)


def set_padding(hf_config: Any, tokenizer: Any) -> None:
    """Tell a model which token pads, as its tokenizer does: a decoder classifies by the last token that is not it.

    One that knows another token would classify by padding. Models that count positions from padding keep theirs.
    """
    for settings in (hf_config, hf_config.get_text_config()):
        known = getattr(settings, "pad_token_id", None)
        if known is None or (known != tokenizer.pad_token_id and settings.model_type not in FROM_PADDING):
            settings.pad_token_id = tokenizer.pad_token_id


def label_names(model: PreTrainedModel) -> list[str]:
    """The names of a classifier's labels, in the order of its outputs."""
    return [model.config.id2label[number] for number in range(model.config.num_labels)]


def longest_input(hf_config: Any) -> int | None:
    """The most tokens that a model has positions for; None where their number is not limited or not known."""
    settings = hf_config.get_text_config()
    if settings.model_type == "xlnet" or only_distances(settings):
        return None
    positions = getattr(settings, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    return positions - first_position(settings)


def only_distances(settings: Any) -> bool:
    """Whether the model reads the distances between tokens alone, as DeBERTa can."""
    relative, positions = (getattr(settings, name, None) for name in ("relative_attention", "position_biased_input"))
    return relative is True and positions is False


def summarize_weight_names(names: list[str]) -> str:
    """Names of weights in one line: those of one layer, or of a pretraining head, as one; at most six."""
    short = dict.fromkeys(re.sub(r"(\.\d+)\..*|^((?:cls|lm_head|qa_outputs))\..*", r"\1\2.*", name) for name in names)
    return ", ".join(list(short)[:6]) + (f", ... ({len(names)} tensors)" if len(short) > 6 else "")
