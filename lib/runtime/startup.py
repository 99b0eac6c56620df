"""The libraries, imported fast: without packages that a text classifier never uses, and without collecting garbage.

Scripts import this module before anything else that imports transformers; later it does nothing.
"""

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from lib.errors import UserError
from lib.runtime.signals import EXIT_RESUME, Stopped

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


def run_script(main: Callable[[Any], None], config: Any) -> None:
    """Call `main`; a mistake of the user ends the process with code 2 and its message, printed once, without a trace.

    A run that was stopped and saved ends with code 75.
    """
    try:
        main(config)
        return
    except UserError as error:
        code, message = 2, f"error: {error}"
    except Stopped as stopped:
        code, message = EXIT_RESUME, f"{stopped}: saved; the same command goes on from here"
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # whoever read this may be gone
            print(message, file=sys.stderr, flush=True)
    # Without cleaning up: processes that wait for this one are ended by the launcher, not by a collective.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)
