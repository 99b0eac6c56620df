"""Rows of csv and tsv files. Every row has the fields of the header, each as it is written."""

import csv
import re
from collections import deque
from collections.abc import Iterable, Iterator

from lib.errors import UserError, require

Row = tuple[int, list[str]]
"""The number of the line in which a row begins, and its fields."""

LONGEST = 1 << 26
"""Characters in a field. A quote that is never closed stops here, and not when memory is full."""
MOST_LINES = 100_000
"""Lines of a quoted field in a tsv file."""
MARKS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


def read_delimited(lines: Iterable[str], name: str, delimiter: str, names: list[str] | None = None) -> Iterator[Row]:
    """The header, without spaces around its names, and then the rows; empty lines are left out.

    With `names` the file has no header.

    Raises UserError with the line for a row of more or fewer fields, for quotes that do not close, and for a header that
    names nothing, or a column twice, or has other separators.
    """
    lines = iter(lines)
    first = next(lines, "")
    chosen = re.fullmatch(r'"?sep=(.)"?\s*', first, re.IGNORECASE)  # for Excel
    delimiter, skipped = (chosen[1], 1) if chosen else (delimiter, 0)

    def all_lines() -> Iterator[str]:
        if not chosen:
            yield first
        yield from lines

    rows = tsv_rows(all_lines()) if delimiter == "\t" else csv_rows(all_lines(), name, delimiter, skipped)
    if names:
        header = names
    else:
        start, found = next(rows, (1, []))
        header = name_columns(found, f"{name}: line {start + skipped}", name, delimiter) if found else []
    yield 1, header
    for start, values in rows:
        if len(values) != len(header):
            number = f"{len(values)} value{'s' if len(values) != 1 else ''}"
            fix = (
                "; text with commas in it needs quotes around it"
                if delimiter == "," and len(values) > len(header)
                else ""
            )
            raise UserError(
                f"{name}: line {start + skipped} has {number}, the header has {len(header)}: {', '.join(header)}{fix}"
            )
        yield start + skipped, values


def name_columns(found: list[str], place: str, name: str, delimiter: str) -> list[str]:
    """The names of the columns. One without a name, as pandas writes its index, is called `Unnamed: POSITION`, as pandas does."""
    header = [column.strip() for column in found]
    used = MARKS.get(delimiter, repr(delimiter))
    wrong = len(header) == 1 and any(mark in header[0] for mark in MARKS)
    require(not wrong, f"{name} has one column, {header[0]!r}; separate its columns by {used}")
    require(
        any(header), f"{place}, the header, names no column; write the names of the columns there, such as text,label"
    )
    header = [column or f"Unnamed: {number}" for number, column in enumerate(header)]
    twice = next((column for number, column in enumerate(header) if column in header[:number]), None)
    require(twice is None, f"{place}, the header, has two columns named {twice!r}; rename one of them")
    return header


def csv_rows(lines: Iterable[str], name: str, delimiter: str, skipped: int) -> Iterator[Row]:
    """Rows of a csv file; `skipped` lines came before the first. Raises UserError for quotes that do not close."""
    csv.field_size_limit(LONGEST)
    reader, start = csv.reader(lines, delimiter=delimiter, strict=True), 1
    recent: deque[list[str]] = deque(maxlen=1000)
    try:
        for values in reader:
            if values:
                if reader.line_num > start and swallows_rows(values, recent, delimiter):
                    raise UserError(
                        f"{name}: line {start + skipped}: the quoted text that begins here spans "
                        f"{reader.line_num - start + 1} lines, which look like rows; remove the stray quote, or write a quote "
                        'within quoted text twice ("")'
                    )
                recent.append(values)
                yield start, values
            start = reader.line_num + 1
    except csv.Error as error:
        end = max(reader.line_num, start)
        if "newline" in str(error) or "new-line" in str(error):
            reason = f"line {end + skipped} is not csv: {error}"
        elif end > start or "unexpected end" in str(error) or "limit" in str(error):
            closes = (
                f"has text after its closing quote in line {end + skipped}"
                if "expected" in str(error)
                else "never ends"
            )
            closes = "never ends" if "unexpected end" in str(error) else closes
            reason = (
                f"line {start + skipped}: the quoted text that begins here {closes}; remove the stray quote, or write a quote "
                'within quoted text twice ("")'
            )
        else:
            fix = 'write a quote within quoted text twice (""), not as \\"'
            reason = f"line {start + skipped} has text after a closing quote; {fix}"
        raise UserError(f"{name}: {reason}") from None


