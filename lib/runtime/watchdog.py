"""A process that makes no progress is named, with what it was doing, and the run ends instead of waiting for ever."""

import contextlib
import faulthandler
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path


class Beat:
    """When this process last said what it does."""

    def __init__(self) -> None:
        self.phase, self.time = "start", time.monotonic()


BEAT = Beat()


def beat(phase: str) -> None:
    """Say what this process does next; costs no more than two assignments."""
    BEAT.phase, BEAT.time = phase, time.monotonic()


@contextlib.contextmanager
def watching(folder: Path, rank: int, timeout: float) -> Iterator[None]:
    """Within, a process that says nothing for `timeout` seconds ends with code 1, all stacks and the word of every process.

    Processes leave their last word in `folder`, one small file each, a few times per time-out.
    """
    if rank == 0:  # words of a run that was killed
        shutil.rmtree(folder, ignore_errors=True)
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
    last = time.monotonic()
    leave_word(folder, rank)
    while not done.wait(period(timeout)):
        now = time.monotonic()
        # After a pause of the whole process, such as Ctrl-Z, nobody is to blame.
        BEAT.time += max(0.0, now - last - 2 * period(timeout))
        last = now
        leave_word(folder, rank)
        if now - BEAT.time > timeout:
            report(folder, rank, timeout)
            os._exit(1)


def period(timeout: float) -> float:
    """Seconds between two looks: a process that left no word for some of them is not running."""
    return min(5.0, timeout / 8)


def leave_word(folder: Path, rank: int) -> None:
    word = {"phase": BEAT.phase, "since": time.time() - (time.monotonic() - BEAT.time), "seen": time.time()}
    word |= {"host": socket.gethostname(), "pid": os.getpid()}
    with contextlib.suppress(OSError):
        (folder / f".{rank}").write_text(json.dumps(word))
        os.replace(folder / f".{rank}", folder / str(rank))


def report(folder: Path, rank: int, timeout: float) -> None:
    """Print the last word of every process and the stacks of this one."""
    lines = [f"error: process {rank} made no progress for {timeout:g} s (--ddp_timeout); the last word of each:"]
    for path in sorted(folder.glob("[0-9]*")):
        with contextlib.suppress(OSError, ValueError):
            word, now = json.loads(path.read_text()), time.time()
            state = "frozen or dead" if now - word["seen"] > 2 + 3 * period(timeout) else "alive"
            place = f"{word['host']} pid {word['pid']}"
            lines.append(f"  process {path.name} ({place}): {word['phase']}, {now - word['since']:.0f} s ago, {state}")
    print("\n".join(lines), file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
