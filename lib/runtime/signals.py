"""Signals and the time limit stop a run so that it can resume: all processes agree, save, and exit with code 75.

Imports nothing heavy: signals are handled before the heavy imports.
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
from pathlib import Path
from typing import NoReturn

from lib.runtime.launcher import find_launcher

EXIT_RESUME = 75
"""Exit code of a run that was stopped and resumes when started again (EX_TEMPFAIL of sysexits.h)."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""What asks a run to stop: a person or a scheduler, a terminal that is gone, the limits of Slurm, SGE and LSF."""
URGENT = (signal.SIGTERM, signal.SIGINT)
"""What a person sends again who will not wait; the others are sent again by the system."""
ECHO_SECONDS = 1.0
"""A launcher forwards signals that its process group got already: the same one within this time is the first one again."""
HEAD_START = 0.5
"""Seconds that a process has to print why it failed, before the next one of the same machine may."""


LAUNCHER = find_launcher()
"""Looked for at the import: it may die while this process starts."""


class Stopped(Exception):
    """Raised on every process at the same place after one of them was asked to stop."""

    outcome = "saved; the same command goes on from here"
    """What the user has now."""


class Request:
    """Whether this process was asked to stop, and why; whether it must save first. One per process, as signals are."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.deadline = math.inf
        self.reason = ""
        self.deferred = False
        self.ending = False
        """The process ends by itself after a failure; a launcher that asks for it need not."""
        self.asked = False
        """A launcher asked for it all the same."""


REQUEST = Request()


def watch_signals() -> None:
    """Handle SIGNALS: they ask the run to stop within `deferring_signals`, elsewhere they end the process.

    A thread reads them from a pipe, since Python runs handlers only between bytecodes, hence not while a process waits for
    others. SIGHUP stays ignored where it is at the start, as under nohup. This process gets SIGUSR1 when its launcher dies.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # A forked process would write its signals into the pipe of this one.
    os.register_at_fork(after_in_child=forget_signals)
    threading.Thread(target=listen, args=(reader,), daemon=True, name="signals").start()
    follow_launcher()


def forget_signals() -> None:
    """Restore the default handlers, in a forked process; what is ignored stays so."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def listen(reader: int) -> None:
    """Read signals from the pipe: the first one asks the run to stop, the same one of URGENT again ends the process."""
    first: dict[int, float] = {}
    while True:
        for number in os.read(reader, 64):
            if number not in SIGNALS:
                continue  # such as SIGCHLD: a worker of a data loader has ended
            if REQUEST.ending and number != signal.SIGINT:
                REQUEST.asked = True
                continue
            name, now = signal.Signals(number).name, time.monotonic()
            if not REQUEST.deferred:
                leave(f"{name}: stopped", EXIT_RESUME)
            elif not first:
                REQUEST.reason = name
                again = "; the same signal again ends the process at once" if number in URGENT else ""
                say(f"{name}: saving after this step{again}")
            elif number in URGENT and now - first.get(number, now) > ECHO_SECONDS:
                leave(f"{name}: stopped without saving", 128 + number)
            first.setdefault(number, now)


def follow_launcher() -> None:
    """Have the system send SIGUSR1 to this process when its launcher dies; else it would run on without it.

    Only its launcher: a process that a shell or a script started goes on when that ends.
    """
    if LAUNCHER is not None and LAUNCHER.is_parent:
        end_with_parent(signal.SIGUSR1, LAUNCHER.pid)


def end_with_parent(number: int, parent: int) -> None:
    """Have Linux send signal `number` to this process when its parent, process `parent`, dies or has died already."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def quiet_worker(_: int) -> None:
    """In a worker of a data loader: ignore signals, which the training process handles, and end with that process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_as_worker()


def end_as_worker() -> None:
    """In a worker of a pool or a data loader: end with the process that started it, however that ends."""
    parent = multiprocessing.parent_process()
    if sys.platform == "linux" and parent is not None and parent.pid is not None:
        end_with_parent(signal.SIGKILL, parent.pid)


@contextlib.contextmanager
def deferring_signals(max_minutes: float | None = None) -> Iterator[None]:
    """Within, a signal or the time limit (counted from `REQUEST.started`) takes effect at the next `check_stop`."""
    REQUEST.deadline = REQUEST.started + 60 * max_minutes if max_minutes else math.inf
    REQUEST.deferred = True
    try:
        yield
    finally:
        REQUEST.deferred, REQUEST.deadline = False, math.inf
    if REQUEST.reason:
        leave(f"{REQUEST.reason}: stopped", EXIT_RESUME)


def check_stop(any_process: Callable[[bool], bool]) -> None:
    """Raise Stopped on every process if one was asked to stop or is out of time; all must call this at the same place."""
    if not REQUEST.reason and time.monotonic() > REQUEST.deadline:
        REQUEST.reason = "--max_minutes"
    if any_process(bool(REQUEST.reason)):
        raise Stopped(REQUEST.reason or "another process was asked to stop")


def leave(message: str, code: int) -> NoReturn:
    """End this process at once, and the processes it started; nothing that goes wrong meanwhile prevents its end."""
    try:
        if message:
            say(message)
        end_children()
    finally:
        # Without cleanup, which waits: for workers of a data loader, and for processes that wait for this one.
        os._exit(code)


def end_children() -> None:
    """End the processes that this one started, but for W&B's service: it writes what it was given, then ends by itself."""
    import psutil

    with contextlib.suppress(ValueError):  # not in the main thread, which alone runs handlers
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's raises an error when a worker of a data loader ends
    wanted = {child.pid for child in multiprocessing.active_children()}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.pid in wanted or not is_wandb(child.cmdline()):
                child.kill()


def is_wandb(command: list[str]) -> bool:
    """Whether a command runs a program of W&B's package, such as its service, or a module of it."""
    program = Path(command[0]) if command else Path()
    module = command[command.index("-m") + 1 :][:1] if "-m" in command else []
    return program.parts[-3:-1] == ("wandb", "bin") or (bool(module) and module[0].split(".")[0] == "wandb")


def is_first_to_fail(patience: float = 0.0) -> bool:
    """Whether no process of this machine failed before this one did, so that this one is to print why.

    Launched processes often fail alike. A launcher ends all when one has ended: each waits half a second longer than the
    one before it, and `patience` in seconds besides. Of failures on one process alone nothing is lost.
    """
    REQUEST.ending, REQUEST.asked = True, bool(patience and REQUEST.reason)
    deadline = time.monotonic() + HEAD_START * int(os.environ.get("LOCAL_RANK", "0")) + patience
    while not REQUEST.asked and time.monotonic() < deadline:
        time.sleep(0.02)
    return not REQUEST.asked


def say(message: str) -> None:
    """Write a line to stderr, without Python's buffers, whose locks the main thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode())
