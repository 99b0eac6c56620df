"""Activations cast once to bf16 for all linear layers that read them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lib.runtime.cpu.eager import is_eager

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def share_cast(module: nn.Module, arguments: tuple[Any, ...]) -> Any:
    """A forward pre-hook: the float32 input of a linear layer, cast as autocast would, once for all layers that read it.

    Queries, keys and values have one input. Autocast casts it three times, and casts three gradients back before it adds
    them; here they are added first. Returns None, which leaves the arguments as they are, wherever somebody could see the
    difference: a subclass of nn.Linear, a replaced `forward`, or hooks of the layer.
    """
    if not (arguments and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled() and is_plain(module)):
        return None
    states = arguments[0]
    if not is_eager(states) or states.dtype != torch.float32:
        return None
    if states.grad_fn is None:  # may be changed in place without a new version: an inference tensor has none
        return None
    key = states._version, torch.get_autocast_dtype("cpu")
    known, cast = getattr(states, "shared_cast", (None, None))
    if known != key:
        cast = states.to(key[1])
        states.shared_cast = key, cast
    return cast, *arguments[1:]


def is_plain(module: nn.Module) -> bool:
    """Whether `module` is a linear layer that does nothing else with its input."""
    return type(module) is nn.Linear and "forward" not in vars(module) and not any(vars(module)[name] for name in HOOKS)


@contextlib.contextmanager
def shared_casts() -> Iterator[None]:
    """Within, the linear layers of every model share their casts."""
    handle = register_module_forward_pre_hook(share_cast)
    try:
        yield
    finally:
        handle.remove()