def swallows_rows(values: list[str], recent: Iterable[list[str]], delimiter: str) -> bool:
    """Whether a field holds rows of the table: lines of as many fields, of which one is always a value known there."""
    width, known = len(values), list[set[str]]()
    for place, field in enumerate(values):
        lines = [line.split(delimiter) for line in re.split(r"\r\n|\n|\r", field)]
        first, between, last = lines[0], lines[1:-1], lines[-1]
        alike = len(first) == width - place and len(last) == place + 1 and all(len(line) == width for line in between)
        if len(lines) == 1 or width == 1 or not alike:
            continue
        known = known or [
            set(column) for column in zip(values, *(row for row in recent if len(row) == width), strict=True)
        ]
        for column in (column for column in range(width) if column != place):
            end = first[column - place] if column > place else last[column]
            found = [end, *(line[column] for line in between)]
            repeated = len(found) >= 10 and len(set(found)) <= len(found) // 2
            if all(found) and (repeated or known[column].issuperset(found)):
                return True
    return False


def tsv_rows(lines: Iterable[str]) -> Iterator[Row]:
    """Rows of a tsv file: a quote is an ordinary character, unless it begins a field that another one ends.

    A quoted field may hold tabs and line breaks, but not where each of its lines has as many fields as the header: these
    are rows, and the quote is an ordinary character.
    """
    lines, ahead, number, width = iter(lines), deque[str](), 0, 0
    while (line := ahead.popleft() if ahead else next(lines, None)) is not None:
        number += 1
        text = line.rstrip("\r\n")
        if not text:
            continue
        fields, start = text.split("\t"), number
        width = width or len(fields)
        if text.startswith('"') or '\t"' in text:
            quoted, is_open = split_quoted(text)
            joined = [line]
            known = iter(tuple(ahead) if is_open else ())
            while is_open and len(joined) <= MOST_LINES:
                more = next(known, None)
                if more is None:
                    more = next(lines, None)
                    if more is None:
                        break
                    ahead.append(more)
                joined.append(more)
                if '"' in more:
                    quoted, is_open = split_quoted("".join(joined).rstrip("\r\n"))
            rows = width > 1 and all(item.count("\t") == width - 1 for item in joined)
            if len(quoted) == width and not rows and not is_open:
                for _ in joined[1:]:
                    ahead.popleft()
                fields, number = quoted, number + len(joined) - 1
            else:
                fields = [unquote(field) for field in fields]
        yield start, fields


def split_quoted(text: str) -> tuple[list[str], bool]:
    """The fields of a row where quoted fields may hold tabs and line breaks, and whether the last one is still open.

    No fields where a line break is outside of quotes.
    """
    fields, place = list[str](), 0
    while True:
        if text.startswith('"', place):
            end = place + 1
            while (end := text.find('"', end)) >= 0 and text.startswith('""', end):
                end += 2
            if end < 0:
                return fields, True
            if text.startswith("\t", end + 1) or end + 1 == len(text):
                fields.append(text[place + 1 : end].replace('""', '"'))
                if end + 1 == len(text):
                    return fields, False
                place = end + 2
                continue
        end = text.find("\t", place)
        fields.append(text[place : end if end >= 0 else len(text)])
        if "\n" in fields[-1] or "\r" in fields[-1]:
            return [], False
        if end < 0:
            return fields, False
        place = end + 1


def unquote(field: str) -> str:
    """The field without its quotes where it is wholly quoted, else as it is."""
    quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', "")
    return field[1:-1].replace('""', '"') if quoted else field
