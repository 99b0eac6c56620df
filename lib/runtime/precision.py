"""Mixed precision: which one, what is computed in which dtype, and weights cast once for many forwards."""

import contextlib
import logging
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from lib.errors import UserError
from lib.runtime.launch_checks import truth

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TENSOR_CORES = (7, 0)
"""Compute capability of the first GPUs with them, for fp16."""


def uses_gpu() -> bool:
    """Whether a GPU is visible and ACCELERATE_USE_CPU does not forbid it."""
    return torch.cuda.is_available() and not truth("ACCELERATE_USE_CPU")


def resolve_precision(choice: str) -> str:
    """`choice`, where `auto` means the launcher's choice, else bf16 or fp16 if the device is fast at it, else no.

    The launcher exports "no" even if it was not told, so only its fp16 and bf16 count. Raises UserError for fp16 without
    a GPU.
    """
    asked, launcher = choice, os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    on_gpu = uses_gpu()
    if choice == "auto" and launcher in ("fp16", "bf16"):
        choice = launcher
    elif choice == "auto":
        choice = gpu_precision() if on_gpu else "bf16" if cpu_is_fast_at_bf16(cpu_description()) else "no"
    if choice == "fp16" and not on_gpu:
        origin = "" if asked == "fp16" else " of the launcher"
        raise UserError(f"--mixed_precision fp16{origin} needs a GPU; use --mixed_precision bf16 or no")
    return choice


def has_precision(precision: str) -> bool:
    """Whether this machine has the precision that a run was trained with; where it has not, that is said."""
    usable = precision != "fp16" or uses_gpu()
    if not usable and os.environ.get("RANK", "0") == "0":
        logger.warning("the run was trained with fp16, which needs a GPU and is not used here")
    return usable


def gpu_precision() -> str:
    """What the GPUs of this machine that the launch uses are all fast at: bf16, else fp16, else no.

    bf16 needs compute capability 8, an Ampere: a V100 (7.0) and a T4 (7.5) only emulate it, and have tensor cores for fp16.
    """
    count = min(torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    lowest = min(torch.cuda.get_device_capability(index) for index in range(count))
    if lowest >= (8, 0) and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp16" if lowest >= TENSOR_CORES else "no"


def use_tf32(device_type: str, mixed_precision: str) -> None:
    """On a GPU, with mixed precision, compute the remaining float32 matrix products in TF32; else in full float32."""
    mixed = device_type == "cuda" and mixed_precision != "no"
    torch.set_float32_matmul_precision("high" if mixed else "highest")


def describe_precision(mixed_precision: str) -> str:
    """What is computed in which dtype, in words."""
    rest = "TF32" if torch.get_float32_matmul_precision() == "high" else "float32"
    return (
        "no, all float32" if mixed_precision == "no" else f"{mixed_precision}, weights float32, other products {rest}"
    )


def cpu_description() -> str:
    """/proc/cpuinfo of the first core; elsewhere the processor's name."""
    path = Path("/proc/cpuinfo")
    return path.read_text().split("\n\n")[0] if path.exists() else platform.processor()


def cpu_is_fast_at_bf16(description: str) -> bool:
    """Whether bf16 matrix products are faster than float32 ones, from the text of /proc/cpuinfo.

    They are with Intel's AMX and AMD's AVX512_BF16. With Intel's AVX512_BF16 alone they are not: 160 GFLOP/s against 290
    in float32, on two cores of a Xeon of model 207.
    """
    return "amx_bf16" in description or ("AuthenticAMD" in description and "avx512_bf16" in description)


@contextlib.contextmanager
def cast_weights(model: nn.Module, mixed_precision: str) -> Iterator[None]:
    """Within, the linear layers of `model` hold their weights in the dtype that autocast would cast them to in each forward.

    Results are equal bit by bit: autocast rounds the same numbers the same way, and norms and embeddings stay float32.
    The model cannot be trained within. The copies take half the memory of the weights. Does nothing without mixed
    precision.
    """
    dtype = DTYPES.get(mixed_precision)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)] if dtype else []
    originals = [(layer, dict(layer._parameters)) for layer in layers]
    casts: dict[nn.Parameter, nn.Parameter] = {}  # weights shared between layers stay shared
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


@torch.no_grad()
def keep_in_dtype(layers: Iterable[nn.Module], mixed_precision: str) -> None:
    """Hold the frozen weights of linear `layers` in the dtype that autocast casts them to in each forward.

    Results are equal bit by bit, as with `cast_weights`. The weights take half the memory, and no step casts them again.
    """
    dtype = DTYPES.get(mixed_precision)
    for layer in layers if dtype else ():
        own = list(layer.parameters(recurse=False))
        if all(p.dtype == torch.float32 and not p.requires_grad for p in own):
            for parameter in own:
                parameter.data = parameter.data.to(dtype)
