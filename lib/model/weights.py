"""The weights of a model on disk: in checkpoints, and exported for any program that uses transformers."""

import json
import sys
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_model as safetensors_load_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from lib.errors import UserError
from lib.model.adapters.adapt import adapter_info, reload_adapter, save_adapter
from lib.model.sharding import free_layers, is_sharded, own_part, tensors_of, whole_weights
from lib.model.stored_tensors import StoredTensors, stored_at

WEIGHTS = "model.safetensors"
"""The file of a checkpoint with the weights that training changes."""

FROZEN = "frozen.safetensors"
"""The file of a checkpoint with the other weights; absent where nothing is frozen."""


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a model; with an adapter, only its trainable part, since the base model is not saved."""
    tensors = tensors_of(model) if is_sharded(model) else model.state_dict()
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
    """Load the weights of a checkpoint in place; nothing is sent. The frozen part may differ from that of the saved model.

    Raises UserError if the checkpoint lacks weights of the model or has others.
    """
    # The trained weights last: they are right where both files have a view of the same memory.
    frozen, trained = stored_at(folder, FROZEN), stored_at(folder, WEIGHTS)
    files = [frozen, trained] if frozen.exists() else [trained]
    if is_sharded(model) or any(file.is_dir() for file in files):
        load_stored(model, [StoredTensors(file) for file in files], folder)
        return
    results = [safetensors_load_model(model, str(file), strict=False) for file in files]
    missing = saved_tensors(model).keys() & set.intersection(*(set(missing) for missing, _ in results))
    check_names(folder, missing, {name for _, unexpected in results for name in unexpected})


def load_stored(model: nn.Module, files: Sequence[StoredTensors], path: Path) -> None:
    """Load what `files`, of what was saved at `path`, hold of the weights of a model, in shards or not, in place.

    Raises UserError if they lack weights of the model or have others.
    """
    free_layers(model)
    state, place = model.state_dict(), places(model)
    for file in files:
        file.fill({name: state[name] for name in file.shapes if name in state})
    found = {name for file in files for name in file.shapes}
    held = {place[name] for name in found & state.keys()}
    check_names(path, {name for name in saved_tensors(model) if place[name] not in held}, found - state.keys())


def places(model: nn.Module) -> dict[str, int]:
    """A number for each parameter and buffer, by name; tied ones, which are written under one of their names, share theirs."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: id(parameters[name]) if name in parameters and is_sharded(model) else tensor.data_ptr()
        for name, tensor in model.state_dict().items()
    }


def check_names(path: Path, missing: Set[str], unexpected: Set[str]) -> None:
    """Raise UserError if what was saved at `path` lacks weights of the model, or has others."""
    if missing or unexpected:
        lacking, unknown = (", ".join(sorted(names)) or "nothing" for names in (missing, unexpected))
        raise UserError(f"{path} does not hold the weights of this model: {lacking} is missing, {unknown} is unknown")


def load_mean(model: nn.Module, files: Sequence[Path]) -> None:
    """Load the mean of the trained weights in `files`, or folders of parts, of checkpoints, in place; nothing is sent.

    The mean is computed in float64 and rounded once; what counts, such as the batches that a batch norm has seen, is taken
    from the first file. Raises UserError if a file lacks trained weights of the model or has others.
    """
    free_layers(model)
    opened = [StoredTensors(file) for file in files]
    state, trained, place = model.state_dict(), saved_tensors(model).keys() - frozen_names(model), places(model)
    for path, file in zip(files, opened, strict=True):
        names = file.shapes.keys()
        held = {place[name] for name in names & state.keys()}
        missing = {name for name in trained if place[name] not in held}
        check_names(path, missing | (opened[0].shapes.keys() - names), names - state.keys())
    for name in opened[0].shapes:
        first, *others = (file.read(name, state[name]) for file in opened)
        if first.is_floating_point():
            total = first.double()
            for other in others:
                total += other
            first = (total / len(files)).to(first.dtype)
        own_part(state[name]).copy_(first)


def save_model(model: Any, folder: Path, parts: Iterable[dict[str, torch.Tensor]] = ()) -> None:
    """Write a model to an empty folder as transformers' `save_pretrained` does; an adapter with its head and settings.

    Of a model in shards `parts` are the tensors, from `gathered_parts`: a file each.
    """
    if adapter_info(model) is not None:
        save_adapter(model, folder)
    elif is_sharded(model):
        save_pretrained_parts(model, folder, parts)
    else:
        model.save_pretrained(folder)


def save_pretrained_parts(model: Any, folder: Path, parts: Iterable[dict[str, torch.Tensor]]) -> None:
    """Write what `save_pretrained` of the whole model writes, where `parts` give its tensors one after the other."""
    written = []
    for number, part in enumerate(parts, start=1):
        model.save_pretrained(folder, state_dict=part, max_shard_size=sys.maxsize)
        written.append((folder / WEIGHTS).rename(folder / f"{number}-{WEIGHTS}"))
    if len(written) == 1:
        written[0].rename(folder / WEIGHTS)
        return
    index: dict[str, str] = {}
    for number, file in enumerate(written, start=1):
        stem, suffix = WEIGHTS.split(".")
        name = f"{stem}-{number:05d}-of-{len(written):05d}.{suffix}"
        index |= dict.fromkeys(StoredTensors(file).shapes, name)
        file.rename(folder / name)
    size = sum(parameter.nbytes for parameter in model.parameters())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2, sort_keys=True)
    (folder / f"{WEIGHTS}.index.json").write_text(text + "\n", encoding="utf-8")


def reload_model(model: Any, folder: Path) -> None:
    """Load what `save_model` wrote into the same model, in place; every process must call this for a model in shards."""
    if adapter_info(model) is not None:
        with whole_weights(model, change=True, frozen=False):
            reload_adapter(model, folder)
    elif is_sharded(model):
        load_stored(model, [StoredTensors(file) for file in sorted(folder.glob("*.safetensors"))], folder)
    else:
        model.load_state_dict(AutoModelForSequenceClassification.from_pretrained(folder).state_dict())
