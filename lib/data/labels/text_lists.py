"""Lists of labels written as text, as csv files hold them: "['joy', 'fear']", "[1, 0, 0]", "2,5" or "joy|fear"."""

import ast
import json
import re
from collections.abc import Collection
from typing import Any

from lib.data.labels.numerals import INTEGER, NUMBER, are_integers

SEPARATORS = ("|", ";", "；", ",", "，", "、")
"""What stands between labels, the most telling first: names may hold a comma, but hardly a bar."""

BRACKETS = {"[": "]", "(": ")", "{": "}"}
QUOTED = re.compile(r"""\s*('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\s*(,|(?=['"])|$)""", re.DOTALL)
CONSTANTS = {"true": True, "false": False, "none": None, "null": None, "nan": None}


def read_list(text: str) -> list[Any] | None:
    """The items of a list in brackets, as JSON, Python or NumPy write it; None where the text is none.

    Quoted items are text. Others are numbers, true and false where they look like it, else text.
    """
    text = text.strip()
    if text == "set()":
        return []
    if len(text) < 2 or BRACKETS.get(text[0]) != text[-1]:
        return None
    try:
        items = json.loads(text)
        return items if isinstance(items, list) else None
    except (ValueError, RecursionError):
        pass
    inner = text[1:-1].strip()
    if inner[:1] in ("'", '"'):
        return read_quoted(inner)
    words = inner.split(",") if "," in inner else inner.split() if are_numbers(inner.split()) else [inner]
    words = [word.strip() for word in words]
    if words and words[-1] == "":
        words.pop()
    if not all(words) or any(mark in inner for mark in "[](){}'\":"):
        return None
    return [read_item(word) for word in words]


def read_quoted(inner: str) -> list[str] | None:
    """The items between brackets where each is quoted; commas may be missing, as in a printed array."""
    items, place = list[str](), 0
    while place < len(inner):
        found = QUOTED.match(inner, place)
        if found is None:
            return None
        try:
            items.append(ast.literal_eval(found[1]))
        except (ValueError, SyntaxError):
            return None
        place = found.end()
    return items


def read_item(word: str) -> Any:
    """The number or constant that an unquoted item stands for, else its text."""
    if INTEGER.fullmatch(word):
        return int(word)
    if NUMBER.fullmatch(word) and "." in word:
        return float(word)
    return CONSTANTS.get(word.lower(), word)


def are_numbers(words: list[str]) -> bool:
    return all(NUMBER.fullmatch(word) for word in words)


def is_written_list(text: str) -> bool:
    """Whether a text is a list beyond doubt: empty, of quoted items or numbers, or of several words. [spam] may be a name."""
    items = read_list(text)
    if items is None:
        return False
    return len(items) != 1 or not isinstance(items[0], str) or any(mark in text for mark in "'\"")


def is_broken_list(text: str) -> bool:
    """Whether a text begins as a list but is none."""
    return re.match(r"""\s*([\[{]|\(\s*['"])""", text) is not None and read_list(text) is None


def split_at(text: str, separator: str) -> list[str]:
    """The labels between separators, without the spaces around them; nothing between two separators is no label."""
    return [piece for piece in map(str.strip, text.split(separator)) if piece]


def find_separator(texts: Collection[str], names: Collection[str] = ()) -> str | None:
    """What the labels of a column are split at: what leaves known `names` only, else the first one that occurs."""
    if names and set(texts) <= set(names):
        return None
    found = [separator for separator in SEPARATORS if any(separator in text for text in texts)]
    known = set(names)
    fitting = [mark for mark in found if all(piece in known for text in texts for piece in split_at(text, mark))]
    return next(iter(fitting or found), None)


def suspected_separator(texts: Collection[str]) -> str | None:
    """The separator of labels that may be several in one; None where they look like one each.

    They do where half of them hold a bar or semicolon, where the pieces are numbers, and where the pieces come in more
    combinations than there are pieces. "Sci-Fi, Fantasy" beside "Drama" is one name, since its pieces occur nowhere else.
    """
    for separator in SEPARATORS:
        pieces = [split_at(text, separator) for text in texts]
        different = {piece for some in pieces for piece in some}
        several = sum(len(some) > 1 for some in pieces)
        telling = separator in "|;；" and 2 * several >= len(texts)
        combined = len(different) < len(texts) or several == len(texts) == len(different) > 1
        if several and (telling or combined or are_integers(different)):
            return separator
    return None
