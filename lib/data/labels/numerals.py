"""Numbers written as text: which are plain, whether a column writes them alike, and their values."""

import re
from collections.abc import Collection

INTEGER = re.compile(r"0|-?[1-9][0-9]*")
"""A whole number as it is usually written. 007, +1 and 1_000 are codes, not numbers."""

WHOLE = re.compile(r"(-?[0-9]+)\.0+")
"""A whole number with decimals, such as 1.0."""

PLAIN = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-][0-9]+)?")
"""A real number as programs write it: no leading zeros, no plus, and a sign in the exponent."""

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
"""A real number however it is written."""


def are_integers(texts: Collection[str]) -> bool:
    return all(INTEGER.fullmatch(text) for text in texts)


def are_plain(texts: Collection[str]) -> bool:
    return all(PLAIN.fullmatch(text) for text in texts)


def have_fractions(texts: Collection[str]) -> bool:
    return any(not float(text).is_integer() for text in texts)


def have_equal_decimals(texts: Collection[str]) -> bool:
    """Whether plain numbers have no exponent and the same number of digits after the point."""
    return len({len(text.partition(".")[2]) for text in texts}) == 1 and not any("e" in text.lower() for text in texts)


def are_written_alike(texts: Collection[str]) -> bool:
    """Whether plain numbers follow one rule: equal decimals, none that end with 0, or whole numbers with .0 as in Python.

    1.1 and 1.10 follow none: they are names of sections rather than numbers.
    """
    if have_equal_decimals(texts):
        return True
    mantissas = [re.split("[eE]", text)[0] for text in texts]
    decimals = [mantissa.partition(".")[2] for mantissa in mantissas]
    shortest = [not places.endswith("0") for places in decimals]
    pointed = all(places or mantissa != text for places, mantissa, text in zip(decimals, mantissas, texts, strict=True))
    return all(shortest) or (
        pointed and all(short or places == "0" for short, places in zip(shortest, decimals, strict=True))
    )


def read_number(text: str) -> float | None:
    """The value of a number, spaces around it left out; None where the text is none."""
    return float(text) if NUMBER.fullmatch(text.strip(" ")) else None
