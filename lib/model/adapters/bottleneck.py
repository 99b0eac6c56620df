"""Bottleneck adapters: two small layers behind each sub-layer of a frozen model, as Houlsby and Pfeiffer place them.

An adapter is a child named `adapter` of the module whose output it changes, through a forward hook, so that the weights
of the model keep their names.
"""

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import get_activation

from lib.config.sections import AdapterConfig
from lib.errors import UserError, require


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an adapter sits in a layer.

    `sublayer` is the module that gives the output before the residual is added, `norm` the layer norm after the
    addition (of a layer that has none there: the layer itself, ""), `hub` the module's name in AdapterHub's files.
    """

    sublayer: str
    norm: str | None
    hub: str


@dataclasses.dataclass(frozen=True)
class Architecture:
    """`layers` is the path of the list of layers in the backbone."""

    layers: str
    attention: Place
    output: Place


BERT = Architecture(
    "encoder.layer",
    Place("attention.output.dropout", "attention.output.LayerNorm", "attention.output.adapters"),
    Place("output.dropout", "output.LayerNorm", "output.adapters"),
)
DISTILBERT = Architecture(
    "transformer.layer",
    Place("attention.out_lin", "sa_layer_norm", "attention_adapters.adapters"),
    Place("ffn", "output_layer_norm", "output_adapters.adapters"),
)
MODERNBERT = Architecture(
    "layers",
    Place("attn.out_drop", None, "attention_adapters.adapters"),
    Place("mlp", "", "output_adapters.adapters"),
)
ARCHITECTURES = {
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "electra": BERT,
    "deberta-v2": BERT,
    "distilbert": DISTILBERT,
    "modernbert": MODERNBERT,
}
"""Model type to where its adapters sit. ModernBERT is not known to AdapterHub; its names there are ours."""


@dataclasses.dataclass(frozen=True)
class Bottlenecks:
    """What all adapters of a model have in common.

    `after_norm`: the adapter reads the normalised sum of sub-layer and residual, not the sub-layer's output alone; what
    it gives is added before that norm in both cases.
    """

    attention: bool
    output: bool
    after_norm: bool
    reduction_factor: float
    non_linearity: str
    scaling: float = 1.0
    leave_out: tuple[int, ...] = ()

    def places(self, architecture: Architecture) -> list[Place]:
        wanted = ((self.attention, architecture.attention), (self.output, architecture.output))
        return [place for given, place in wanted if given]


def bottlenecks_of(config: AdapterConfig) -> Bottlenecks:
    """The settings of a placement: Houlsby et al. 2019 (arXiv:1902.00751), or Pfeiffer et al. 2021 (arXiv:2005.00247).

    Houlsby adapts the outputs of attention and of the feed-forward part; Pfeiffer that of the feed-forward part only,
    and reads it after the layer norm.
    """
    houlsby = config.adapter_placement == "houlsby"
    return Bottlenecks(
        attention=houlsby,
        output=True,
        after_norm=not houlsby,
        reduction_factor=config.adapter_reduction_factor,
        non_linearity=config.adapter_non_linearity or ("swish" if houlsby else "relu"),
    )


class Bottleneck(nn.Module):
    """Down, non-linearity, up: float (..., width) to (..., width), without the residual.

    The up-projection starts at zero, so that a new adapter changes nothing, bit for bit.
    """

    def __init__(self, width: int, settings: Bottlenecks) -> None:
        super().__init__()
        size = max(1, int(width // settings.reduction_factor))
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        self.activation, self.scaling = get_activation(settings.non_linearity), settings.scaling
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.up(self.activation(self.down(hidden))) * self.scaling


def add_to_output(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """Hook of a sub-layer: its output and what the adapter makes of it."""
    return output + module.adapter(output)


def add_before_norm(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """Hook of a layer norm: the norm again, of its input and what the adapter makes of the normalised one."""
    return module.forward(inputs[0] + module.adapter(output))


def find_architecture(model: PreTrainedModel) -> Architecture:
    """Raises UserError for a model type of which it is not known where adapters belong."""
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"--adapter bottleneck knows {known}; the model is {kind}: try --adapter lora")
    return ARCHITECTURES[kind]


def layer_list(model: PreTrainedModel) -> Any:
    return model.base_model.get_submodule(find_architecture(model).layers)


def adapted_module(layer: nn.Module, place: Place, settings: Bottlenecks) -> str:
    """Path, from its layer, of the module that holds the adapter of a place."""
    if not settings.after_norm:
        return place.sublayer
    require(place.norm is not None, f"an adapter that reads after the norm has no place in {type(layer).__name__}")
    return str(place.norm)


def add_bottlenecks(model: PreTrainedModel, settings: Bottlenecks) -> None:
    """Put a new adapter in each of its places, in place. Raises UserError for an unknown model type."""
    architecture = find_architecture(model)
    for number, layer in enumerate(layer_list(model)):
        for place in settings.places(architecture) if number not in settings.leave_out else ():
            module: Any = layer.get_submodule(adapted_module(layer, place, settings))
            module.adapter = Bottleneck(model.config.hidden_size, settings)
            renormalise = settings.after_norm and place.norm != ""
            module.register_forward_hook(add_before_norm if renormalise else add_to_output)


def adapter_names(model: PreTrainedModel, settings: Bottlenecks) -> dict[str, str]:
    """The path of each adapter in the model to its name in AdapterHub's files, up to the name of the adapter."""
    architecture, prefix = find_architecture(model), model.base_model_prefix
    names = {}
    for number, layer in enumerate(layer_list(model)):
        start = f"{prefix}.{architecture.layers}.{number}"
        for place in settings.places(architecture) if number not in settings.leave_out else ():
            path = ".".join(part for part in (start, adapted_module(layer, place, settings), "adapter") if part)
            names[path] = f"{start}.{place.hub}"
    return names
