"""Bottleneck adapters and their heads in the files of AdapterHub, which the `adapters` library writes and reads.

adapter_config.json + adapter.safetensors or pytorch_adapter.bin          the adapters
head_config.json + model_head.safetensors or pytorch_model_head.bin       the head
"""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from lib.errors import UserError, require
from lib.model.adapters.bottleneck import Bottlenecks, adapter_names

ADAPTER_FILES = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_FILES = ("model_head.safetensors", "pytorch_model_head.bin")
NAME = "classifier"
"""What our adapters are called in their files."""

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
"""Settings with the one value that is understood here; also the library's default where the file is silent."""

REQUIRED = {"mh_adapter", "output_adapter", "reduction_factor", "non_linearity"}
"""Settings that every bottleneck adapter has."""

OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""What names of activations meant in files without a version."""

OLD_NAMES = ("attention_text_task_adapters", "attention_text_lang_adapters", "layer_text_task_adapters")
PARTS = {"down.": "adapter_down.0.", "up.": "adapter_up."}

Head = tuple[str, str, str]
HEADS: dict[str, Head] = {
    "bert": ("bert.pooler.dense", "classifier", "tanh"),
    "roberta": ("classifier.dense", "classifier.out_proj", "tanh"),
    "xlm-roberta": ("classifier.dense", "classifier.out_proj", "tanh"),
    "electra": ("classifier.dense", "classifier.out_proj", "gelu"),
    "deberta-v2": ("pooler.dense", "classifier", "gelu"),
    "distilbert": ("pre_classifier", "classifier", "relu"),
}
"""The two layers of the library's own classification head, heads.NAME.1 and .4, in the model, and what lies between."""


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError when the file is missing or no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    require(isinstance(found, dict), f"{path} holds no settings")
    return found


