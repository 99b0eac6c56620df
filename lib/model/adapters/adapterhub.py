"""Bottleneck adapters and their heads in the files of AdapterHub, which the `adapters` library writes and reads.

adapter_config.json + adapter.safetensors or pytorch_adapter.bin          the adapters
head_config.json + model_head.safetensors or pytorch_model_head.bin       the head
"""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import load_state_dict_from_file
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from lib.config.sections import ModelSource
from lib.errors import UserError, first_line, require
from lib.model.adapters.bottleneck import BottleneckConfig, adapter_places

ADAPTER_FILES = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_FILES = ("model_head.safetensors", "pytorch_model_head.bin")

NAME = "classifier"
"""The name of this project's adapters in their files."""

VERSION = "adapters.1.3.0"
"""The version of the `adapters` library whose layout is written."""

FIXED: dict[str, Any] = {
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "ln_before": False,
    "ln_after": False,
    "is_parallel": False,
    "use_gating": False,
    "inv_adapter": None,
    "cross_adapter": False,
    "phm_layer": False,
    "stochastic_depth": 0.0,
}
"""Settings and the only value of each that is supported; it is also the library's default for a missing setting."""

REQUIRED = {"mh_adapter", "output_adapter", "reduction_factor", "non_linearity"}
"""Settings that every bottleneck adapter has."""

OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""Names of activations in files without a version, and today's names."""

OLD_NAMES = ("attention_text_task_adapters", "attention_text_lang_adapters", "layer_text_task_adapters")
"""What older files have for `adapters` in the names of tensors."""

PARTS = {"down": "adapter_down.0", "up": "adapter_up"}
"""The layers of a `Bottleneck`, and their names in the files."""

HEADS: dict[str, tuple[str, str, str]] = {
    "bert": ("bert.pooler.dense", "classifier", "tanh"),
    "roberta": ("classifier.dense", "classifier.out_proj", "tanh"),
    "xlm-roberta": ("classifier.dense", "classifier.out_proj", "tanh"),
    "electra": ("classifier.dense", "classifier.out_proj", "gelu"),
    "deberta-v2": ("pooler.dense", "classifier", "gelu"),
    "distilbert": ("pre_classifier", "classifier", "relu"),
}
"""By model type: the layers of the model that match heads.NAME.1 and heads.NAME.4, the two layers of the library's
classification head, and the activation between them."""


