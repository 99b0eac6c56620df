"""Work beside the run, in a thread of its own."""

import threading
from collections.abc import Callable

from lib.runtime.watchdog import watching_thread


class Background:
    """One piece of work at a time; the watchdog looks after its progress, and its error waits until it is taken."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def start(self, work: Callable[[], None], phase: str) -> None:
        """Begin `work`, which calls `beat` now and then; what was begun before must have ended."""

        def run() -> None:
            try:
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
