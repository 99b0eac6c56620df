"""Bottleneck adapters: two small linear layers after each sub-layer of a frozen model (Houlsby or Pfeiffer placement).

An adapter is a child module named `adapter` of the module whose output it changes, through a forward hook, so that the
weights of the model keep their names.
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
    """Where an adapter sits in a transformer layer."""

    sublayer: str
    """The module that gives the output before the residual connection is added."""
    norm: str | None
    """The layer norm after the residual connection; "" for the layer itself, in a layer without a norm there."""
    hub: str
    """The name of the adapters there in AdapterHub's files."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    layers: str
    """Path of the list of layers in the backbone."""
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
"""By model type. AdapterHub does not support ModernBERT; the names in its files are this project's."""


@dataclasses.dataclass(frozen=True)
class BottleneckConfig:
    """What all adapters of a model have in common."""

    attention: bool
    """An adapter after the attention of each layer."""
    output: bool
    """An adapter after the feed-forward part of each layer."""
    after_norm: bool
    """The adapter reads the normalized sum of sub-layer and residual, not the output of the sub-layer alone. Its own
    output is added before that norm in both cases."""
    reduction_factor: float
    """Width of the model divided by that of the adapter."""
    non_linearity: str
    scaling: float = 1.0
    leave_out: tuple[int, ...] = ()
    """Numbers of layers without adapters."""


def bottleneck_config(config: AdapterConfig) -> BottleneckConfig:
    """The placement of Houlsby et al. 2019 (arXiv:1902.00751) or Pfeiffer et al. 2021 (arXiv:2005.00247).

    Houlsby adapts the outputs of attention and of the feed-forward part; Pfeiffer only that of the feed-forward part,
    and reads it after the layer norm.
    """
    houlsby = config.adapter_placement == "houlsby"
    return BottleneckConfig(
        attention=houlsby,
        output=True,
        after_norm=not houlsby,
        reduction_factor=config.adapter_reduction_factor,
        non_linearity=config.adapter_non_linearity or ("swish" if houlsby else "relu"),
    )


class Bottleneck(nn.Module):
    """Down-projection, activation, up-projection: float (..., width) to (..., width), without the residual connection.

    The up-projection starts at zero, so that a new adapter leaves the outputs of the model bitwise equal.
    """

    def __init__(self, width: int, config: BottleneckConfig) -> None:
        super().__init__()
        size = max(1, int(width // config.reduction_factor))
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        self.activation, self.scaling = get_activation(config.non_linearity), config.scaling
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.up(self.activation(self.down(hidden))) * self.scaling


def add_bottlenecks(model: PreTrainedModel, config: BottleneckConfig) -> None:
    """Put a new adapter into each of its places, in place. Raises UserError for an unknown model type."""
    for path, place, _ in adapter_places(model, config):
        module: Any = model.get_submodule(path)
        module.adapter = Bottleneck(model.config.hidden_size, config)
        renormalize = config.after_norm and place.norm != ""
        module.register_forward_hook(add_before_norm if renormalize else add_to_output)


def add_to_output(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """Forward hook of a sub-layer: the adapter reads its output and adds to it."""
    return output + module.adapter(output)


def add_before_norm(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """Forward hook of a layer norm: the adapter reads its output and adds to its input, which is normalized again."""
    return module.forward(inputs[0] + module.adapter(output))


def adapter_places(model: PreTrainedModel, config: BottleneckConfig) -> list[tuple[str, Place, str]]:
    """(path of the module that holds it, its place, its name in AdapterHub's files) of each adapter, lowest layer first.

    Raises UserError for a model type whose places are not known, or that lacks the norm after which the adapter reads.
    """
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"--adapter bottleneck knows {known}; the model is {kind}: try --adapter lora")
    architecture = ARCHITECTURES[kind]
    choices = ((config.attention, architecture.attention), (config.output, architecture.output))
    places = [place for chosen, place in choices if chosen]
    found = []
    for number in range(len(model.base_model.get_submodule(architecture.layers))):
        layer = f"{model.base_model_prefix}.{architecture.layers}.{number}"
        for place in places if number not in config.leave_out else ():
            inside = place.norm if config.after_norm else place.sublayer
            require(inside is not None, f"{kind} has no norm after attention, where these adapters read")
            found.append((f"{layer}.{inside}" if inside else layer, place, f"{layer}.{place.hub}"))
    return found
