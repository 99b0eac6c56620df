"""The libraries without what a text classifier never uses: each such package costs half a second of every start.

Scripts import this module before anything else that imports transformers; later it does nothing.
"""

import contextlib
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


# What transformers has decided about a package it does not decide anew; the packages can be imported afterwards.
if "transformers" not in sys.modules:
    with hidden(*UNUSED):
        from transformers import PreTrainedModel, get_scheduler  # noqa: F401
