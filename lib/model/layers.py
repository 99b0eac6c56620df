"""The parts of a model: backbone, embeddings and layers; which of them are frozen, and in which mode they run."""

import math
import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lib.errors import UserError

EMBEDDINGS = re.compile(r"emb|word_emb|layernorm_emb|shared$|wte$|wpe$|project_in$")
"""How transformers names the modules before the first layer."""


def freeze(model: PreTrainedModel, part: str | None) -> None:
    """Turn off the gradients of `backbone`, of `embeddings`, or of the embeddings and the `part` lowest layers.

    Raises UserError if the model does not have as many layers, or does not show them.
    """
    if part is None:
        return
    backbone = backbone_of(model)
    frozen = [backbone] if part == "backbone" else find_embeddings(backbone)
    if part not in ("backbone", "embeddings"):
        layers = find_layers(model, "--freeze")
        if int(part) > len(layers):
            raise UserError(f"--freeze {part}: the model has {len(layers)} layers")
        frozen = [*frozen, *layers[: int(part)]]
    for module in frozen:
        module.requires_grad_(False)


def backbone_of(model: Any) -> Any:
    """The model without its head, also inside an adapter of peft."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(inner, inner.base_model_prefix)


def find_embeddings(backbone: Any) -> list[nn.Module]:
    """The modules that embed tokens and positions before the first layer.

    Beside the token embedding table these may be one of positions (GPT-2's `wpe`) and a projection to another width
    (ELECTRA's `embeddings_project`). Tables of relative positions, which every layer reads, are not among them.
    """
    found = {
        name: module
        for name, module in backbone.named_modules()
        if EMBEDDINGS.match(name.rpartition(".")[2]) and not any(part.isdecimal() for part in name.split("."))
    }
    topmost = [found[name] for name in found if not any(name.startswith(f"{other}.") for other in found)]
    return topmost or [backbone.get_input_embeddings()]


def find_layers(model: Any, flag: str) -> nn.ModuleList:
    """The list of transformer layers: the first list with as many modules as the configuration has layers.

    Raises UserError, which names `flag`, when there is none.
    """
    backbone, number = backbone_of(model), model.config.num_hidden_layers
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    instead = "; use backbone or embeddings" if flag == "--freeze" else ""
    raise UserError(f"{flag}: {type(backbone).__name__} does not show its {number} layers{instead}")


def set_train_mode(model: nn.Module) -> None:
    """Train mode, except for modules without a trainable parameter: a frozen part has the same output every time.

    With an adapter the whole model is in train mode: the frozen layers read the outputs of adapters, which their dropout
    regularizes, as in the papers, in peft and in the `adapters` library.
    """
    model.train()
    if any(hasattr(module, "adapter_info") for module in model.modules()):
        return
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    sizes = [(count_weights(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)


def count_weights(parameter: Any) -> int:
    """How many weights a parameter holds; one byte holds two of 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)
