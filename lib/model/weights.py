"""The weights of a model on disk: in checkpoints, and exported for any transformers program."""

import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from safetensors.torch import load_model as safetensors_load_model
from safetensors.torch import save_model as safetensors_save_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from lib.errors import UserError
from lib.model.adapters.adapt import adaptation_of
from lib.model.adapters.adapterhub import load_tensors, save_adapters, write_files
from lib.model.adapters.peft_methods import restore_peft, save_peft

WEIGHTS = "model.safetensors"

FROZEN = "frozen.safetensors"


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
