"""Equal runs, equal bits: what that takes on a GPU, and what is promised on which device."""

import logging
import os

import torch

from lib.runtime.precision import uses_gpu

logger = logging.getLogger(__name__)

WORKSPACE = ":4096:8"
"""Memory of cuBLAS with which its products are deterministic: 8 buffers of 4 MiB (cuBLAS, "Results reproducibility")."""


def request_determinism(wanted: bool) -> None:
    """Have this process compute by deterministic algorithms if it uses a GPU. Call it before the first product there.

    Of attention in the backward pass PyTorch has deterministic kernels only where nothing else is allowed, hence no
    `warn_only`; see `relax`. On a CPU nothing is changed: equal runs are equal there.
    """
    if not (wanted and uses_gpu()):
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # else one kernel more a tensor
    torch.use_deterministic_algorithms(True)


def relax(error: RuntimeError) -> bool:
    """Allow what `error` says has no deterministic algorithm, and say so; False if it says something else."""
    asked = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    if not asked or "eterministic" not in str(error):
        return False
    torch.use_deterministic_algorithms(True, warn_only=True)
    reason = str(error).partition(".")[0]
    logger.warning("equal runs may differ in their last bits: %s", reason)
    return True


def describe_determinism(device_type: str) -> str:
    """What is promised of two equal runs on such a device, in words."""
    if device_type == "cpu":
        return "equal bit by bit"
    if device_type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return "equal bit by bit on GPUs of one kind, by deterministic algorithms"
    return "may differ in their last bits"
