"""A watchdog: a process that hangs ends the run with its stacks and the last phase of every process."""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from lib.runtime.signals import leave

REPORT_SECONDS = 10.0
"""How long writing the report may take."""


class Heartbeat:
    """What goes on, and since when."""

    def __init__(self, phase: str) -> None:
        self.begin(phase)

    def begin(self, phase: str, waits: bool = False) -> None:
        """With `waits` it lasts as long as other processes take, whose own heartbeats count."""
        self.phase, self.time = phase, time.monotonic()
        self.waits = waits  # last: the time of what begins is there when it counts again


HEARTBEAT = Heartbeat("start")
"""That of this process: its main thread, and all others that are not watched by themselves."""
BESIDE: dict[int, Heartbeat] = {}
"""Those of threads that are, by the identity of the thread."""


def beat(phase: str = "") -> None:
    """Note progress: this process, or this thread if it is watched by itself, begins `phase`. Costs next to nothing.

    Without a name it goes on with the phase it is in.
    """
    heart = BESIDE.get(threading.get_ident(), HEARTBEAT)
    heart.begin(phase or heart.phase)


@contextlib.contextmanager
def watching_thread(phase: str) -> Iterator[None]:
    """Within, this thread is watched by itself: it must `beat` as well, and what it beats says nothing of the others."""
    own = threading.get_ident()
    BESIDE[own] = Heartbeat(phase)
    try:
        yield
    finally:
        del BESIDE[own]


@contextlib.contextmanager
def waiting_for_others() -> Iterator[None]:
    """Within, a thread in `watching_thread` waits for other processes, however long they make progress.

    A main thread that waits still counts: so a process is noticed whose watchdog is frozen with it.
    """
    heart = BESIDE.get(threading.get_ident())
    if heart is None:
        yield
        return
    before = heart.phase
    heart.begin(f"{before}, waiting for other processes", waits=True)
    try:
        yield
    finally:
        heart.begin(before)


@contextlib.contextmanager
def watching(folder: Path, rank: int, timeout: float) -> Iterator[None]:
    """Within, a process that does not call `beat` for `timeout` seconds prints its stacks and ends with code 1.

    So does one that has a thread in `watching_thread` which does not. It also prints the last phase of every process: each
    writes its own to a small file in `folder`, several times per timeout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = threading.Event()
    beat("start of training")
    thread = threading.Thread(target=watch, args=(folder, rank, timeout, done), daemon=True, name="watchdog")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(OSError):
            (folder / str(rank)).unlink(missing_ok=True)
            folder.rmdir()


def watch(folder: Path, rank: int, timeout: float, done: threading.Event) -> None:
    """Write the phase of this process until `done`; end it with a report if it makes no progress for `timeout` seconds."""
    last = time.monotonic()
    write_phase(folder, rank)
    while not done.wait(period(timeout)):
        now = time.monotonic()
        hearts = [HEARTBEAT, *list(BESIDE.values())]
        pause = now - last - 2 * period(timeout)
        for heart in hearts if pause > 0 else ():  # of the whole process, such as Ctrl-Z: it does not count
            heart.time += pause  # seldom: a beat at the same moment would be lost
        last = now
        write_phase(folder, rank)
        if any(now - heart.time > timeout and not heart.waits for heart in hearts):
            # In a thread: the stream may be what hangs, such as a pipe that nobody reads.
            reporting = threading.Thread(target=report, args=(folder, rank, timeout), daemon=True)
            reporting.start()
            reporting.join(REPORT_SECONDS)
            leave("", 1)


def period(timeout: float) -> float:
    """Seconds between two checks, which write the file of the process each time."""
    return min(5.0, timeout / 8)


def write_phase(folder: Path, rank: int) -> None:
    """Write the phase of this process for the report of another one; an error of the disk does not stop the run."""
    ahead = time.time() - time.monotonic()
    entry = {"phase": HEARTBEAT.phase, "since": HEARTBEAT.time + ahead, "seen": time.time()}
    entry |= {"beside": [[heart.phase, heart.time + ahead] for heart in list(BESIDE.values())]}
    entry |= {"host": socket.gethostname(), "pid": os.getpid()}
    with contextlib.suppress(OSError):
        (folder / f".{rank}").write_text(json.dumps(entry))
        os.replace(folder / f".{rank}", folder / str(rank))


def report(folder: Path, rank: int, timeout: float) -> None:
    """Print the last phase of every process and the stacks of this one."""
    lines = [f"error: process {rank} made no progress for {timeout:g} s (--ddp_timeout); last phase of each process:"]
    for path in sorted(folder.glob("[0-9]*")):
        with contextlib.suppress(OSError, ValueError):
            entry, now = json.loads(path.read_text()), time.time()
            state = "frozen or dead" if now - entry["seen"] > 2 + 3 * period(timeout) else "alive"
            place = f"{entry['host']} pid {entry['pid']}"
            phases = [(entry["phase"], entry["since"]), *entry["beside"]]
            shown = "; beside it ".join(f"{phase}, {now - since:.0f} s ago" for phase, since in phases)
            lines.append(f"  process {path.name} ({place}): {shown}, {state}")
    print("\n".join(lines), file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
