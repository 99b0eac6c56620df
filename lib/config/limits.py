"""What values an option takes, declared beside it: numbers within limits, names that a file can have."""

import dataclasses
import math
import os
import typing
from typing import Any

from lib.errors import UserError, require

FLOAT32_TINY = 2.0**-126
"""Smaller numbers are 0 where weights are computed."""


@dataclasses.dataclass(frozen=True)
class Within:
    """An interval of numbers, such as `(0, 1]`: 0 is not allowed, 1 is."""

    interval: str

    def check(self, flag: str, value: float) -> None:
        """Raise UserError unless the number lies in the interval, and is not too small for float32."""
        low, high = (float(end) for end in self.interval[1:-1].split(","))
        above = value > low or (value == low and self.interval[0] == "[")
        below = value < high or (value == high and self.interval[-1] == "]")
        got = f"got {shorten(value)}"
        if high > 100 and not above and low in (0, 1):
            raise UserError(f"{flag} must {'not be negative' if self.interval[:2] == '[0' else 'be above 0'}, {got}")
        if high > 100 and not below:
            raise UserError(f"{flag} must be at most {high:,.0f}, {got}")
        require(above and below, f"{flag} must lie in {self.interval}, {got}")
        lost = isinstance(value, float) and 0 < abs(value) < FLOAT32_TINY
        require(not lost, f"{flag} must not be so small, {got}: in float32 it is 0")


@dataclasses.dataclass(frozen=True)
class FileName:
    """A name or, with `is_path`, a path: not empty, and no part of it longer than `limit` bytes."""

    limit: int = 255
    is_path: bool = False

    def check(self, flag: str, value: str) -> None:
        """Raise UserError unless a file can have this name."""
        require(bool(value.strip()), f"{flag}: the name is empty; leave the option out, or give a name")
        require("\0" not in value, f"{flag} {value!r}: a name cannot contain the character of number 0")
        longest = max((len(os.fsencode(part)) for part in value.split("/")), default=0)
        fits = longest <= self.limit and len(os.fsencode(value)) < 4000
        require(
            fits,
            f"{flag} {shorten(value)}: {longest} bytes are too long for the name of a file; use {self.limit} at most",
        )


COUNT = Within("[1, 2147483647]")
"""A number of things that there is at least one of."""
NUMBER = Within("[0, 2147483647]")
"""A number of things that there may be none of."""
WORKERS = Within("[1, 512]")
SEED = Within("[0, 4294967295]")
"""Seeds of NumPy."""
INPUT_NAME = FileName()
INPUT_PATH = FileName(is_path=True)
"""A file or folder, or a name that stands for one."""
OUTPUT_NAME = FileName(200)
"""A name that other names are made of, such as those of unfinished files."""
OUTPUT_PATH = FileName(200, is_path=True)


def expand_home(flag: str, path: str) -> str:
    """`path` with the home folder for a leading ~ or ~user, as shells write it where they see it.

    Raises UserError where there is no such user, and no file of this name.
    """
    found = os.path.expanduser(path)
    known = not found.startswith("~") or os.path.lexists(path)
    user = path.partition("/")[0]
    require(
        known,
        f"{flag} {shorten(path)}: there is no user {user[1:]}; a file or folder of that name is ./{shorten(path)}",
    )
    return found


def check_values(config: Any) -> None:
    """Raise UserError for the first option of a section whose value is not what is declared beside it."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for limit in getattr(field.type, "__metadata__", ()):
            if isinstance(limit, Within | FileName) and value is not None and not isinstance(value, tuple):
                limit.check(f"--{field.name}", value)


def check_steps(flag: str, steps: float | None) -> None:
    """Raise UserError unless `steps` is a whole number, or a share of all steps below 1."""
    whole = steps is None or steps < 1 or steps == int(steps)
    require(whole, f"{flag} takes a whole number of steps, or a share below 1, got {steps}")


def check_settings(flag: str, items: tuple[str, ...]) -> None:
    """Raise UserError unless each item is `name=value`, and a value that is a number is finite."""
    for item in items:
        name, found, text = item.partition("=")
        require(bool(name.strip()) and bool(found), f"{flag} takes name=value, got {shorten(item)!r}")
        try:
            number = float(text)
        except ValueError:
            continue
        require(math.isfinite(number), f"{flag} {name}={shorten(text)}: expected a finite number")
        tiny = 0 < abs(number) < FLOAT32_TINY
        require(abs(number) < 2**127 and not tiny, f"{flag} {name}={shorten(text)}: the number is out of range")


def check_thresholds(items: tuple[str, ...]) -> None:
    """Raise UserError unless --threshold has numbers from 0 to 1: one at most for all labels, or label=number."""
    for item in items:
        name, named, text = item.rpartition("=")
        try:
            inside = 0 <= float(text) <= 1 and bool(name or not named)
        except ValueError:
            inside = False
        require(inside, f"--threshold takes a number from 0 to 1, or label=number, got {shorten(item)!r}")
    alone = [item for item in items if "=" not in item]
    require(len(alone) < 2, f"--threshold takes one number for all labels, got {shorten(' '.join(alone))}")


def shorten(value: Any) -> str:
    """`value` as text of at most 80 characters."""
    text = str(value) if not isinstance(value, int) or abs(value) < 10**80 else "a number of more than 80 digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def strip_annotations(kind: Any) -> tuple[Any, bool]:
    """The type of an option without what is declared beside it, and whether the option may be None."""
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    parts = typing.get_args(kind)
    if type(None) not in parts:
        return kind, False
    plain = [part for part in parts if part is not type(None)]
    return (plain[0] if len(plain) == 1 else kind), True
