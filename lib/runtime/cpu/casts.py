"""Casts of mixed precision made once: of a weight for many forwards, of an input for all layers that share it."""

import functools
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle


def share_cast(module: nn.Module, arguments: tuple[Any, ...]) -> Any:
    """Give a linear layer its float32 input as autocast would cast it, once for all layers that read the same activations.

    Queries, keys and values come from one input: autocast casts it three times, and casts back its three gradients before
    it adds them; here they are added, then cast back. This is a forward hook: None leaves the arguments as they are.
    """
    plain = type(module) is nn.Linear  # others may do more with their input than autocast casts it for
    if not (plain and arguments and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()):
        return None
    states = arguments[0]
    recorded = states.grad_fn is not None  # else it may be changed where its version does not tell
    if not recorded or states.dtype != torch.float32 or states.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    key = states._version, torch.get_autocast_dtype("cpu")
    known, cast = getattr(states, "shared_cast", (None, None))
    if known != key:
        cast = states.to(key[1])
        states.shared_cast = key, cast
    return cast, *arguments[1:]


@functools.cache
def use_shared_casts() -> RemovableHandle:
    """Have every model of this process share its casts on a CPU; the handle ends it."""
    return register_module_forward_pre_hook(share_cast)
