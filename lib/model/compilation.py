"""--compile: torch.compile for the trained layers, with one set of compiled programs for all layers and batch shapes."""

import torch
from torch import nn

from lib.errors import UserError, first_line
from lib.model.layers import find_layers

RECOMPILE_LIMIT = 32
"""Most programs compiled from the code of one kind of layer; past it, the layer runs uncompiled. It needs one for each of
training and evaluation, with and without padding, and of a batch of one text or more."""


def check_place(on_gpu: bool) -> None:
    """Raise UserError where compiling makes no run faster: on a CPU, whose matrix products take the time.

    Steps of `minilm` with batches of 32, in pairs of which one was compiled, on one thread of an AMD EPYC without bf16: 1.01
    times the time (0.80 to 2.25, n = 16), and 1.08 (0.81 to 20.6, n = 10) where nothing was compiled before; the most was a
    step that compiled once more.
    """
    if not on_gpu:
        raise UserError(
            "--compile needs a GPU: on a CPU its steps took 1.01 times the time of steps without it (median of 16 pairs, a "
            "small BERT in batches of 32, one thread of an AMD EPYC), after 14 to 85 seconds of compiling. Leave it out, and add "
            "--allow_changes to go on with a run that was begun with it"
        )


def compile_layers(model: nn.Module, wanted: bool, device: torch.device) -> nn.Module:
    """Compile the trained layers of `model` in place, if `wanted`; the names of weights do not change.

    Compilation happens in the first forward and backward pass. Layers are compiled instead of the model: they share their
    programs, and the attention masks, whose code reads tensor values, are made outside. Frozen layers are left alone,
    since their outputs may be cached.

    Raises UserError if there is no compiler for the device or it is turned off, or the model does not show its layers or
    trains none.
    """
    if not wanted:
        return model
    layers = [layer for layer in find_layers(model, "--compile") if any(p.requires_grad for p in layer.parameters())]
    if not layers:
        raise UserError("--compile compiles trained layers, and none is trained here; leave it out")
    import torch._dynamo  # these take seconds to import
    import torch._inductor.config
    from torch.fx.experimental import _config as symbols

    if torch._dynamo.config.disable:
        raise UserError("TORCH_COMPILE_DISABLE=1 turns --compile off: unset it, or leave --compile out")
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._inductor.config.fallback_random = True  # dropout with the random numbers of an uncompiled run
    symbols.use_duck_shape = False  # equal sizes, as in 32 texts of 32 tokens, are a coincidence
    check_compiler(device.type)
    for layer in layers:
        layer.compile(dynamic=True)
    return model


def check_compiler(device: str) -> None:
    """Raise UserError unless a small function can be compiled and run on `device`."""
    from torch._inductor.utils import fresh_cache

    try:
        with fresh_cache():
            torch.compile(torch.square)(torch.ones(2, device=device))
    except Exception as error:  # the errors of missing tools have no type in common
        tools = "a C++ compiler (Debian: apt-get install g++; or set CXX) and Python's headers (python3-dev)"
        tools = f"{tools}, and on a GPU Triton" if device != "cpu" else tools
        raise UserError(
            f"--compile: torch.compile does not work here: {first_line(error)}\nIt needs {tools}. Or leave --compile out."
        ) from error
