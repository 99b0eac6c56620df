"""The rows of a file, whatever its format, one at a time and with their places."""

import contextlib
import dataclasses
import itertools
from collections.abc import Collection, Iterator
from typing import Any

from lib.data.files.delimited import read_delimited
from lib.data.files.objects import Place, Spelled, read_objects
from lib.data.files.opening import UNPACK_ERRORS, Source, Text, open_unpacked, split_lines
from lib.errors import UserError, first_line, require


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a file with their places: values in the order of `columns`, or records where `columns` is None.

    `text` counts what was read.
    """

    items: Iterator[tuple[Place, Any]]
    columns: list[str] | None
    text: Text


def place_of(name: str, place: Place) -> str:
    """A place in a file, for messages."""
    return f"{name}: {place}" if isinstance(place, str) else f"{name}: line {place}"


@contextlib.contextmanager
def open_rows(source: Source) -> Iterator[Rows]:
    """The rows of a file that is not parquet."""
    with open_unpacked(source) as (file, kind):
        yield parse(file, kind, source)


def parse(file: Any, kind: str, source: Source) -> Rows:
    """The rows in a stream of bytes. Raises UserError, here or later, for what cannot be read."""
    text, options = Text(file, source.name, source.encoding), dict(source.options)
    if kind == "txt":
        return Rows(enumerate(([line] for line in text_lines(text)), 1), ["text"], text)
    if kind in ("json", "jsonl"):
        return Rows(read_objects(text, source.name), None, text)
    delimiter = options.get("sep") or ("\t" if kind == "tsv" else ",")
    items = read_delimited(split_lines(text), source.name, delimiter, options.get("names"))
    _, header = next(items)
    return Rows(items, header, text)


def text_lines(text: Text) -> Iterator[str]:
    r"""Lines without their ends, which are \n or \r\n; \r where the text begins with such lines and no others."""
    blocks = iter(text)
    first = next(blocks, "")
    newline = "" if "\r" in first[:-1] and "\n" not in first else "\n"
    for line in split_lines(itertools.chain([first], blocks), newline):
        yield line.rstrip("\r\n")


def parquet_batches(source: Source, size: int, objects: Collection[str] = ()) -> Iterator[Any]:
    """Record batches of a parquet file: the columns of plain values or lists of them, at most `size` rows each.

    Columns in `objects` may hold others.

    Raises UserError for a damaged file.
    """
    import pyarrow
    import pyarrow.parquet

    with open_unpacked(source) as (file, _):
        try:
            stored = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
            schema = stored.schema_arrow
            names = [field.name for field in schema if is_plain(field.type) or field.name in objects]
            twice = next((name for name in names if names.count(name) > 1), None)
            require(twice is None, f"{source.name} has two columns named {twice!r}; rename one of them")
            fields = [schema.field(name).with_type(without_views(schema.field(name).type)) for name in names]
            kept = pyarrow.schema(fields, metadata=schema.metadata)
            yield kept
            for batch in stored.iter_batches(size, columns=names):
                batch.validate(full=True)  # text that is not UTF-8, too
                yield batch.cast(kept)
        except (pyarrow.ArrowException, ValueError, MemoryError, *UNPACK_ERRORS) as error:
            raise UserError(f"{source.name} is not parquet, or damaged: {first_line(error)}") from error


def without_views(kind: Any) -> Any:
    """The type that holds the same values where Arrow can compute with it: it cannot with views."""
    import pyarrow
    from pyarrow import types

    if types.is_list(kind) and types.is_string_view(kind.value_type):
        return pyarrow.list_(pyarrow.large_string())
    return {pyarrow.string_view(): pyarrow.large_string(), pyarrow.binary_view(): pyarrow.large_binary()}.get(
        kind, kind
    )


def is_plain(kind: Any) -> bool:
    """Whether a column may be text or a label: no objects, no lists of lists."""
    from pyarrow import types

    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    inner = kind.value_type if lists or types.is_dictionary(kind) else kind
    return not types.is_nested(inner) and not types.is_dictionary(inner)


def spell(value: Any) -> str | None:
    """A value of JSON as it is written in the file."""
    if value is None or type(value) is str:
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return value.text if isinstance(value, Spelled) else str(value)
