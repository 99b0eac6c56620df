"""The weights of a model on disk: in checkpoints, and exported for any program that uses transformers."""

import sys
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_model as safetensors_load_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from lib.errors import UserError
from lib.model.adapters.adapt import adapter_info, reload_adapter, save_adapter

WEIGHTS = "model.safetensors"
"""The file of a checkpoint with the weights that training changes."""

FROZEN = "frozen.safetensors"
"""The file of a checkpoint with the other weights; absent where nothing is frozen."""


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a model; with an adapter, only its trainable part, since the base model is not saved."""
    tensors = model.state_dict()
    if adapter_info(model) is None:
        return dict(tensors)
    return {name: tensors[name] for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen_names(model: nn.Module) -> set[str]:
    """Names of the saved parameters that training does not change; none with an adapter, whose base is not saved.

    Buffers are not among them: training changes those of a batch norm, for example.
    """
    if adapter_info(model) is not None:
        return set()
    return {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}


def split_weights(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(weights that training changes, the frozen ones) of a checkpoint, by name."""
    tensors, frozen = saved_tensors(model), frozen_names(model)
    return (
        {name: tensor for name, tensor in tensors.items() if name not in frozen},
        {name: tensor for name, tensor in tensors.items() if name in frozen},
    )


def save_weights(trained: dict[str, torch.Tensor], frozen: dict[str, torch.Tensor], folder: Path) -> None:
    """Write weights of `split_weights`, which `load_weights` reads; without frozen ones, no file of them."""
    save_tensors(trained, folder / WEIGHTS)
    if frozen:
        save_tensors(frozen, folder / FROZEN)


def save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write tensors to one safetensors file; tied tensors are written once, under one of their names."""
    pattern = f"{file.stem}{{suffix}}{file.suffix}"
    save_torch_state_dict(tensors, file.parent, filename_pattern=pattern, max_shard_size=sys.maxsize)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load the weights of a checkpoint in place. The frozen part may differ from that of the saved model.

    Raises UserError if the checkpoint lacks weights of the model or has others.
    """
    # The trained weights last: they are right where both files have a view of the same memory.
    files = [file for file in (folder / FROZEN, folder / WEIGHTS) if file.name == WEIGHTS or file.exists()]
    results = [safetensors_load_model(model, str(file), strict=False) for file in files]
    missing = saved_tensors(model).keys() & set.intersection(*(set(missing) for missing, _ in results))
    check_names(folder, missing, {name for _, unexpected in results for name in unexpected})


def check_names(path: Path, missing: Set[str], unexpected: Set[str]) -> None:
    """Raise UserError if what was saved at `path` lacks weights of the model, or has others."""
    if missing or unexpected:
        lacking, unknown = (", ".join(sorted(names)) or "nothing" for names in (missing, unexpected))
        raise UserError(f"{path} does not hold the weights of this model: {lacking} is missing, {unknown} is unknown")


def load_mean(model: nn.Module, files: Sequence[Path]) -> None:
    """Load the mean of the trained weights in `files`, which `save_weights` wrote, in place.

    The mean is computed in float64 and rounded once; what counts, such as the batches that a batch norm has seen, is taken
    from the first file. Raises UserError if a file lacks trained weights of the model or has others.
    """
    opened, mean = [safe_open(file, framework="pt") for file in files], {}
    state, trained = model.state_dict(), saved_tensors(model).keys() - frozen_names(model)
    for path, file in zip(files, opened, strict=True):
        names = set(file.keys())
        held = {state[name].data_ptr() for name in names & state.keys()}  # tied tensors are written under one name
        missing = {name for name in trained if state[name].data_ptr() not in held}
        check_names(path, missing | (set(opened[0].keys()) - names), names - state.keys())
    for name in opened[0].keys():  # noqa: SIM118
        first, *others = (file.get_tensor(name) for file in opened)
        if first.is_floating_point():
            total = first.double()
            for other in others:
                total += other
            first = (total / len(files)).to(first.dtype)
        mean[name] = first
    model.load_state_dict(mean, strict=False)


def save_model(model: Any, folder: Path) -> None:
    """Write a model to an empty folder as transformers' `save_pretrained` does; an adapter with its head and settings."""
    if adapter_info(model) is None:
        model.save_pretrained(folder)
    else:
        save_adapter(model, folder)


def reload_model(model: Any, folder: Path) -> None:
    """Load what `save_model` wrote into the same model, in place."""
    if adapter_info(model) is None:
        model.load_state_dict(AutoModelForSequenceClassification.from_pretrained(folder).state_dict())
    else:
        reload_adapter(model, folder)
