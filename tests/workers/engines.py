"""How the processes of a launch hold a model: as launched, or otherwise, so that one launch compares several ways."""

import os

from lib.runtime import launch_checks

SIZES = ("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE")
FSDP, SEVERAL = (
    {"ACCELERATE_USE_FSDP": "false"},
    {"ACCELERATE_USE_PARALLELISM_CONFIG": "false"} | dict.fromkeys(SIZES, "1"),
)
READ = launch_checks.read_launch
LAUNCHED = {name: os.environ.get(name, value) for name, value in (FSDP | SEVERAL).items()}


def use_engine(name: str | None) -> None:
    """From here on, every process holds the whole model with `plain`, a part of it with `fsdp`; None: as launched."""
    launch_checks.read_launch = (lambda: None) if name else READ  # it was told otherwise
    os.environ.update(LAUNCHED | {None: {}, "fsdp": SEVERAL, "plain": FSDP | SEVERAL}[name])
