"""The start of a script: heavy libraries imported fast and kept quiet, and errors of the user printed without a trace.

Scripts import this module before anything that imports transformers. A program that has imported transformers already
keeps it as it is.
"""

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from lib.errors import UserError, one_message, redact
from lib.runtime.signals import EXIT_RESUME, REQUEST, Stopped

UNUSED = ("peft", "scipy")
"""Packages that transformers imports with every model if they are installed: for its Trainer, and for object detection."""


@contextlib.contextmanager
def hidden(*names: str) -> Iterator[None]:
    """Within, packages that are not imported yet seem not to be installed."""
    names = tuple(name for name in names if name not in sys.modules)
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]  # importing a module that is None fails
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Within, garbage is not collected; afterwards it is again, but for objects alive at the end.

    Imports create a million objects that stay; scanning them over and over is a third of the import time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


# transformers looks for each package once, so that the hidden ones can be imported afterwards.
if "transformers" not in sys.modules:
    with no_garbage_collection(), hidden(*UNUSED):
        import accelerate  # noqa: F401
        import datasets  # noqa: F401
        from transformers import PreTrainedModel, get_scheduler  # noqa: F401


def quiet_libraries() -> None:
    """No log lines of `datasets`, whose errors we report ourselves, and its progress bars on a terminal only."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


AT_FAILURE: list[Callable[[BaseException], None]] = []


def when_script_fails(act: Callable[[BaseException], None]) -> None:
    """Have `run_script` call `act` with the error that ends the script, before this process ends; it must wait for no other."""
    AT_FAILURE.append(act)


def act_on_failure(error: BaseException) -> None:
    """Call what was registered, in bounded time and not cut short by a launcher that ends what is left of a failed run."""
    REQUEST.ending = bool(AT_FAILURE)
    for act in AT_FAILURE:
        act(error)


def run_script(main: Callable[[Any], None], config: Any) -> None:
    """Call `main(config)`; a UserError ends the process with code 2 and its message, printed once, without a trace.

    A run that was stopped and saved ends with code 75.
    """
    failure = None
    try:
        main(config)
        return
    except UserError as error:
        failure, code, message = error, 2, f"error: {error}"
    except Stopped as stopped:
        code, message = EXIT_RESUME, f"{stopped}: saved; the same command goes on from here"
    except BaseException as error:
        act_on_failure(error)
        raise
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # the reader of a pipe may be gone
            print(one_message(redact(message)), file=sys.stderr, flush=True)
    if failure is not None:
        act_on_failure(failure)
    # Exit without cleanup: it could wait for processes that in turn wait for this one, which the launcher ends.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)
