"""New text, row by row, from arguments, the standard input or a file: never more of it in memory than is asked for."""

import csv
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lib.config.predict import InputConfig
from lib.errors import UserError, require

Columns = tuple[str, ...]
Record = tuple[str, dict[str, Any]]
"""Where a row stands, in words, and its values by column."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One input: `texts` are one text, or two for a pair or a question with its context.

    `number` counts from 0; `id` is that number or the value of --id_column.
    """

    number: int
    id: Any
    texts: tuple[str, ...]


def read_rows(config: InputConfig, guesses: Sequence[Columns]) -> Iterator[Row]:
    """The rows of the input, in order, as they are needed.

    `guesses` are usual names of text columns, the best first. Raises UserError, when it comes there, for a missing
    file or column, a line that cannot be read, a value that is not text, and an input without a row.
    """
    if config.texts:
        records: Iterator[Record] = ((f"text {i}", {"text": text}) for i, text in enumerate(config.texts, 1))
    elif config.question is not None:
        records = iter([("the arguments", {"question": config.question, "context": config.context})])
    else:
        records = read_records(config)
    columns: Columns = ()
    number = -1
    for number, (where, record) in enumerate(records):
        columns = columns or choose_columns(list(record), config, guesses)
        texts = tuple(text_of(record, column, where) for column in columns)
        known = config.id_column is None or record.get(config.id_column) is not None
        require(known, f"{where} has no value in column {config.id_column}")
        yield Row(number, record[config.id_column] if config.id_column else number, texts)
    require(number >= 0, f"{source_name(config)} holds no text")


def source_name(config: InputConfig) -> str:
    return "the standard input" if config.input in (None, "-") else f"--input {config.input}"


def choose_columns(names: Sequence[str], config: InputConfig, guesses: Sequence[Columns]) -> Columns:
    """The columns that hold the text: those named, else usual ones, else the only one there is."""
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


def text_of(record: dict[str, Any], column: str, where: str) -> str:
    text = record.get(column)
    if not isinstance(text, str):
        what = "no value" if text is None else f"{text!r}, not text,"
        raise UserError(f"{where} has {what} in column {column}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds characters that are not valid Unicode in column {column}") from None
    return text


# ---------------------------------------------------------------------------------------------------- formats


def read_records(config: InputConfig) -> Iterator[Record]:
    """The rows of a file or of the standard input, by its format."""
    name = source_name(config)
    if config.input in (None, "-"):
        if config.input is None and sys.stdin.isatty():
            raise UserError('there is no text; give it as an argument ("..."), with --input FILE, or through a pipe')
        yield from READERS[config.input_format or "txt"](sys.stdin.buffer, name)
        return
    path = Path(str(config.input))
    require(path.is_file(), f"--input {path}: no such file")
    kind = config.input_format or path.suffix.lower().removeprefix(".")
    try:
        if kind == "parquet":
            yield from read_parquet(path, name)
        else:
            with path.open("rb") as file:
                yield from READERS[kind](file, name)
    except OSError as error:
        raise UserError(f"--input {path} cannot be read: {error}") from error


def read_lines(file: BinaryIO, name: str) -> Iterator[str]:
    """Lines as text, with their ends. Raises UserError for the first that is not UTF-8."""
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"line {number} of {name} is not UTF-8; save it as UTF-8") from None


def read_txt(file: BinaryIO, name: str) -> Iterator[Record]:
    """Each line is a text, an empty one too, so that line n of the input is row n of the output."""
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
    """A header, then rows as long as it. Raises UserError with the line of one that is not."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(read_lines(file, name), delimiter=delimiter)
    header: list[str] = []
    try:
        for values in reader:
            where = f"line {reader.line_num} of {name}"
            if not header:
                header = values
                wrong = len(header) == 1 and any(mark in header[0] for mark in ",;\t|")
                mark = "tabs" if delimiter == "\t" else "commas"
                require(not wrong, f"{name} has one column, {values[0]!r}; separate its columns by {mark}")
            elif values:
                fits = len(values) == len(header)
                require(fits, f"{where} has {len(values)} values, the header has {len(header)}: {', '.join(header)}")
                yield where, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise UserError(f"line {reader.line_num} of {name} is not csv: {error}") from None


def read_tsv(file: BinaryIO, name: str) -> Iterator[Record]:
    return read_csv(file, name, delimiter="\t")


def read_parquet(path: Path, name: str) -> Iterator[Record]:
    """Rows batch by batch: a file larger than memory is no matter."""
    import pyarrow.parquet

    try:
        batches: Iterable[Any] = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
        records = (record for batch in batches for record in batch.to_pylist())
        for number, record in enumerate(records, 1):
            yield f"row {number} of {name}", record
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{name} is not parquet: {error}") from error


READERS = {"txt": read_txt, "jsonl": read_jsonl, "csv": read_csv, "tsv": read_tsv}


def count_rows(config: InputConfig) -> int | None:
    """About how many rows there are, for a progress bar; None when they cannot be counted before they are read."""
    if config.texts or config.question is not None:
        return max(1, len(config.texts))
    if config.input in (None, "-") or not Path(str(config.input)).is_file():
        return None
    path = Path(str(config.input))
    if "parquet" in (config.input_format, path.suffix.lower().removeprefix(".")):
        return None
    with path.open("rb") as file:
        blocks = iter(lambda: file.read(1 << 20), b"")
        return sum(block.count(b"\n") for block in blocks)
