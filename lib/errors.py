"""A mistake of the user, told in the user's words; secrets are left out of all text."""

import re

SECRET = re.compile(r"\bhf_[A-Za-z0-9]{20,}|(?<=://)[^/@\s:]*:[^/@\s]+(?=@)")
"""Tokens of the Hub, and `user:password` of an address."""


class UserError(Exception):
    """A mistake the user can mend; the message names the flag or file, what was found and what to type instead."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def redact(text: str) -> str:
    """`text` without tokens and passwords."""
    return SECRET.sub("***", text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message without secrets; the name of its type where the message is empty."""
    lines = str(error).strip().splitlines()
    return redact(lines[0]) if lines else type(error).__name__
