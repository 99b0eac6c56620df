"""Parts of a model that are not trained: which they are, and the mode they run in."""

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lib.errors import UserError

EMBEDDINGS = re.compile(r"emb|word_emb|layernorm_emb|shared$|wte$|wpe$|project_in$")
"""How the names begin of what lies below the layers, in the models of transformers."""


def freeze(model: PreTrainedModel, part: str | None) -> None:
    """Stop the gradients of the backbone, of the embeddings, or of the embeddings and the n lowest layers.

    Raises UserError when the model has no such part, or n is more than its layers.
    """
    for module in frozen_part(model, part):
        module.requires_grad_(False)


def frozen_part(model: PreTrainedModel, part: str | None) -> list[nn.Module]:
    if part is None:
        return []
    backbone = backbone_of(model)
    if part == "backbone":
        return [backbone]
    embeddings = find_embeddings(backbone)
    if part == "embeddings":
        return embeddings
    layers = find_layers(model, "--freeze")
    if int(part) > len(layers):
        raise UserError(f"--freeze {part}: the model has {len(layers)} layers")
    return [*embeddings, *layers[: int(part)]]


def backbone_of(model: Any) -> Any:
    """The model without its head, also below an adapter of peft."""
    below = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(below, below.base_model_prefix)


def find_embeddings(backbone: Any) -> list[nn.Module]:
    """All that makes vectors of tokens and positions before the first layer, wherever an architecture keeps it.

    Beside the table of tokens that may be one of positions (GPT-2's `wpe`) and a change of width (ELECTRA's
    `embeddings_project`). Tables of relative positions, which each layer reads, are none of it.
    """
    found = {
        name: module
        for name, module in backbone.named_modules()
        if EMBEDDINGS.match(name.rpartition(".")[2]) and not any(part.isdecimal() for part in name.split("."))
    }
    topmost = [found[name] for name in found if not any(name.startswith(f"{other}.") for other in found)]
    return topmost or [backbone.get_input_embeddings()]


def find_layers(model: Any, flag: str) -> nn.ModuleList:
    """The list of transformer blocks, wherever an architecture keeps it: the first list as long as the model is deep.

    Raises UserError, in the name of `flag`, when there is none.
    """
    backbone, number = backbone_of(model), model.config.num_hidden_layers
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    instead = "; use backbone or embeddings" if flag == "--freeze" else ""
    raise UserError(f"{flag}: {type(backbone).__name__} does not show its {number} layers{instead}")


def set_train_mode(model: nn.Module) -> None:
    """Train mode, but for parts without a trainable parameter: a frozen part gives the same output each time.

    With an adapter the whole model is in train mode: its frozen parts read what adapters below them give, and their
    dropout regularises the adapters, as in the papers and in the libraries whose settings are used here.
    """
    model.train()
    if any(hasattr(module, "adaptation") for module in model.modules()):
        return
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)