def read_tensors(folder: Path, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The tensors of the first of the files that is there; a pickle is opened for its tensors only, never run.

    Raises UserError when none is there or it cannot be read.
    """
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} has no {' or '.join(names)}")
    try:
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


# ---------------------------------------------------------------------------------------------------- settings


def read_settings(folder: Path) -> Bottlenecks:
    """The settings of an adapter on disk.

    Raises UserError when it is not a bottleneck adapter or of a kind that is not known here, and names the setting.
    """
    stored = read_json(folder / "adapter_config.json")
    config = stored.get("config")
    if not isinstance(config, dict) or not set(config) >= REQUIRED:
        kind = config.get("architecture") if isinstance(config, dict) else config
        raise UserError(f"{folder} holds no bottleneck adapter with its settings written out, but {kind or 'none'}")
    strange = {key: config[key] for key, value in FIXED.items() if config.get(key, value) != value}
    scaling, factor = config.get("scaling", 1.0), config["reduction_factor"]
    strange |= {} if isinstance(scaling, (int, float)) else {"scaling": scaling}
    strange |= {} if isinstance(factor, (int, float)) else {"reduction_factor": factor}
    activation = str(config["non_linearity"]).lower().replace("leakyrelu", "leaky_relu")
    activation = activation if "version" in stored else OLD_ACTIVATIONS.get(activation, activation)
    strange |= {} if activation in ACT2FN else {"non_linearity": activation}
    if strange:
        found = ", ".join(f"{key} {value!r}" for key, value in strange.items())
        raise UserError(f"{folder}: adapters with {found} are not supported")
    return Bottlenecks(
        attention=config["mh_adapter"],
        output=config["output_adapter"],
        after_norm=config.get("original_ln_before", False),
        reduction_factor=factor,
        non_linearity=activation,
        scaling=float(scaling),
        leave_out=tuple(config.get("leave_out") or ()),
    )


def written_settings(settings: Bottlenecks) -> dict[str, Any]:
    return FIXED | {
        "mh_adapter": settings.attention,
        "output_adapter": settings.output,
        "original_ln_before": settings.after_norm,
        "reduction_factor": settings.reduction_factor,
        "non_linearity": settings.non_linearity,
        "scaling": settings.scaling,
        "leave_out": list(settings.leave_out),
        "init_weights": "mam_adapter",
        "dropout": 0.0,
    }


# ---------------------------------------------------------------------------------------------------- names


def to_hub(name: str, adapters: dict[str, str], title: str) -> str:
    """The name of an adapter's tensor in the files: down and up, behind the name of the adapter."""
    path, _, part = name.partition(".adapter.")
    kind, _, tensor = part.partition(".")
    return f"{adapters[path + '.adapter']}.{title}.{PARTS[kind + '.']}{tensor}"


def from_hub(model: PreTrainedModel, settings: Bottlenecks, title: str) -> dict[str, str]:
    """The names of all adapter tensors in the files to their names in the model."""
    adapters = adapter_names(model, settings)
    names = [f"{path}.{part}{tensor}" for path in adapters for part in PARTS for tensor in ("weight", "bias")]
    return {to_hub(name, adapters, title): name for name in names}


def head_names(model: PreTrainedModel, head: dict[str, Any]) -> dict[str, str]:
    """The names of a stored head's tensors to those of the model; empty when they are the same.

    Raises UserError for a head that this model's class cannot stand for.
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
            f"{config.get('activation_function')}) is not one that {type(model).__name__} has"
        )
    layers = {1: second} if pooled else {1: first, 4: second}
    return {f"heads.{title}.{n}.{t}": f"{path}.{t}" for n, path in layers.items() for t in ("weight", "bias")}


# ---------------------------------------------------------------------------------------------------- files


def save_adapters(
    model: PreTrainedModel, settings: Bottlenecks, base: str, revision: str | None, trained: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """The files of a model's adapters and head: name to settings (.json) or tensors (.safetensors).

    `trained` are the tensors that differ from those of the base model.
    """
    names = {name: hub for hub, name in from_hub(model, settings, NAME).items()}
    about = {
        "hidden_size": model.config.hidden_size,
        "model_class": type(model).__name__,
        "model_name": base,
        "model_revision": revision,
        "model_type": model.config.model_type,
        "version": VERSION,
    }
    return {
        "adapter_config.json": about | {"name": NAME, "config": written_settings(settings)},
        "adapter.safetensors": {names[name]: tensor for name, tensor in trained.items() if name in names},
        "head_config.json": about
        | {"name": None, "config": None, "label2id": model.config.label2id, "num_labels": model.config.num_labels},
        "model_head.safetensors": {name: tensor for name, tensor in trained.items() if name not in names},
    }


def write_files(folder: Path, files: dict[str, Any]) -> None:
    """Write what `save_adapters` gave."""
    for name, content in files.items():
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        else:
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in content.items()}, folder / name)


def read_head(folder: Path) -> dict[str, Any]:
    """Settings of the head: `label2id` and `num_labels` at the top, whoever wrote it.

    Raises UserError when there is none: adapters of a language or of pretraining alone cannot classify.
    """
    if not (folder / "head_config.json").is_file():
        raise UserError(f"{folder} is an adapter without a head (head_config.json), so that it cannot classify")
    head = read_json(folder / "head_config.json")
    inside = head.get("config") or {}
    label2id = head.get("label2id") or inside.get("label2id")
    number = head.get("num_labels") or inside.get("num_labels") or len(label2id or ())
    label2id = label2id or {f"LABEL_{index}": index for index in range(number)}
    return head | {"label2id": {name: int(index) for name, index in label2id.items()}, "num_labels": number}


def load_tensors(model: PreTrainedModel, settings: Bottlenecks, folder: Path) -> set[str]:
    """Load adapters and head into a model that has the adapters, in place; gives back the names of what was loaded.

    Raises UserError when a file is missing, damaged, or holds other tensors than the model wants.
    """
    title, head = str(read_json(folder / "adapter_config.json").get("name")), read_head(folder)
    wanted, stored = from_hub(model, settings, title), {}
    for key, tensor in read_tensors(folder, ADAPTER_FILES).items():
        for old in OLD_NAMES:
            key = key.replace(f"{old}.", "adapters.")
        stored[key] = tensor
    check_tensors(folder, set(wanted), set(stored))
    renamed = head_names(model, head)
    tensors = {wanted[key]: tensor for key, tensor in stored.items()}
    tensors |= {renamed.get(key, key): tensor for key, tensor in read_tensors(folder, HEAD_FILES).items()}
    put_tensors(model, tensors, folder)
    return set(tensors)


def check_tensors(folder: Path, wanted: set[str], found: set[str]) -> None:
    lacking, extra = sorted(wanted - found), sorted(found - wanted)
    if lacking or extra:
        said = [f"lacks {', '.join(lacking[:2])}"] if lacking else []
        said += [f"has {', '.join(extra[:2])}, which the model has not"] if extra else []
        raise UserError(f"{folder}: the adapter {' and '.join(said)}; was it trained on another base model?")


def put_tensors(model: nn.Module, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Load some tensors of a model. Raises UserError for one that it has not, or has in another shape."""
    try:
        unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
    except RuntimeError as error:
        raise UserError(f"{folder} does not fit the model: {str(error).splitlines()[-1].strip()}") from error
    require(not unexpected, f"{folder} has {', '.join(unexpected[:2])}, which the model has not")
