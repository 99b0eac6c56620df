"""New texts from arguments, standard input or a file, read one row at a time, so that memory does not limit their number."""

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from lib.config.predict import InputConfig
from lib.config.sections import named_format
from lib.data.files.opening import UNPACK_ERRORS, Source, open_unpacked
from lib.data.files.rows import parquet_batches, parse, place_of, spell
from lib.data.trained_on import UNKNOWN, TrainedOn, columns_note
from lib.errors import UserError, printable, require

Columns = tuple[str, ...]
Record = tuple[str, dict[str, Any]]
"""The place of a row, for messages, and its values by column."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One row of the input: `texts` are one text, a pair, or a question and its context.

    `number` counts from 0; `id` is that number or the value of --id_column.
    """

    number: int
    id: Any
    texts: tuple[str, ...]


def read_examples(
    config: InputConfig, guesses: Sequence[Columns], trained_on: TrainedOn = UNKNOWN
) -> Iterator[Example]:
    """The examples of the input, in order, each read when it is needed.

    `guesses` are names that text columns may have, the likeliest first. It is said on stderr where they are not those that
    a classifier was `trained_on`. Raises UserError for a missing file or column, a row that cannot be read, a value that is
    not text, and an empty input.
    """
    if config.texts:
        records: Iterator[Record] = ((f"text {i}", {"text": text}) for i, text in enumerate(config.texts, 1))
    elif config.question is not None:
        records = iter([("the arguments", {"question": config.question, "context": config.context})])
    else:
        records = read_records(config)
    columns: Columns = ()
    number = -1
    for number, (place, record) in enumerate(records):
        if not columns:
            columns = choose_columns(list(record), config, guesses)
            note = columns_note(columns, trained_on, config.text_columns is not None, source_name(config))
            if note and (format_of(config) != "txt" or len(columns) != len(trained_on.text_columns)):
                print(printable(note), file=sys.stderr)
        texts = tuple(text_of(record, column, place) for column in columns)
        has_id = config.id_column is None or record.get(config.id_column) is not None
        require(has_id, f"{place} has no value in column {config.id_column}")
        yield Example(number, record[config.id_column] if config.id_column else number, texts)
    require(number >= 0, f"{source_name(config)} holds no text")


def choose_columns(names: Sequence[str], config: InputConfig, guesses: Sequence[Columns]) -> Columns:
    """The text columns: --text_columns, else the first guess that is there, else the only column. Raises UserError."""
    have = ", ".join(names)
    for flag, wanted in (("--text_columns", config.text_columns or ()), ("--id_column", (config.id_column,))):
        for column in wanted:
            known = column is None or column in names
            require(known, f"{flag} {column}: {source_name(config)} has no such column; it has: {have}")
    if config.text_columns:
        return config.text_columns
    for guess in guesses:
        if all(column in names for column in guess):
            return guess
    others = [name for name in names if name != config.id_column]
    if len(others) == 1 and any(len(guess) == 1 for guess in guesses):
        return (others[0],)
    raise UserError(
        f"which column holds the text? {source_name(config)} has: {have}; name it with --text_columns, "
        "or give the file a header line if these are values"
    )


def text_of(record: dict[str, Any], column: str, place: str) -> str:
    """The text in a column; numbers and truth values of JSON as they are written. Raises UserError for anything else."""
    value = record.get(column)
    text = spell(value) if isinstance(value, str | int | float) else None
    if text is None:
        found = "no value" if value is None else f"{value!r}, not text,"
        raise UserError(f"{place} has {found} in column {column}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place} holds characters that are not valid Unicode in column {column}") from None
    return text


def source_name(config: InputConfig) -> str:
    if config.texts:
        return "the arguments"
    return "the standard input" if config.input in (None, "-") else f"--input {config.input}"


def count_rows(config: InputConfig) -> int | None:
    """The number of rows for a progress bar, counted by line breaks; None where lines are not rows, and for standard input."""
    if config.texts or config.question is not None:
        return max(1, len(config.texts))
    path = str(config.input)
    if config.input in (None, "-") or config.input_format in ("json", "parquet") or not os.path.isfile(path):
        return None
    with open_unpacked(source_of(config)) as (file, kind):
        if kind in ("json", "parquet"):
            return None
        try:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
        except UNPACK_ERRORS:
            return None  # reading reports it


def format_of(config: InputConfig) -> str | None:
    """The format that the options name; None for an archive, whose file names it."""
    if config.input in (None, "-"):
        return config.input_format or "txt"
    return config.input_format or named_format(str(config.input))


def source_of(config: InputConfig) -> Source:
    return Source(str(config.input), source_name(config), config.input_format, config.encoding)


def read_records(config: InputConfig) -> Iterator[Record]:
    """The rows of a file or of standard input. Raises UserError if there is none, or a row cannot be read."""
    source = source_of(config)
    if config.input in (None, "-"):
        if config.input is None and sys.stdin.isatty():
            raise UserError('there is no text; give it as an argument ("..."), with --input FILE, or through a pipe')
        yield from read_stream(sys.stdin.buffer, str(format_of(config)), source)
        return
    with open_unpacked(source) as (file, kind):
        if kind != "parquet":
            yield from read_stream(file, kind, source)
            return
    yield from read_parquet(source)


def read_stream(file: Any, kind: str, source: Source) -> Iterator[Record]:
    rows = parse(file, kind, source)
    for place, row in rows.items:
        yield place_of(source.name, place), row if rows.columns is None else dict(zip(rows.columns, row, strict=True))


def read_parquet(source: Source) -> Iterator[Record]:
    batches = parquet_batches(source, 1024)
    next(batches)  # the schema
    records = (record for batch in batches for record in batch.to_pylist())
    for number, record in enumerate(records, 1):
        yield f"{source.name}: row {number}", record