def save_bottlenecks(model: PreTrainedModel, config: BottleneckConfig, base: ModelSource, folder: Path) -> None:
    """Write adapters and head (all trainable weights) and their settings."""
    about = {
        "hidden_size": model.config.hidden_size,
        "model_class": type(model).__name__,
        "model_name": base.model,
        "model_revision": base.model_revision,
        "model_type": model.config.model_type,
        "version": VERSION,
    }
    settings = FIXED | {
        "mh_adapter": config.attention,
        "output_adapter": config.output,
        "original_ln_before": config.after_norm,
        "reduction_factor": config.reduction_factor,
        "non_linearity": config.non_linearity,
        "scaling": config.scaling,
        "leave_out": list(config.leave_out),
        "init_weights": "mam_adapter",
        "dropout": 0.0,
    }
    labels = {"label2id": model.config.label2id, "num_labels": model.config.num_labels}
    for file, content in (
        ("adapter_config.json", about | {"name": NAME, "config": settings}),
        ("head_config.json", about | {"name": None, "config": None} | labels),
    ):
        (folder / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    stored = {name: key for key, name in stored_adapter_names(model, config, NAME).items()}
    trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file({stored[name]: p for name, p in trained.items() if name in stored}, folder / "adapter.safetensors")
    save_file({name: p for name, p in trained.items() if name not in stored}, folder / "model_head.safetensors")


def load_bottlenecks(model: PreTrainedModel, config: BottleneckConfig, folder: Path) -> set[str]:
    """Load the weights of adapters and head into a model that has the adapters; returns the names of what was loaded.

    Raises UserError if a file is missing or damaged, or its tensors do not fit the model.
    """
    names = stored_adapter_names(model, config, str(read_json(folder / "adapter_config.json").get("name")))
    adapters = {}
    for key, tensor in read_tensors(folder, ADAPTER_FILES).items():
        for old in OLD_NAMES:
            key = key.replace(f"{old}.", "adapters.")
        adapters[key] = tensor
    missing, unknown = sorted(names.keys() - adapters.keys()), sorted(adapters.keys() - names.keys())
    if missing or unknown:
        problems = [f"lacks {', '.join(missing[:2])}"] if missing else []
        problems += [f"has {', '.join(unknown[:2])}, which the model does not have"] if unknown else []
        raise UserError(f"{folder}: the adapter {' and '.join(problems)}; was it trained on another base model?")
    tensors = {names[key]: tensor for key, tensor in adapters.items()}
    names = stored_head_names(model, read_head(folder))
    tensors |= {names.get(key, key): tensor for key, tensor in read_tensors(folder, HEAD_FILES).items()}
    try:
        unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
    except RuntimeError as error:
        raise UserError(f"{folder} does not fit the model: {str(error).splitlines()[-1].strip()}") from error
    require(not unexpected, f"{folder} has {', '.join(unexpected[:2])}, which the model does not have")
    return set(tensors)


def read_bottleneck_config(folder: Path) -> BottleneckConfig:
    """The settings of stored adapters.

    Raises UserError if they are not bottleneck adapters, or a setting, which it names, is not supported.
    """
    stored = read_json(folder / "adapter_config.json")
    config = stored.get("config")
    if not isinstance(config, dict) or not set(config) >= REQUIRED:
        kind = config.get("architecture") if isinstance(config, dict) else config
        raise UserError(f"{folder} holds no bottleneck adapter with its settings written out, but {kind or 'none'}")
    unsupported = {key: config[key] for key, value in FIXED.items() if config.get(key, value) != value}
    scaling, factor = config.get("scaling", 1.0), config["reduction_factor"]
    unsupported |= {} if isinstance(scaling, (int, float)) else {"scaling": scaling}
    unsupported |= {} if isinstance(factor, (int, float)) else {"reduction_factor": factor}
    activation = str(config["non_linearity"]).lower().replace("leakyrelu", "leaky_relu")
    activation = activation if "version" in stored else OLD_ACTIVATIONS.get(activation, activation)
    unsupported |= {} if activation in ACT2FN else {"non_linearity": activation}
    if unsupported:
        found = ", ".join(f"{key} {value!r}" for key, value in unsupported.items())
        raise UserError(f"{folder}: adapters with {found} are not supported")
    return BottleneckConfig(
        attention=config["mh_adapter"],
        output=config["output_adapter"],
        after_norm=config.get("original_ln_before", False),
        reduction_factor=factor,
        non_linearity=activation,
        scaling=float(scaling),
        leave_out=tuple(config.get("leave_out") or ()),
    )


def read_head(folder: Path) -> dict[str, Any]:
    """Settings of the head, with `label2id` and `num_labels` at the top level, where older files do not have them.

    Raises UserError if there is no head: adapters of a language, for example, cannot classify.
    """
    if not (folder / "head_config.json").is_file():
        raise UserError(f"{folder} is an adapter without a head (head_config.json): it cannot classify")
    head = read_json(folder / "head_config.json")
    inside = head.get("config") or {}
    label2id = head.get("label2id") or inside.get("label2id")
    number = head.get("num_labels") or inside.get("num_labels") or len(label2id or ())
    label2id = label2id or {f"LABEL_{index}": index for index in range(number)}
    return head | {"label2id": {name: int(index) for name, index in label2id.items()}, "num_labels": number}


def stored_adapter_names(model: PreTrainedModel, config: BottleneckConfig, title: str) -> dict[str, str]:
    """Names of all adapter tensors, in the files to in the model; `title` is the name of the adapter in its files."""
    return {
        f"{stored}.{title}.{theirs}.{tensor}": f"{path}.adapter.{ours}.{tensor}"
        for path, _, stored in adapter_places(model, config)
        for ours, theirs in PARTS.items()
        for tensor in ("weight", "bias")
    }


def stored_head_names(model: PreTrainedModel, head: dict[str, Any]) -> dict[str, str]:
    """Names of the tensors of a head, in its file to in the model; empty when they are the same.

    Raises UserError if the head has other layers than the model's.
    """
    config = head.get("config")
    if config is None:
        return {}
    kind, title = model.config.model_type, head.get("name")
    first, second, activation = HEADS.get(kind, ("", "", ""))
    same = (
        config.get("layers") == 2 and not config.get("use_pooler") and config.get("activation_function") == activation
    )
    pooled = kind == "bert" and config.get("layers") == 1 and bool(config.get("use_pooler"))
    if config.get("head_type") != "classification" or not config.get("bias", True) or not (same or pooled):
        raise UserError(
            f"the head {title!r} ({config.get('head_type')}, {config.get('layers')} layers, "
            f"{config.get('activation_function')}) does not fit {type(model).__name__}"
        )
    layers = {1: second} if pooled else {1: first, 4: second}
    return {f"heads.{title}.{n}.{t}": f"{path}.{t}" for n, path in layers.items() for t in ("weight", "bias")}


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError if the file is missing or holds no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    require(isinstance(found, dict), f"{path} holds no settings")
    return found


def read_tensors(folder: Path, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The tensors of the first of the files that exists; pickles are read with `weights_only`, so that they run no code.

    Raises UserError if none exists or it cannot be read.
    """
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} has no {' or '.join(names)}")
    try:
        return load_state_dict_from_file(path, map_location="cpu", safe=path.suffix == ".safetensors")
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
