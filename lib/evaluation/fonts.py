"""Fonts of pictures: installed ones that have the characters of names in any script."""

import contextlib
import os
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from lib.errors import JOINERS

DEFAULT = "DejaVu Sans"
"""Comes with matplotlib."""
AVOIDED = ("mono", "serif", "condensed", "narrow", "black", "light", "thin")
"""Words in names of fonts that are taken last."""


def find_fonts(texts: Iterable[str]) -> tuple[list[str], set[str]]:
    """Families for matplotlib's `font.family` that have the characters of `texts`, and the characters that none has.

    Fonts that were installed after matplotlib wrote its list of fonts are found as well.
    """
    from matplotlib import font_manager

    manager, families = font_manager.fontManager, [DEFAULT]
    missing = {ord(character) for text in texts for character in text if not invisible(character)}
    missing -= characters_of(font_manager.findfont(DEFAULT))
    if missing:
        families += choose(manager.ttflist, missing)
    if missing:
        known = {os.path.realpath(entry.fname) for entry in manager.ttflist}
        before = len(manager.ttflist)
        for path in font_manager.findSystemFonts():
            if os.path.realpath(path) not in known:
                with contextlib.suppress(Exception):  # a damaged file is no font
                    manager.addfont(path)
        families += choose(manager.ttflist[before:], missing)
    return families, set(map(chr, missing))


def drawable(text: str, missing: set[str]) -> str:
    """`text` with ? for the characters that no font has."""
    return "".join("?" if character in missing else character for character in text)


def choose(entries: Iterable[Any], missing: set[int]) -> list[str]:
    """Families that have characters of `missing`, which are taken out of it: the fewest, upright ones of normal weight first."""
    found = []
    for entry in sorted(entries, key=rank):
        if "last resort" in entry.name.lower() or "lastresort" in entry.name.lower():
            continue  # it has a box for every character
        has = characters_of(entry.fname) & missing
        if has:
            found.append((entry, has))
        if has == missing and drawn_by(entry.name, has):
            break
    families = []
    while missing and found:
        entry, has = max(found, key=lambda item: len(item[1] & missing))
        found.remove((entry, has))
        if has & missing and drawn_by(entry.name, has & missing):
            families.append(entry.name)
            missing -= has
    return families


def rank(entry: Any) -> tuple[Any, ...]:
    weight = entry.weight if isinstance(entry.weight, int) else 400
    return entry.style != "normal", abs(weight - 400), any(word in entry.name.lower() for word in AVOIDED), entry.name


def characters_of(path: str) -> set[int]:
    """The code points that a font file has; empty where FreeType cannot read it."""
    from matplotlib.ft2font import FT2Font

    try:
        return set(FT2Font(path).get_charmap())
    except Exception:
        return set()


def drawn_by(family: str, characters: set[int]) -> bool:
    """Whether the file that matplotlib takes for a family has the characters, and outlines for them, not only bitmaps."""
    from matplotlib import font_manager

    try:
        font = font_manager.get_font(font_manager.findfont(family, fallback_to_default=False))
        font.set_size(10, 72)
        for code in characters:
            font.load_char(code)
        return characters <= set(font.get_charmap())
    except Exception:
        return False


def invisible(character: str) -> bool:
    """Whether a character has no glyph of its own: spaces, joiners and variation selectors."""
    return (
        character.isspace() or character in JOINERS or unicodedata.name(character, "").startswith("VARIATION SELECTOR")
    )


@contextlib.contextmanager
def plain_text(families: list[str]) -> Iterator[None]:
    """Within, pictures use these fonts, show text as it is ($ begins no formula), and matplotlib warns of nothing."""
    import logging
    import warnings

    import matplotlib

    logger = logging.getLogger("matplotlib")
    before = logger.level
    context = matplotlib.rc_context({"font.family": families, "text.parse_math": False, "text.usetex": False})
    with context, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="matplotlib")
        warnings.filterwarnings("ignore", message=r"(?s)Glyph \d+|constrained_layout")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(before)
