"""A model that learns through an adapter: made from a base model, saved without it, loaded over it again.

Of such a model only the adapter, the head and weights that the base's checkpoint lacked are trained and saved; the base
is named in adapter_config.json, with its revision.
"""

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from lib.config.sections import AdapterConfig, ModelSource
from lib.errors import UserError
from lib.hub.needs import named_base
from lib.model import load as modeling
from lib.model.adapters.adapterhub import load_tensors, read_head, read_json, read_settings
from lib.model.adapters.bottleneck import Bottlenecks, add_bottlenecks, bottlenecks_of
from lib.model.adapters.peft_methods import add_peft, load_peft


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What an adapted model remembers, as its attribute `adaptation`.

    `base` is the model below as it was asked for, `bottlenecks` None where the adapter is one of peft.
    """

    base: ModelSource
    bottlenecks: Bottlenecks | None


def adapt(model: Any, config: AdapterConfig, base: ModelSource, new_weights: list[str]) -> Any:
    """The model with a new adapter, all else frozen but its head and `new_weights`; the model itself without --adapter.

    Raises UserError when the method does not fit the model.
    """
    if config.adapter is None:
        return model
    if adapter_folder(base) is not None:
        raise UserError(f"--model {base.model} is itself an adapter; name the model below it and train a new one")
    base = ModelSource(model=absolute(base.model), model_revision=base.model_revision)
    head = head_modules(model, new_weights)
    if config.adapter == "bottleneck":
        settings = bottlenecks_of(config)
        model.requires_grad_(False)
        add_bottlenecks(model, settings)
        for name in head:
            model.get_submodule(name).requires_grad_(True)
        model.adaptation = Adaptation(base, settings)
        return model
    adapted: Any = add_peft(model, config, head, base.model, base.model_revision)
    adapted.adaptation = Adaptation(base, None)
    return adapted


def absolute(model: str) -> str:
    """A folder by its full path, so that it is found from elsewhere; anything else as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def head_modules(model: PreTrainedModel, new_weights: list[str]) -> list[str]:
    """Modules that are trained whole: those outside the backbone, and those inside it that are new, such as a pooler."""
    outside = [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]
    inside = {name.rpartition(".")[0] for name in new_weights if name.split(".")[0] not in outside}
    return [*outside, *sorted(inside)]


def adaptation_of(model: nn.Module) -> Adaptation | None:
    return getattr(model, "adaptation", None)


# ---------------------------------------------------------------------------------------------------- loading


def adapter_folder(config: ModelSource) -> Path | None:
    """The folder of an adapter, a snapshot in the cache where it is one of the Hub; None for a whole model."""
    folder = Path(modeling.resolve_model(config))
    return folder if (folder / "adapter_config.json").is_file() else None


def base_of(folder: Path) -> ModelSource:
    """The model below an adapter. Raises UserError when the adapter does not name it, or its folder is gone."""
    base, revision = named_base(read_json(folder / "adapter_config.json"))
    if not base:
        raise UserError(f"{folder}/adapter_config.json does not name the model that the adapter belongs to")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(
            f"{folder} is an adapter over {base}, which is not there; put the new place in adapter_config.json"
        )
    return ModelSource(model=base, model_revision=revision)


def tokenizer_source(config: ModelSource) -> ModelSource:
    """Where the tokenizer of a model is: that of the base where an adapter came without."""
    folder = adapter_folder(config)
    if folder is None:
        return config
    return ModelSource(model=str(folder)) if (folder / "tokenizer_config.json").is_file() else base_of(folder)


def load_classifier(config: ModelSource) -> Any:
    """An already trained classifier, whole or as an adapter over its base, in float32, for use as it is.

    Raises UserError when it cannot be loaded, or has no trained head.
    """
    folder = adapter_folder(config)
    if folder is None:
        return modeling.load_classifier(config)
    base = base_of(folder)
    is_peft = "peft_type" in read_json(folder / "adapter_config.json")
    model, lacking = load_base(base, folder, {} if is_peft else label_settings(folder))
    if is_peft:
        adapted: Any = load_peft(model, folder)
        adapted.adaptation = Adaptation(base, None)
        return adapted
    settings = read_settings(folder)
    add_bottlenecks(model, settings)
    lacking -= load_tensors(model, settings, folder)
    if lacking:
        raise UserError(f"{folder} does not go with {base.model}: both lack {', '.join(sorted(lacking)[:4])}")
    model.adaptation = Adaptation(base, settings)
    return model.eval()


def label_settings(folder: Path) -> dict[str, Any]:
    """The classes of a stored head, as a model's configuration has them."""
    head = read_head(folder)
    id2label = {index: name for name, index in head["label2id"].items()}
    return {"num_labels": head["num_labels"], "id2label": id2label, "label2id": head["label2id"]}


def load_base(base: ModelSource, folder: Path, labels: dict[str, Any]) -> tuple[Any, set[str]]:
    """The model below an adapter with a head of the right size, and the names of weights that its checkpoint lacks."""
    path = modeling.resolve_model(base)
    with modeling.loading(base):
        if (folder / "config.json").is_file():
            settings = AutoConfig.from_pretrained(folder)
        else:
            settings = AutoConfig.from_pretrained(path, **modeling.load_settings(base))
            for name, value in labels.items():
                setattr(settings, name, value)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            config=settings,
            **modeling.weight_settings(base),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model.config._name_or_path = str(folder)  # where whoever asks for the card of the model finds it
    mismatched = {item[0] if isinstance(item, tuple) else item for item in info["mismatched_keys"]}
    return model, {*info["missing_keys"], *mismatched}
