"""Mixed precision: which one, what is computed in which type, weights cast once for many forwards."""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from lib.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def uses_gpu() -> bool:
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true")


def resolve_precision(choice: str) -> str:
    """`auto` as the launcher's choice, else bf16 where the device is fast at it, else no.

    The launcher exports "no" also when it was not asked, so that only its fp16 and bf16 count as a choice.
    Raises UserError for fp16 without a GPU.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    on_gpu = uses_gpu()
    if choice == "auto":
        fast = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if on_gpu
            else cpu_is_fast_at_bf16(cpu_description())
        )
        choice = launcher if launcher in ("fp16", "bf16") else ("bf16" if fast else "no")
    if choice == "fp16" and not on_gpu:
        raise UserError("--mixed_precision fp16 needs a GPU; use --mixed_precision bf16 or no")
    return choice


def use_tf32(device_type: str, mixed_precision: str) -> None:
    """On a GPU, let products that mixed precision leaves in float32 use TF32; without mixed precision they stay exact."""
    mixed = device_type == "cuda" and mixed_precision != "no"
    torch.set_float32_matmul_precision("high" if mixed else "highest")


def describe_precision(mixed_precision: str) -> str:
    """What is computed in which type, in words."""
    rest = "TF32" if torch.get_float32_matmul_precision() == "high" else "float32"
    return (
        "no, all float32" if mixed_precision == "no" else f"{mixed_precision}, weights float32, other products {rest}"
    )


def cpu_description() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text().split("\n\n")[0] if path.exists() else platform.processor()


def cpu_is_fast_at_bf16(description: str) -> bool:
    """Whether bf16 products beat float32 ones, from the text of /proc/cpuinfo.

    Intel's AMX and AMD's AVX512_BF16 do. Intel's AVX512_BF16 without AMX does not: measured at 160 GFLOP/s against 290
    of float32 on two cores of a Xeon of model 207.
    """
    return "amx_bf16" in description or ("AuthenticAMD" in description and "avx512_bf16" in description)


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
