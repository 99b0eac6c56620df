"""A model that learns through an adapter: made from a base model, saved without it, loaded over it again.

Of such a model only the adapter, the head and weights that the base's checkpoint lacked are trained and saved; the base
is named in adapter_config.json, with its revision.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from safetensors.torch import load_model as safetensors_load_model
from safetensors.torch import save_model as safetensors_save_model
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from lib.config.sections import AdapterConfig, ModelConfig, UserError
from lib.hub.needs import named_base
from lib.model import load as modeling
from lib.model.adapters.adapterhub import load_tensors, read_head, read_json, read_settings, save_adapters, write_files
from lib.model.adapters.bottleneck import Bottlenecks, add_bottlenecks, bottlenecks_of
from lib.model.adapters.peft_methods import add_peft, load_peft, restore_peft, save_peft

WEIGHTS = "model.safetensors"
FROZEN = "frozen.safetensors"


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What an adapted model remembers, as its attribute `adaptation`.

    `base` is the model below as it was asked for, `bottlenecks` None where the adapter is one of peft.
    """

    base: ModelConfig
    bottlenecks: Bottlenecks | None


def adapt(model: Any, config: AdapterConfig, base: ModelConfig, new_weights: list[str]) -> Any:
    """The model with a new adapter, all else frozen but its head and `new_weights`; the model itself without --adapter.

    Raises UserError when the method does not fit the model.
    """
    if config.adapter is None:
        return model
    if adapter_folder(base) is not None:
        raise UserError(f"--model {base.model} is itself an adapter; name the model below it and train a new one")
    base = ModelConfig(model=absolute(base.model), model_revision=base.model_revision)
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


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that make a model, given its base: of an adapted one those that are trained, else all of them."""
    if adaptation_of(model) is None:
        return dict(model.state_dict())
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen_names(model: nn.Module) -> set[str]:
    """Names of the parameters that a checkpoint holds though training does not change them.

    Buffers are none of them: those of a batch norm that is trained do change. Of an adapted model there are none.
    """
    if adaptation_of(model) is not None:
        return set()
    return {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write what `load_weights` needs to make the very same model of one that is built alike: for checkpoints.

    Frozen parameters have their own file, which is left as it is where `folder` has it already.
    """
    frozen = frozen_names(model)
    if adaptation_of(model) is not None:
        trained = {name: tensor.detach().contiguous() for name, tensor in saved_tensors(model).items()}
        save_file(trained, folder / WEIGHTS)
    elif not frozen:
        safetensors_save_model(model, str(folder / WEIGHTS))
    else:
        tensors = model.state_dict()
        save_tensors({name: tensor for name, tensor in tensors.items() if name not in frozen}, folder / WEIGHTS)
        if not (folder / FROZEN).exists():
            save_tensors({name: tensor for name, tensor in tensors.items() if name in frozen}, folder / FROZEN)


def save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write tensors to one file; those that are tied are written once, under one of their names."""
    pattern = f"{file.stem}{{suffix}}{file.suffix}"
    save_torch_state_dict(tensors, file.parent, filename_pattern=pattern, max_shard_size=sys.maxsize)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load what `save_weights` wrote into the very model, in place; also when another part of it was frozen then.

    Raises UserError when the names are not those of the model.
    """
    if adaptation_of(model) is not None:
        tensors = load_file(folder / WEIGHTS)
        assert tensors.keys() == saved_tensors(model).keys(), "the checkpoint holds other tensors than are trained"
        model.load_state_dict(tensors, strict=False)
        return
    # Trained ones last: they are right where both files hold a view of the same memory.
    files = [file for file in (folder / FROZEN, folder / WEIGHTS) if file.name == WEIGHTS or file.exists()]
    answers = [safetensors_load_model(model, str(file), strict=False) for file in files]
    missing = set.intersection(*(set(missing) for missing, _ in answers))
    unexpected = {name for _, unexpected in answers for name in unexpected}
    if missing or unexpected:
        lacking, unknown = (", ".join(sorted(found)) or "nothing" for found in (missing, unexpected))
        raise UserError(f"{folder} does not hold the weights of this model: {lacking} is missing, {unknown} is unknown")


def save_model(model: Any, folder: Path) -> None:
    """Write a model to a new folder: whole with `save_pretrained`, or an adapter with its head and settings."""
    adaptation = adaptation_of(model)
    if adaptation is None:
        model.save_pretrained(folder)
        return
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    if adaptation.bottlenecks is None:
        save_peft(model, folder)
    else:
        base = adaptation.base
        files = save_adapters(model, adaptation.bottlenecks, base.model, base.model_revision, saved_tensors(model))
        write_files(folder, files)


def restore_weights(model: Any, folder: Path) -> None:
    """Load what `save_model` wrote into the very model, in place."""
    adaptation = adaptation_of(model)
    if adaptation is None:
        saved = AutoModelForSequenceClassification.from_pretrained(folder)
        model.load_state_dict(saved.state_dict())
    elif adaptation.bottlenecks is None:
        restore_peft(model, folder)
    else:
        load_tensors(model, adaptation.bottlenecks, folder)


# ---------------------------------------------------------------------------------------------------- loading


def adapter_folder(config: ModelConfig) -> Path | None:
    """The folder of an adapter, a snapshot in the cache where it is one of the Hub; None for a whole model."""
    folder = Path(modeling.resolve_model(config))
    return folder if (folder / "adapter_config.json").is_file() else None


def base_of(folder: Path) -> ModelConfig:
    """The model below an adapter. Raises UserError when the adapter does not name it, or its folder is gone."""
    base, revision = named_base(read_json(folder / "adapter_config.json"))
    if not base:
        raise UserError(f"{folder}/adapter_config.json does not name the model that the adapter belongs to")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(
            f"{folder} is an adapter over {base}, which is not there; put the new place in adapter_config.json"
        )
    return ModelConfig(model=base, model_revision=revision)


def tokenizer_source(config: ModelConfig) -> ModelConfig:
    """Where the tokenizer of a model is: that of the base where an adapter came without."""
    folder = adapter_folder(config)
    if folder is None:
        return config
    return ModelConfig(model=str(folder)) if (folder / "tokenizer_config.json").is_file() else base_of(folder)


def load_classifier(config: ModelConfig) -> Any:
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


def load_base(base: ModelConfig, folder: Path, labels: dict[str, Any]) -> tuple[Any, set[str]]:
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
