"""Adapters: a small set of weights trained in a frozen base model, saved without it, and loaded over it again.

Only the adapter, the head, and weights that the base model's checkpoint lacks are trained and saved. The base model and
its revision are named in adapter_config.json.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lib.config.sections import AdapterConfig, Attention, ModelSource
from lib.data.trained_on import KEY
from lib.errors import UserError
from lib.hub.needs import named_base
from lib.model.adapters.adapterhub import (
    load_bottlenecks,
    read_bottleneck_config,
    read_head,
    read_json,
    save_bottlenecks,
)
from lib.model.adapters.bottleneck import BottleneckConfig, add_bottlenecks, bottleneck_config
from lib.model.adapters.peft_methods import add_peft, load_peft, reload_peft
from lib.model.frozen_weights import FLOAT32, frozen_weights
from lib.model.frozen_weights import KEY as LOAD_IN
from lib.model.source import ANSWER_SETTINGS, load_hf_config, load_pretrained, resolve_model


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
    """What a model with an adapter keeps as its attribute `adapter_info`."""

    base: ModelSource
    bottleneck: BottleneckConfig | None
    """None: the adapter is one of peft."""


def adapter_info(model: nn.Module) -> AdapterInfo | None:
    return getattr(model, "adapter_info", None)


def adapt(model: Any, config: AdapterConfig, base: ModelSource, new_weights: list[str]) -> Any:
    """The model with a new adapter, where only adapter, head and `new_weights` are trainable; without --adapter as it is.

    Raises UserError if the method does not fit the model.
    """
    if config.adapter is None:
        return model
    if adapter_folder(base) is not None:
        raise UserError(f"--model {base.model} is itself an adapter; give its base model and train a new adapter")
    # The full path of a folder, so that it is found from another working directory.
    path = str(Path(base.model).resolve()) if Path(base.model).is_dir() else base.model
    base = ModelSource(model=path, model_revision=base.model_revision)
    head = head_modules(model, new_weights)
    if config.adapter != "bottleneck":
        adapted: Any = add_peft(model, config, head, base)
        adapted.adapter_info = AdapterInfo(base, None)
        return adapted
    settings = bottleneck_config(config)
    model.requires_grad_(False)
    add_bottlenecks(model, settings)
    for name in head:
        model.get_submodule(name).requires_grad_(True)
    model.adapter_info = AdapterInfo(base, settings)
    return model


def head_modules(model: PreTrainedModel, new_weights: list[str]) -> list[str]:
    """Modules that are trained whole: those outside the backbone, and new ones inside it, such as a pooler."""
    outside = [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]
    inside = {name.rpartition(".")[0] for name in new_weights if name.split(".")[0] not in outside}
    return [*outside, *sorted(inside)]


def frozen_layers(model: nn.Module) -> list[nn.Module]:
    """The plain linear layers below an adapter whose frozen weights only multiply, and are not saved; none without one.

    DoRA also reads the norms of their columns.
    """
    info = adapter_info(model)
    if info is None or getattr(getattr(model, "active_peft_config", None), "use_dora", False):
        return []
    return [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]


def describe_adapter(model: Any) -> str | None:
    """The method of an adapter, its size, and the names of the layers that it adapts, in words; None without one."""
    info = adapter_info(model)
    if info is None:
        return None
    if info.bottleneck is not None:
        where = "attention and feed-forward" if info.bottleneck.attention else "feed-forward"
        return f"bottleneck after {where}, a {info.bottleneck.reduction_factor:g}th of the width"
    config = model.active_peft_config
    method = "dora" if getattr(config, "use_dora", False) else config.peft_type.lower().replace("_", " ")
    if config.is_prompt_learning:
        return f"{method} of {config.num_virtual_tokens} tokens"
    names = sorted({name.rpartition(".")[2] for name in config.target_modules})
    size = f" of rank {config.r}, alpha {config.lora_alpha:g}," if hasattr(config, "r") else ""
    return f"{method}{size} on {', '.join(names)}"


def save_adapter(model: Any, folder: Path) -> None:
    """Write adapter, head and configuration to an empty folder, in the files of AdapterHub or of peft."""
    info: AdapterInfo = model.adapter_info
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    if info.bottleneck is None:
        model.save_pretrained(folder, save_embedding_layers=False)
    else:
        save_bottlenecks(model, info.bottleneck, info.base, folder)


def reload_adapter(model: Any, folder: Path) -> None:
    """Load what `save_adapter` wrote into the same model, in place."""
    info: AdapterInfo = model.adapter_info
    if info.bottleneck is None:
        reload_peft(model, folder)
    else:
        load_bottlenecks(model, info.bottleneck, folder)


def adapter_folder(source: ModelSource) -> Path | None:
    """The folder of an adapter, or its snapshot in the cache; None where `source` is a whole model."""
    folder = Path(resolve_model(source))
    return folder if (folder / "adapter_config.json").is_file() else None


def base_of(folder: Path) -> ModelSource:
    """The base model of an adapter. Raises UserError if the adapter does not name it or its folder is gone."""
    base, revision = named_base(read_json(folder / "adapter_config.json"))
    if not base:
        raise UserError(f"{folder}/adapter_config.json does not name the base model of the adapter")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(
            f"{folder} is an adapter over {base}, which is not there; put its new path into adapter_config.json"
        )
    return ModelSource(model=base, model_revision=revision)


def load_adapter(
    folder: Path,
    attention: Attention = "auto",
    mixed_precision: str = "no",
    device: torch.device = FLOAT32.device,
    quantized: bool = True,
) -> Any:
    """A trained classifier: the base model with the adapter and the head of `folder`, which are float32.

    The linear layers of the base are held as `load_classifier` says. Raises UserError if base model or adapter cannot be
    loaded, do not fit each other, or have no trained head.
    """
    base = dataclasses.replace(base_of(folder), attn_implementation=attention)
    settings = read_json(folder / "adapter_config.json")
    is_peft = "peft_type" in settings
    head = {} if is_peft else read_head(folder)
    if (folder / "config.json").is_file():
        hf_config = load_hf_config(ModelSource(str(folder)), labels=True)
    else:
        hf_config = load_hf_config(base, labels=is_peft)
        for key in (*ANSWER_SETTINGS, KEY, LOAD_IN):  # of the head and the data of the base model
            vars(hf_config).pop(key, None)
        if not is_peft:
            hf_config.num_labels, hf_config.label2id = head["num_labels"], head["label2id"]
            hf_config.id2label = {index: name for name, index in head["label2id"].items()}
    load_in = getattr(hf_config, LOAD_IN, None) if quantized else None
    frozen = frozen_weights(load_in, mixed_precision, device, weight_norms=bool(settings.get("use_dora")))
    kind = AutoModelForSequenceClassification
    model, info = load_pretrained(base, kind, hf_config, changed=True, frozen=frozen)
    model.config._name_or_path = str(folder)  # where ONNX export looks for the model card
    if is_peft:
        adapted: Any = load_peft(model, folder)
        adapted.adapter_info = AdapterInfo(base, None)
        return adapted
    places = read_bottleneck_config(folder)
    add_bottlenecks(model, places)
    missing = set(info.new) - load_bottlenecks(model, places, folder)
    if missing:
        raise UserError(f"{folder} does not fit {base.model}: both lack {', '.join(sorted(missing)[:4])}")
    adapted = model.eval()
    adapted.adapter_info = AdapterInfo(base, places)
    return adapted
