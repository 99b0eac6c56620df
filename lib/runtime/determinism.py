"""Equal runs, equal bits: what that takes on a GPU, and what is promised on which device."""

import dataclasses
import logging
import os

import torch

from lib.runtime.precision import uses_gpu

logger = logging.getLogger(__name__)

WORKSPACE = ":4096:8"
"""Memory of cuBLAS with which its products are deterministic: 8 buffers of 4 MiB (cuBLAS, "Results reproducibility")."""


@dataclasses.dataclass
class Request:
    """What this process was asked for."""

    strict: bool = False
    """Whether training steps may use deterministic algorithms only."""


REQUEST = Request()


def request_determinism(wanted: bool) -> None:
    """Have this process compute by deterministic algorithms if it uses a GPU, or by the fastest where they are not wanted.

    Call it before the first product on the GPU. What has no deterministic algorithm is computed with a warning, except
    within training steps, see `demand`. On a CPU nothing is changed: equal runs are equal there.
    """
    REQUEST.strict = wanted and uses_gpu()
    if not uses_gpu():
        return
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    torch.utils.deterministic.fill_uninitialized_memory = not wanted  # type: ignore[attr-defined]  # one kernel more a tensor
    torch.use_deterministic_algorithms(wanted, warn_only=wanted)


def demand(strict: bool) -> None:
    """From here on, what has no deterministic algorithm is an error, or else a warning; nothing changes after `relax`.

    Of attention in the backward pass PyTorch has deterministic kernels only where nothing else is allowed, so that a
    training step must be strict.
    """
    if REQUEST.strict:
        torch.use_deterministic_algorithms(True, warn_only=not strict)


def relax(error: BaseException | None) -> bool:
    """Allow what `error` says has no deterministic algorithm, and say so; False if it says something else."""
    if not (REQUEST.strict and isinstance(error, RuntimeError) and "eterministic" in str(error)):
        return False
    demand(strict=False)
    REQUEST.strict = False
    logger.warning("equal runs may differ in their last bits: %s", str(error).partition(".")[0])
    return True


def describe_determinism(device_type: str) -> str:
    """What is promised of two equal runs on such a device, in words."""
    if device_type == "cpu":
        return "equal bit by bit"
    if device_type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return "equal bit by bit on GPUs of one kind, by deterministic algorithms"
    return "may differ in their last bits"
