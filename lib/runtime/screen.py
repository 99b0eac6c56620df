"""Text of users on one line of a terminal, a picture or a page: nothing that moves the cursor, columns by display width."""

import os
import unicodedata
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

JOINERS = "\u200c\u200d"
"""Zero-width characters that belong to words of some scripts and to emoji."""


def speaks() -> bool:
    """Whether this process prints what is printed once for all processes: that of rank 0."""
    return os.environ.get("RANK", "0") == "0"


def printable(text: str) -> str:
    """`text` with escapes for tabs, line breaks, control and direction characters, as Python writes them: `\\t`, `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(escaped(character) for character in text)


def escaped(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in JOINERS
    return character.encode("unicode_escape").decode() if hidden else character


def shorten(text: str, limit: int) -> str:
    """`text` as `printable` writes it, on at most `limit` columns of a terminal; what is cut ends with an ellipsis."""
    text = printable(text)
    return text if cell_len(text) <= limit else set_cell_size(text, limit - 1).rstrip() + "…"


def align(text: str, width: int, left: bool = False) -> str:
    """`text` filled with spaces to `width` columns of a terminal, where a Chinese character takes two."""
    space = " " * (width - cell_len(text))
    return text + space if left else space + text


def list_some(items: Sequence[str], limit: int) -> str:
    """The first `limit` items, separated by commas, and how many there are besides."""
    more = f", … and {len(items) - limit:,} more" if len(items) > limit else ""
    return f"{', '.join(items[:limit])}{more}"
