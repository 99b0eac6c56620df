"""Signals and the time limit end a run well: all processes agree, save, and leave with a code that says `resume me`.

Light on imports: signals are watched before the heavy ones.
"""

import contextlib
import ctypes
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

EXIT_RESUME = 75
"""Exit code of a run that was stopped and goes on when started again (EX_TEMPFAIL of sysexits.h)."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO_SECONDS = 1.0
"""A launcher forwards what its whole process group got already: within this time a second signal is the first one again."""


class Stopped(Exception):
    """Raised on every process at the same place once one of them was asked to stop."""


class Request:
    """What this process was asked, and whether it must be put off: signals belong to the process, and so does this."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.deadline = math.inf
        self.reason = ""
        self.deferred = False


REQUEST = Request()


def watch_signals() -> None:
    """From now on SIGTERM, SIGINT and SIGUSR1 ask the run to stop; while nothing is deferred they end it at once.

    A thread reads them, since Python runs handlers only between bytecodes, and not while a process waits for others.
    SIGUSR1 is what Slurm sends before the time is up, and what this process gets when its launcher dies.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # A forked process would write its own signals into the pipe of this one.
    os.register_at_fork(after_in_child=forget_signals)
    threading.Thread(target=listen, args=(reader,), daemon=True, name="signals").start()
    follow_launcher()


def forget_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def listen(reader: int) -> None:
    """Read signals for ever: the first one asks, the second one ends the process."""
    first = math.inf
    while True:
        for number in os.read(reader, 64):
            if number not in SIGNALS:
                continue  # a loader's worker has ended
            name, now = signal.Signals(number).name, time.monotonic()
            if not REQUEST.deferred:
                leave(f"{name}: stopped", EXIT_RESUME)
            elif first == math.inf:
                first, REQUEST.reason = now, name
                say(f"{name}: saving after this step; the same signal again ends the process at once")
            elif number != signal.SIGUSR1 and now - first > ECHO_SECONDS:
                leave(f"{name}: stopped without saving", 128 + number)


def follow_launcher() -> None:
    """Get SIGUSR1 when the launcher that started this process dies, instead of running on without it."""
    import psutil

    parent = psutil.Process().parent()
    with contextlib.suppress(psutil.Error):
        words = " ".join(parent.cmdline()) if parent else ""
        if sys.platform == "linux" and any(name in words for name in ("accelerate", "torchrun", "torch.distributed")):
            end_with_parent(signal.SIGUSR1)


def end_with_parent(number: int) -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def quiet_worker(_: int) -> None:
    """In a process that loads batches: leave signals to the process that it serves, and end with it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        end_with_parent(signal.SIGKILL)


@contextlib.contextmanager
def deferring_signals(max_minutes: float | None = None) -> Iterator[None]:
    """Within, a signal or the time limit (counted from the start of the process) is noted until `check_stop` asks."""
    REQUEST.deadline = REQUEST.started + 60 * max_minutes if max_minutes else math.inf
    REQUEST.deferred = True
    try:
        yield
    finally:
        REQUEST.deferred, REQUEST.deadline = False, math.inf
    if REQUEST.reason:
        leave(f"{REQUEST.reason}: stopped", EXIT_RESUME)


def check_stop(any_process: Callable[[bool], bool]) -> None:
    """Raise Stopped on all processes when one was asked to stop or is out of time; all must call this at the same place."""
    if not REQUEST.reason and time.monotonic() > REQUEST.deadline:
        REQUEST.reason = "--max_minutes"
    if any_process(bool(REQUEST.reason)):
        raise Stopped(REQUEST.reason or "another process was asked to stop")


def leave(message: str, code: int) -> None:
    """End this process and the ones it started, now."""
    import psutil

    say(message)
    wanted = {child.pid for child in multiprocessing.active_children()}
    for child in psutil.Process().children(recursive=True):
        # The tracker's service ends by itself and first writes what it was given.
        with contextlib.suppress(psutil.Error):
            if child.pid in wanted or "wandb" not in " ".join(child.cmdline()):
                child.kill()
    os._exit(code)


def say(message: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode())
