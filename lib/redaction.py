"""Tokens and passwords, found in text and left out of it."""

import re

SECRET = re.compile(r"\bhf_[A-Za-z0-9]{20,}|(?<=://)[^/@\s:]*:[^/@\s]+(?=@)")
"""Tokens of the Hub, and `user:password` of an address."""


def redact(text: str) -> str:
    """`text` without tokens and passwords."""
    return SECRET.sub("***", text)
