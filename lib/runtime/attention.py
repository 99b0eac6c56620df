"""Attention: which implementations this machine can run, and which of PyTorch's kernels "sdpa" may take on a GPU."""

import logging
import os

import torch
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from lib.errors import UserError
from lib.runtime.precision import uses_gpu

logger = logging.getLogger(__name__)

FLASH = {
    "flash_attention_2": ("flash-attn", is_flash_attn_2_available, (8, 0)),
    "flash_attention_3": ("flash-attn-3", is_flash_attn_3_available, (9, 0)),
}
"""The package of an implementation, whether it is there, and the lowest compute capability."""


def missing(implementation: str, mixed_precision: str) -> str | None:
    """What an implementation lacks here; None where nothing is missing."""
    if implementation not in FLASH:
        return None
    package, is_installed, capability = FLASH[implementation]
    if not uses_gpu():
        return "it needs a GPU, and none is used"
    if (found := torch.cuda.get_device_capability()) < capability:
        return (
            f"it needs a GPU of compute capability {capability[0]}.{capability[1]}, this one has {found[0]}.{found[1]}"
        )
    if not is_installed():
        return f"the package {package} is not installed"
    return "it computes in fp16 or bf16, and mixed precision is no" if mixed_precision == "no" else None


def check_attention(implementation: str, mixed_precision: str) -> None:
    """Raise UserError for an `--attn_implementation` that this machine cannot run in this precision."""
    if (reason := missing(implementation, mixed_precision)) is not None:
        raise UserError(
            f"--attn_implementation {implementation}: {reason}; leave it out, or use --attn_implementation sdpa"
        )


def has_attention(implementation: str, mixed_precision: str) -> bool:
    """Whether this machine has the implementation that a run was trained with; where it has not, that is said."""
    reason = missing(implementation, mixed_precision)
    if reason is not None and os.environ.get("RANK", "0") == "0":
        logger.warning("the run was trained with %s, which is not used here: %s", implementation, reason)
    return reason is None


def choose_kernels(device_type: str) -> None:
    """Keep "sdpa" on a GPU from cuDNN, whose kernels are planned anew for each shape of a batch and not deterministic."""
    if device_type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def describe_attention(implementation: str, device_type: str, cpu_kernels: bool) -> str:
    """What computes attention, in words."""
    if implementation == "segments":
        kernel = "varlen_attn of PyTorch, not yet run on a GPU" if device_type == "cuda" else "sdpa, text after text"
        return f"by segments of a row without padding ({kernel})"
    if implementation != "sdpa":
        return implementation
    if device_type == "cuda":
        return "sdpa (flash, memory-efficient or plain, as PyTorch chooses; not cuDNN)"
    return f"sdpa ({'with a kernel of this project in training' if cpu_kernels else 'of PyTorch'})"
