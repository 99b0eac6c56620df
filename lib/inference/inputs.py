"""New texts from arguments, standard input or a file, read one row at a time, so that memory does not limit their number."""

import csv
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lib.config.predict import InputConfig
from lib.data.trained_on import UNKNOWN, TrainedOn, columns_note
from lib.errors import UserError, require

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
                print(note, file=sys.stderr)
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
    raise UserError(f"which column holds the text? {source_name(config)} has: {have}; name it with --text_columns")


def text_of(record: dict[str, Any], column: str, place: str) -> str:
    """The text in a column. Raises UserError unless it is text that UTF-8 can encode."""
    text = record.get(column)
    if not isinstance(text, str):
        found = "no value" if text is None else f"{text!r}, not text,"
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
    """The number of rows for a progress bar, counted by line breaks; None for parquet and standard input."""
    if config.texts or config.question is not None:
        return max(1, len(config.texts))
    path = Path(str(config.input))
    if config.input in (None, "-") or not path.is_file() or format_of(config) == "parquet":
        return None
    with path.open("rb") as file:
        blocks = iter(lambda: file.read(1 << 20), b"")
        return sum(block.count(b"\n") for block in blocks)


def format_of(config: InputConfig) -> str:
    if config.input in (None, "-"):
        return config.input_format or "txt"
    return config.input_format or Path(str(config.input)).suffix.lower().removeprefix(".")


def read_records(config: InputConfig) -> Iterator[Record]:
    """The rows of a file or of standard input. Raises UserError if there is none, or a row cannot be read."""
    reader, name = READERS[format_of(config)], source_name(config)
    if config.input in (None, "-"):
        if config.input is None and sys.stdin.isatty():
            raise UserError('there is no text; give it as an argument ("..."), with --input FILE, or through a pipe')
        yield from reader(sys.stdin.buffer, name)
        return
    path = Path(str(config.input))
    require(path.is_file(), f"--input {path}: no such file")
    try:
        with path.open("rb") as file:
            yield from reader(file, name)
    except OSError as error:
        raise UserError(f"--input {path} cannot be read: {error}") from error


def read_lines(file: BinaryIO, name: str) -> Iterator[str]:
    """Lines as text, with their line ends. Raises UserError for a line that is not UTF-8."""
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"line {number} of {name} is not UTF-8; save it as UTF-8") from None


def read_txt(file: BinaryIO, name: str) -> Iterator[Record]:
    """Each line is a text, an empty line too, so that line n of the input is row n of the output."""
    for number, line in enumerate(read_lines(file, name), 1):
        yield f"line {number} of {name}", {"text": line.rstrip("\r\n")}


def read_jsonl(file: BinaryIO, name: str) -> Iterator[Record]:
    for number, line in enumerate(read_lines(file, name), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"line {number} of {name} is not JSON: {error}") from None
        is_object = isinstance(record, dict)
        require(is_object, f'line {number} of {name} is not a JSON object, such as {{"text": "..."}}')
        yield f"line {number} of {name}", record


def read_csv(file: BinaryIO, name: str, delimiter: str = ",") -> Iterator[Record]:
    """Rows below a header. Raises UserError for a row with more or fewer values than the header."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(read_lines(file, name), delimiter=delimiter)
    header: list[str] = []
    try:
        for values in reader:
            place = f"line {reader.line_num} of {name}"
            if not header:
                header = values
                wrong = len(header) == 1 and any(mark in header[0] for mark in ",;\t|")
                mark = "tabs" if delimiter == "\t" else "commas"
                require(not wrong, f"{name} has one column, {values[0]!r}; separate its columns by {mark}")
            elif values:
                fits = len(values) == len(header)
                require(fits, f"{place} has {len(values)} values, the header has {len(header)}: {', '.join(header)}")
                yield place, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise UserError(f"line {reader.line_num} of {name} is not csv: {error}") from None


def read_tsv(file: BinaryIO, name: str) -> Iterator[Record]:
    return read_csv(file, name, delimiter="\t")


def read_parquet(file: BinaryIO, name: str) -> Iterator[Record]:
    """Rows in batches of 1024, so that a file may be larger than memory."""
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024)
        records = (record for batch in batches for record in batch.to_pylist())
        for number, record in enumerate(records, 1):
            yield f"row {number} of {name}", record
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{name} is not parquet: {error}") from error


READERS = {"txt": read_txt, "jsonl": read_jsonl, "csv": read_csv, "tsv": read_tsv, "parquet": read_parquet}
