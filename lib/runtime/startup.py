"""The libraries, imported fast: without packages that a text classifier never uses, and without collecting garbage.

Scripts import this module before anything else that imports transformers; later it does nothing.
"""

import contextlib
import gc
import sys
from collections.abc import Iterator

UNUSED = ("peft", "scipy")
"""Packages that transformers imports with every model when it finds them: for Trainer, and to match boxes in pictures."""


@contextlib.contextmanager
def hidden(*names: str) -> Iterator[None]:
    """Within, packages that are not imported yet seem not to be installed."""
    names = tuple(name for name in names if name not in sys.modules)
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]  # None: whoever looks finds nothing
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Within, no garbage is collected; what is alive afterwards is never looked at again.

    An import makes a million objects that stay: looking through them over and over is a third of its time.
    """
    wanted = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if wanted:
            gc.enable()


# What transformers has decided about a package it does not decide anew; the packages can be imported afterwards.
if "transformers" not in sys.modules:
    with uncollected(), hidden(*UNUSED):
        import accelerate  # noqa: F401
        import datasets  # noqa: F401
        from transformers import PreTrainedModel, get_scheduler  # noqa: F401
