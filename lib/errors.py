"""Mistakes that a user can fix, and text that may be shown: without secrets, and without signs that move the cursor."""

import contextlib
import logging
import re
import sys
import threading
import traceback
import unicodedata
import warnings
from typing import Any

# The names of options, variables and fields that hold secrets, such as --wandb_api_key.
WORDS = r"(?:api|access|auth|account|private)?(?:key|token|secret|passw(?:or)?d|pwd|credentials?|signature|sig|auth)"
NAMED = rf"(?i:(?:[\w.-]{{0,40}}[_.-])?{WORDS})"

START = r"(?<![A-Za-z0-9])"

AT_HOST = r"(?=@(?!(?:\d+(?:\.\d+)?%?|k)(?![\w:/@-]|\.\w))[\w\[])"
"""Before the host of a login. `label:pos@0.5` and `docs:recall@k` are measures, not logins; an address has more parts."""

SECRET_FLAG = re.compile(f"--{NAMED}")
"""A flag that takes a secret, in full."""

SECRET = re.compile(
    "|".join(
        (
            # The user, the password or both before the host of an address; passwords may hold / @ # ? and spaces.
            r"(?<=://)[^\s/?#]+(?=@)",
            r"(?<=//)(?!\[)[^\s/?#:@]*:(?!\d{1,5}(?:[/?#\s]|$))(?!\s)[^\n\"'<>]{0,2000}(?=@)",
            r"(?<=://)[^\s/?#:@.]*:\d[^\n\"'<>]{0,2000}(?=@[\w-]+\.\w)" + AT_HOST,
            # The same without a scheme. `C:/` and `C:\` begin paths, and mailto: an address of mail.
            r"(?<![\w/:@.-])(?!git@|(?:mailto|cc|bcc|to|from|by):)(?:[\w.+%~-]+@)?[\w.+%~-]+:(?![/\\])[^\s\"'<>]+"
            + AT_HOST,
            # Fields of a query and of headers.
            rf"(?<=[?&;#])(?:{NAMED}|code|credential|jwt|session)=[^&\s#\"']+",
            r"(?i:\bbearer\s+)(?=\S*\d)[\w.~+/=-]{8,}",
            r"(?i:\bauthorization[\"']?\s*[:=]\s*[\"']?)(?i:(?:basic|bearer|token)\s+)?[\w.~+/=-]{8,}",
            # Keys by their names, then by their forms.
            rf"{START}{NAMED}[\"']?(?:\s*[:=]\s*[\"']?|\s+)(?:[0-9a-fA-F]{{40}}|[0-9a-fA-F]{{32}})(?![0-9a-fA-F])",
            rf"{START}{NAMED}[\"']?\s*[:=]\s*[\"']?(?=[\w.~+/-]*\d)[\w.~+/-]{{16,}}=*",
            START + r"(?i:[\w-]{0,40}(?:passw(?:or)?d|secret|pwd)[\"']?\s*[:=]\s*)[^\s,;]+",
            START + r"(?:hf_|api_org_)[A-Za-z0-9]{20,}",
            START
            + r"(?:gh[a-z]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|gl(?:pat|dt|rt|cbt|ptt|ft|imt|agent|oas|soat|ffct)-[\w-]{16,})",
            START + r"(?:wandb_v\d_[\w-]{16,}|xox[a-z]-[\w-]{10,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,})",
            START + r"(?:gsk|r8|dckr_pat|dop_v1|lsv2_pt|lsv2_sk)_[A-Za-z0-9]{20,}",
            START + r"(?:ya29\.[\w-]{20,}|SG\.[\w-]{16,}\.[\w-]{16,})",
            START + r"(?:A[A-Z]IA[A-Z0-9]{16}|AIza[\w-]{30,}|nvapi-[\w-]{20,})(?![A-Za-z0-9])",
            START + r"sk-(?:[A-Za-z0-9]{20,}|(?:proj|ant|or|svcacct|admin|None)-[\w-]{16,})",
            r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*",
        )
    )
)
"""Tokens, keys, and what comes before the host of an address. It may take too much of a text, rather than too little."""


JOINERS = "\u200c\u200d"
"""Zero-width characters that belong to words of some scripts and to emoji."""


class UserError(Exception):
    """A mistake the user can fix: the message names the flag or file, what was found, and what to type instead."""


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def redact(text: str) -> str:
    """`text` without tokens and passwords."""
    return SECRET.sub("***", text)


def printable(text: str) -> str:
    """`text` with escapes for tabs, line breaks, control and direction characters, as Python writes them: `\\t`, `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if is_hidden(c) else c for c in text)


def is_hidden(character: str) -> bool:
    """Whether a terminal does something else than to show the character."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in JOINERS


def one_message(text: str) -> str:
    """`text` as it is printed: each line `printable`, those after the first indented.

    A line break in a name of the user's data cannot begin what looks like another message.
    """
    first, *others = map(printable, text.split("\n"))
    return "\n".join([first, *(line and f"  {line}" for line in others)])


def first_line(error: BaseException) -> str:
    """The first line of an error's message without secrets; the name of its type where the message is empty."""
    lines = str(error).strip().splitlines()
    return redact(lines[0]) if lines else type(error).__name__


def hide_secrets() -> None:
    """From here on, log lines, warnings and traces, also of libraries, have no secrets and no control characters."""
    make_record = logging.getLogRecordFactory()

    def make_redacted(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make_record(*arguments, **named)
        with contextlib.suppress(TypeError, ValueError, KeyError):  # arguments that do not fit are logging's to report
            message = record.getMessage()
            if SECRET.search(message) or not message.isprintable():
                record.msg, record.args = one_message(redact(message)), ()
        return record

    def print_redacted(kind: Any, error: Any, trace: Any) -> None:
        text = redact("".join(traceback.format_exception(kind, error, trace)))
        print("\n".join(map(printable, text.split("\n"))), end="", file=sys.stderr)

    def print_redacted_of_thread(ended: Any) -> None:
        if not issubclass(ended.exc_type, SystemExit):
            print_redacted(ended.exc_type, ended.exc_value, ended.exc_traceback)

    format_warning = warnings.formatwarning

    def format_redacted(*arguments: Any, **named: Any) -> str:
        return one_message(redact(format_warning(*arguments, **named)))

    if sys.excepthook is sys.__excepthook__:  # once
        logging.setLogRecordFactory(make_redacted)
        sys.excepthook = print_redacted
        threading.excepthook = print_redacted_of_thread
        warnings.formatwarning = format_redacted
