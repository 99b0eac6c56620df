"""Weights in the type of mixed precision, cast once for many forwards instead of anew in each."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def cast_weights(model: nn.Module, mixed_precision: str) -> Iterator[None]:
    """Within, the linear layers of `model` hold the weights that autocast would make of theirs in every forward.

    Results are the same to the last bit: autocast rounds the same numbers the same way, and all that it leaves in float32,
    such as norms and embeddings, stays. Nothing can be trained within. Takes half the memory of these weights, and nothing
    where precision is not mixed.
    """
    dtype = DTYPES.get(mixed_precision)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)] if dtype else []
    originals = [(layer, dict(layer._parameters)) for layer in layers]
    casts: dict[nn.Parameter, nn.Parameter] = {}  # a weight that layers share stays shared
    try:
        for layer, parameters in originals:
            for name, parameter in parameters.items():
                if parameter is not None and parameter.dtype == torch.float32:
                    if parameter not in casts:
                        casts[parameter] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
                    layer._parameters[name] = casts[parameter]
        yield
    finally:
        for layer, parameters in originals:
            layer._parameters.update(parameters)
