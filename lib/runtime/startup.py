"""The start of a script: heavy libraries imported fast and kept quiet, and errors of the user printed without a trace.

Scripts import this module before anything that imports transformers. A program that has imported transformers already
keeps it as it is.
"""

import contextlib
import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from lib.errors import UserError, one_message, redact
from lib.runtime.signals import EXIT_RESUME, REQUEST, Stopped, end_children, is_first_to_fail, leave

UNUSED = ("peft", "scipy", "bitsandbytes")
"""Packages that transformers imports with every model if they are installed: for its Trainer, for object detection, and for
quantized weights."""


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


LAUNCHER_SECONDS = 5.0
"""How soon a launcher ends the processes that are left when one has failed; then they tell what they know."""
MOST_SECONDS = 120.0
"""How long the end of a failed script may take, W&B's included."""

LOST = (
    "lost its connection to another process, which has ended, or its machine or the network has; the log of that machine says "
    "why. A run of train.py goes on from its last checkpoint when it is started again, also on fewer machines"
)
"""What is known where the launcher of this machine sees nothing wrong."""

AT_FAILURE: list[Callable[[BaseException], None]] = []


def when_script_fails(act: Callable[[BaseException], None]) -> None:
    """Have `run_script` call `act` with the error that ends the script, before this process ends; it must wait for no other."""
    AT_FAILURE.append(act)


def act_on_failure(error: BaseException) -> None:
    """Call what was registered, in bounded time and not cut short by a launcher that ends what is left of a failed run."""
    REQUEST.ending = REQUEST.ending or bool(AT_FAILURE)
    for act in AT_FAILURE:
        with contextlib.suppress(Exception):  # the error that ends the script is the one to know
            act(error)


def run_script(main: Callable[[Any], Any], config: Any) -> None:
    """Call `main(config)`; whatever it raises is printed once and ends this process, at once, with those it started.

    The code is 2 after a UserError, which is printed without a trace, 75 of a run that was stopped and saved, 130 after
    Ctrl-C, and 1 after any other error.
    """
    try:
        main(config)
        sys.stdout.flush()
    except Stopped as stopped:  # every process raises it
        if os.environ.get("RANK", "0") == "0":
            tell(f"{stopped}: {stopped.outcome}")
        flush_output()
        leave("", EXIT_RESUME)
    except BaseException as error:
        fail(error)
    end_children()  # the interpreter waits for them at its end, for ever if one does not answer


def fail(error: BaseException) -> None:
    """Print why the script fails, then end this process and those it started, in bounded time.

    Of processes that were launched together one prints: the first one that fails, and never one that only lost its
    connection to another, as long as the launcher ends it.
    """
    from lib.runtime.processes import has_lost_another

    if isinstance(error, UserError):
        code, reason = 2, str(error)
    elif isinstance(error, KeyboardInterrupt):
        code, reason = 128 + signal.SIGINT, "interrupted"
    else:
        code, reason = 1, "\n".join([type(error).__name__, "".join(traceback.format_exception(error)).strip()])
        if has_lost_another(error):
            reason = f"{LOST}\n{reason}"
    backstop = threading.Timer(MOST_SECONDS, leave, ("the end took too long", code))
    backstop.daemon = True
    backstop.start()
    try:
        if is_first_to_fail(LAUNCHER_SECONDS if has_lost_another(error) else 0.0):
            rank, size = (os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
            where = f"process {rank} of {size}: " if size != "1" and (rank != "0" or code == 1) else ""
            tell(f"error: {where}{reason}")
        flush_output()
        act_on_failure(error)
    finally:
        backstop.cancel()
        leave("", code)


def flush_output() -> None:
    """Write what was printed: `leave` ends the process without Python's cleanup, and a file or pipe would lack it."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()


def tell(message: str) -> None:
    """Print a message to stderr, without secrets and with escapes for what would move the cursor."""
    with contextlib.suppress(OSError, ValueError):
        print(one_message(redact(message)), file=sys.stderr, flush=True)  # names of classes may hold escapes
