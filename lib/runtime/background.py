"""Work beside the run, in a thread of its own."""

import threading
from collections.abc import Callable

import torch
from accelerate import Accelerator

from lib.runtime.processes import lowest_of_each
from lib.runtime.watchdog import beat, watching_thread

POLL_SECONDS = 1.0
"""How often processes ask each other whether their work is done."""


class Background:
    """One piece of work at a time; the watchdog looks after its progress, and its error waits until it is taken."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def start(self, work: Callable[[], None], phase: str) -> None:
        """Begin `work`, which calls `beat` now and then; what was begun before must have ended."""
        device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None

        def run() -> None:
            try:
                if device is not None:  # a new thread would begin with the first one
                    torch.accelerator.set_device_index(device)
                with watching_thread(phase):
                    work()
            except BaseException as error:
                self.error = error

        # Not a daemon: a program that ends without waiting for it is not to cut its work short.
        self.thread = threading.Thread(target=run, name=phase)
        self.thread.start()

    def is_busy(self, seconds: float = 0.0) -> bool:
        """Whether the work still goes on; it is waited for up to so many seconds."""
        if self.thread is None:
            return False
        self.thread.join(seconds)
        return self.thread.is_alive()

    def take_error(self) -> BaseException | None:
        """What the work ended with if that was an error; told once."""
        error, self.error = self.error, None
        return error


def wait_everywhere(accelerator: Accelerator, background: Background, phase: str) -> None:
    """Wait until the work of all processes has ended, or that of one has failed; every process must call this.

    Work that fails alone may leave that of others waiting for it: they end with their connection to that process.
    """
    while True:
        busy, failed = background.is_busy(POLL_SECONDS), background.error is not None
        done, well = lowest_of_each(accelerator, [int(not busy), int(not failed)])
        if done or not well:
            return
        beat(phase)
