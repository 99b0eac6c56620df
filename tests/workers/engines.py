"""How the processes of a launch hold a model: as launched, or otherwise, so that one launch compares several ways."""

import os

NAMES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG")
LAUNCHED = {name: os.environ.get(name, "false") for name in NAMES}


def use_engine(name: str | None) -> None:
    """From here on, every process holds the whole model with `plain`, a part of it with `fsdp`; None: as launched."""
    off = {None: (), "fsdp": NAMES[1:], "plain": NAMES}[name]
    os.environ.update(LAUNCHED | dict.fromkeys(off, "false"))
