"""bf16 copies of the weights of linear layers, with which a step computes; the weights themselves stay float32."""

from typing import Any

import torch
from torch import nn

from lib.model.adapters.adapt import adapter_info
from lib.model.sharding import is_sharded
from lib.runtime.precision import keep_copy


class WorkingWeights:
    """Copies in bf16 that stand in a model's linear layers in place of their float32 weights while it computes a step.

    Autocast would cast each weight in each forward, and its gradient in each backward. The copies are made anew once an
    attempt at a step, all at once, from whatever the weights are then: no resume, average or skipped step leaves an old
    one. Losses and weights are equal to autocast's bit by bit: the same numbers are rounded the same way, and `Gradients`
    adds up the gradients of the copies in float32. Outside of the model's own forward, also within a step, its parameters
    are the float32 ones.

    Left to autocast are weights that another kind of module reads as well, such as an embedding table, all weights where
    there is an adapter, whose code looks at dtypes, and models in shards.
    """

    def __init__(self, model: nn.Module, wanted: bool) -> None:
        weights = copied_weights(model) if wanted else []
        self.of = {weight: keep_copy(weight, torch.bfloat16) for weight in weights}
        """The copy of each weight."""
        self.places = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if p in self.of]
        self.fresh = False
        """Whether a step is being computed, for which the copies were made."""
        self.lent = False
        """Whether a forward has used the copies whose backward is not over."""
        if self.of:
            model.register_forward_pre_hook(self.lend)
            model.register_forward_hook(self.take_back, always_call=True)

    def __deepcopy__(self, _: Any) -> "WorkingWeights":
        """A copy of the model computes with its own weights: it is not trained here."""
        return WorkingWeights(nn.Module(), False)

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the weights into their copies, which stand in for them from here to `expire`."""
        if self.of:
            torch._foreach_copy_([*self.of.values()], [*self.of])
        self.fresh, self.lent = bool(self.of), False

    def expire(self) -> None:
        """The step is computed, or was given up: forwards read the weights again, and the weights are in their places."""
        self.fresh = False
        self.take_back()  # hooks do not run after every kind of exception
        for copy in self.of.values():
            copy.grad = None

    def lend(self, *_: Any) -> None:
        """Put the copies in their places, for one forward; for each backward only once.

        A second forward before it is left to autocast: gradients of both would be added in bf16.
        """
        if self.fresh and not self.lent and torch.is_grad_enabled():
            self.lent = True
            for module, name, weight in self.places:
                if module._parameters[name] is weight and weight.requires_grad:
                    module._parameters[name] = self.of[weight]

    def take_back(self, *_: Any) -> None:
        """Put the weights back into their places."""
        for module, name, weight in self.places:
            if module._parameters[name] is self.of[weight]:
                module._parameters[name] = weight


def copied_weights(model: nn.Module) -> list[nn.Parameter]:
    """The trained float32 parameters that only linear layers read."""
    if is_sharded(model) or adapter_info(model) is not None:
        return []
    places = [(module, p) for module in model.modules() for p in module._parameters.values() if p is not None]
    others = {parameter for module, parameter in places if not is_linear(module)}
    found = dict.fromkeys(p for _, p in places if p.requires_grad and p.dtype == torch.float32)
    return [parameter for parameter in found if parameter not in others]


def is_linear(module: nn.Module) -> bool:
    """Whether `module` only multiplies by its weight and adds its bias."""
    return type(module) is nn.Linear and module._parameters.keys() <= {"weight", "bias"}


def are_copied(wanted: bool | None, mixed_precision: str, device: torch.device) -> bool:
    """Whether steps are computed with copies, where `wanted` is --bf16_weights: by itself on GPUs, in bf16."""
    return mixed_precision == "bf16" and (device.type == "cuda" if wanted is None else wanted)
