"""Text of users on one line of a terminal, a picture or a page: nothing that moves the cursor, columns by display width."""

import json
import os
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size

from lib.errors import is_hidden, printable


def speaks() -> bool:
    """Whether this process prints what is printed once for all processes: that of rank 0."""
    return os.environ.get("RANK", "0") == "0"


def json_line(value: Any) -> str:
    """`value` as JSON on one line, for screens too: what `printable` escapes is `\\u001b`, which readers of JSON undo."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    if text.isprintable():
        return text
    return "".join(json.dumps(c)[1:-1] if is_hidden(c) else c for c in text)


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
