"""torch.compile for the layers that are trained, opt-in: one program for all of them, whatever the shape of a batch."""

import torch
from torch import nn

from lib.errors import UserError
from lib.model.layers import find_layers

PROGRAMS = 32
"""Most programs made of one layer's code. A layer needs one each for training and evaluation, with and without padding,
for a single text and for more, and for each kind of layer; past this number it runs uncompiled."""


def compile_layers(model: nn.Module, wanted: bool, device: torch.device) -> nn.Module:
    """Compile the trained layers of `model` in place, if `wanted`; names of weights stay as they are.

    The work is done in the first forward and backward. Layers are compiled, not the model: as they are alike, one program
    serves all, and masks are made outside, where a look at their values costs nothing. Frozen layers stay as they are, so
    that what they gave once can take their place.

    Raises UserError when nothing can be compiled for the device, when the model does not show its layers, or trains none.
    """
    if not wanted:
        return model
    layers = [layer for layer in find_layers(model, "--compile") if any(p.requires_grad for p in layer.parameters())]
    if not layers:
        raise UserError("--compile is for the layers of the model, none of which is trained here; leave it out")
    set_up_compiler()
    check_compiler(device.type)
    for layer in layers:
        layer.compile(dynamic=True)
    return model


def set_up_compiler() -> None:
    """Settings under which a compiled run is the uncompiled one but for rounding."""
    import torch._dynamo  # here, as these take seconds that only a compiled run should pay
    import torch._inductor.config
    from torch.fx.experimental import _config as symbols

    torch._dynamo.config.recompile_limit = PROGRAMS
    torch._dynamo.config.optimize_ddp = False  # gradients are added up by `sum_gradients`, outside
    torch._inductor.config.fallback_random = True  # dropout with the random numbers of an uncompiled run
    symbols.use_duck_shape = False  # 32 texts of 32 tokens are no reason to expect squares


def check_compiler(device: str) -> None:
    """Raise UserError unless a small program can be compiled and run on `device`."""
    from torch._inductor.utils import fresh_cache

    try:
        with fresh_cache():
            torch.compile(torch.square)(torch.ones(2, device=device))
    except Exception as error:  # each tool that may be missing has an error of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        tools = "a C++ compiler (Debian: apt-get install g++, or let CXX name one) and Python's headers (python3-dev)"
        tools = f"{tools}, and on a GPU Triton" if device != "cpu" else tools
        raise UserError(
            f"--compile: nothing can be compiled here: {reason}\nIt needs {tools}; or leave it out."
        ) from error
