"""Mistakes that a user can fix, and text without secrets."""

import re

SECRET = re.compile(r"\bhf_[A-Za-z0-9]{20,}|(?<=://)[^/@\s:]*:[^/@\s]+(?=@)")
"""Hub tokens, and the `user:password` part of a URL."""


class UserError(Exception):
    """A mistake the user can fix: the message names the flag or file, what was found, and what to type instead."""


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def redact(text: str) -> str:
    """`text` without tokens and passwords."""
    return SECRET.sub("***", text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message without secrets; the name of its type where the message is empty."""
    lines = str(error).strip().splitlines()
    return redact(lines[0]) if lines else type(error).__name__
