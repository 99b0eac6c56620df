"""Text of users on one line: nothing that moves the cursor, columns as a terminal shows them."""

import pytest
from rich.cells import cell_len

from lib.runtime.screen import align, list_some, printable, shorten


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc\rd", r"a\tb\nc\rd"),
        ("\x1b[31mred\x9b", r"\x1b[31mred\x9b"),
        ("a\u202eb\u2028c\u2029\ufeff", r"a\u202eb\u2028c\u2029\ufeff"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
        *(
            (text, text)
            for text in (
                "正面",
                "👍🏽",
                "👨\u200d👩\u200d👧",
                "ไม่ดี",
                "می\u200cخواهم",
                "a b",
                "größer",
                "全\u3000角",
                "",
            )
        ),
    ],
)
def test_what_moves_the_cursor_is_escaped_and_every_script_is_kept(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("text", ["short", "正面负面正面负面正面", "x" * 50, "a\tb" * 9, "👍" * 20, "e\u0301" * 40])
def test_shortened_text_fits_and_short_text_is_whole(text: str) -> None:
    assert cell_len(shorten(text, 11)) <= 11
    assert shorten(text, 1000) == printable(text)


def test_aligned_text_has_the_wanted_width_on_either_side() -> None:
    assert (align("正", 4), align("正", 4, left=True)) == ("  正", "正  ")


def test_list_says_how_many_items_are_left_out() -> None:
    assert list_some(["a", "b"], 2) == "a, b"
    assert list_some(list("abcd" * 1000), 2) == "a, b, … and 3,998 more"
