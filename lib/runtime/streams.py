"""Standard output and standard error that end no run: a closed pipe, a full disk, a dead terminal, a poor encoding.

Imports nothing heavy: scripts call `keep_writing` before anything else.
"""

import codecs
import contextlib
import errno
import io
import os
import select
import sys
from typing import Any, TextIO

from lib.errors import UserError
from lib.runtime.signals import leave

EXIT_PIPE = 128 + 13
"""Exit code of a process that SIGPIPE ended, as a shell reports it."""


def keep_writing(only_prints: bool = False) -> None:
    """From here on, writing to the standard streams raises no error, and characters that they lack are escaped.

    What cannot be written is left out, which is said once on the other stream. See `Stream.only_prints` for a script that
    does nothing but print.
    """
    Stream.only_prints = only_prints
    codecs.register_error("escape", escape)
    for number in (0, 1, 2):  # a stream that is closed: else the next file takes its number, and gets what is printed
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, sys.stderr = wrap(1, sys.stdout), wrap(2, sys.stderr)


def wrap(number: int, stream: Any) -> TextIO:
    """The stream of a file descriptor, in the encoding and with the buffering of `stream`, None if it was closed."""
    encoding = stream.encoding if stream else "utf-8"
    by_line = number == 2 or bool(stream and (stream.line_buffering or stream.write_through))
    return io.TextIOWrapper(io.BufferedWriter(Stream(number)), encoding, "escape", line_buffering=by_line)


def escape(error: UnicodeError) -> tuple[str, int]:
    """Write characters that an encoding lacks as `\\u4e2d`, as JSON and Python read them: printed JSON stays JSON."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{text[place : place + 4]}" for place in range(0, len(text), 4)), error.end


class Stream(io.FileIO):
    """The bytes of a standard stream; see `keep_writing`."""

    only_prints = False
    """What is printed is all that the script does: it ends without a word when the reader of its pipe has left, as Unix
    tools do, and where standard output fails otherwise, writing raises UserError."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self.number, self.failed = number, False

    def write(self, data: Any) -> int:
        try:
            while (count := super().write(data)) is None:  # a terminal that does not block, and is full
                select.select([], [self], [])
        except OSError as error:
            if not self.failed:
                self.failed = True
                self.act_on(error)
            return len(data)
        return count

    def act_on(self, error: OSError) -> None:
        name, other = {1: ("output", 2), 2: ("error", 1)}[self.number]
        if not self.only_prints:
            message = f"warning: standard {name} cannot be written, and is left out: {error.strerror}\n"
            with contextlib.suppress(OSError):
                os.write(other, message.encode())  # not by `print`, which may be what called this
        elif self.number == 1:
            if error.errno == errno.EPIPE:
                leave("", EXIT_PIPE)
            raise UserError(f"standard output cannot be written: {error.strerror}")
