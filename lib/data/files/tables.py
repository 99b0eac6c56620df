"""Tables for training: columns of one type over all files of a run, on disk and mapped into memory."""

import contextlib
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetInfo, Features, List
from datasets.table import MemoryMappedTable, cast_array_to_feature

from lib.data.files.objects import Digits, Doubled, Spelled
from lib.data.files.opening import Source, open_unpacked
from lib.data.files.rows import open_rows, parquet_batches, place_of, spell
from lib.errors import UserError, first_line, require
from lib.hub.endpoint import datasets_cache
from lib.runtime.atomic import MANIFEST, find_damage, make_folder, remove_unused, sha256

logger = logging.getLogger(__name__)

ROWS, CHARACTERS = 50_000, 1 << 24
"""The most that is held in memory at once, of rows and of characters."""
MOST_COLUMNS = 10_000
KEPT_BYTES = 20 << 30
"""Tables on disk beyond this size are removed, the longest unused first."""
READER = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()
"""The version of the reader: what another one has read is not used."""

NAMES = {str: "text", Digits: "text", bool: "truth", int: "whole", Spelled: "real", dict: "object", Doubled: "object"}
ARROW = {"text": pa.string(), "truth": pa.bool_(), "whole": pa.int64(), "real": pa.float64()}
Kinds = dict[str, set[Any]]
"""What the values of a column are, over all files: keys of NAMES, ("list", key) for items of lists, or other types of Arrow."""


def load_tables(
    files: dict[str, list[Source]],
    features: dict[str, Features] | None = None,
    needed: Collection[str] | None = None,
    objects: Collection[str] = (),
) -> dict[str, Dataset]:
    """The rows of each split's files as a data set, in order, mapped from a file in the cache of `datasets`.

    csv fields are text as written, and empty ones are missing. A column of JSON has the type that all its values in all
    splits have; where text and numbers mix, it is text as written. Parquet keeps its types, unless the other files have
    text. Columns that hold objects are left out, but those in `objects`, which are text as JSON; parquet keeps these as they
    are. `features` describe the columns of a split; their ClassLabels are kept.
    Where `needed` is given, faults in other columns do not matter.

    Raises UserError with the file, and the line where there is one, for whatever cannot be read.
    """
    features = features or {}
    key = tables_key(files, features, needed, objects)
    place = datasets_cache() / "files" / key
    damage = find_damage(place) if place.is_dir() else "absent"
    if damage:
        if place.is_dir():
            logger.warning("warning: the tables in %s were damaged and are made again: %s", place, damage)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            make_folder(place, Builder(files, features, needed, objects).build)
        except OSError:  # a cache that may not be written
            tables = Builder(files, features, needed, objects).build(None)
            return {split: table_of(written) for split, written in tables.items()}
        remove_unused(place.parent, KEPT_BYTES, keep=place)
    with contextlib.suppress(OSError):
        os.utime(place / MANIFEST)  # used now: others go first
    return {
        split: map_table(place / f"{number}.arrow", f"{key[:24]}{number:08d}") for number, split in enumerate(files)
    }


def tables_key(
    files: dict[str, list[Source]],
    features: dict[str, Features],
    needed: Collection[str] | None,
    objects: Collection[str],
) -> str:
    """Hash of all that the tables depend on: the contents of the files, not their dates."""
    parts = [READER, str(features), sorted(needed) if needed is not None else None, sorted(objects)]
    listed = {
        split: [[source.format, source.encoding, source.options, *file_identity(source)] for source in sources]
        for split, sources in files.items()
    }
    return hashlib.sha256(json.dumps([parts, listed], default=str).encode(errors="surrogatepass")).hexdigest()[:32]


def file_identity(source: Source) -> list[Any]:
    with open_unpacked(source) as (_, kind):
        path = Path(source.path)
        return [kind, path.stat().st_size, sha256(path)]


def map_table(path: Path, fingerprint: str) -> Dataset:
    return Dataset(MemoryMappedTable.from_file(str(path)), info=DatasetInfo(), fingerprint=fingerprint)


def table_of(buffer: pa.Buffer) -> Dataset:
    return Dataset(pa.ipc.open_stream(buffer).read_all())


class FaultyColumn(UserError):
    """Characters that are not valid Unicode in `column`, which may not be needed."""

    def __init__(self, message: str, column: str) -> None:
        super().__init__(message)
        self.column = column


class Builder:
    """Reads files into tables: once if the types seen first hold to the end, else again, once all values are known."""

    def __init__(
        self,
        files: dict[str, list[Source]],
        features: dict[str, Features],
        needed: Collection[str] | None,
        objects: Collection[str],
    ) -> None:
        self.files, self.features, self.needed, self.objects = files, features, needed, objects
        self.kinds: Kinds = {}
        self.columns: dict[str, dict[str, None]] = {split: {} for split in files}
        self.stored: dict[str, dict[str, Any]] = {split: {} for split in files}

    def build(self, folder: Path | None) -> dict[str, Any]:
        written: dict[str, Any] = {}
        schemas: dict[str, Any] = {}
        for _ in range(2):
            for number, split in enumerate(self.files):
                if split not in schemas or schemas[split] != self.schema(split):
                    sink = (
                        pa.BufferOutputStream() if folder is None else pa.OSFile(str(folder / f"{number}.arrow"), "wb")
                    )
                    with sink:
                        schemas[split] = self.write(split, sink)
                        written[split] = sink.getvalue() if folder is None else None
        return written

    def schema(self, split: str) -> Any:
        """The columns of a split with their types, as far as they are known."""
        features = {}
        for name in self.columns[split]:
            with contextlib.suppress(ValueError):  # a type that `datasets` does not know
                kind, stored = self.type_of(name, split), self.stored[split].get(name)
                if kind is not None:
                    features[name] = stored or Features.from_arrow_schema(pa.schema({name: kind}))[name]
        return Features(features).arrow_schema

    def type_of(self, name: str, split: str) -> Any:
        """The type of a column in Arrow; None for one that is left out."""
        feature = self.stored[split].get(name)
        if feature is not None:
            return Features({name: feature}).arrow_schema.field(name).type
        kinds = self.kinds[name]
        if "object" in kinds:
            return None
        inner = {kind[1] if isinstance(kind, tuple) else kind for kind in kinds} - {None}
        if len(inner) == 1 and isinstance(kind := next(iter(inner)), pa.DataType):
            found = kind
        else:
            inner = {general_kind(kind) for kind in inner}
            found = pa.float64() if inner == {"whole", "real"} else pa.string()
            found = ARROW.get(next(iter(inner)), found) if len(inner) == 1 else found
        return pa.list_(found) if any(isinstance(kind, tuple) for kind in kinds) else found

    def write(self, split: str, sink: Any) -> Any:
        """Write a split's rows; the schema, or None if a value did not fit the types known at the beginning."""
        writer: Any = None
        schema: Any = None
        count = 0
        try:
            for source in self.files[split]:
                for columns, numbers in self.batches(source, split):
                    count += len(numbers)
                    wanted = self.schema(split)
                    if writer is None and schema is None:
                        schema = wanted
                        writer = pa.ipc.new_stream(sink, schema)
                    if wanted != schema:
                        writer = None
                    if writer is not None:
                        arrays = [
                            self.array(columns.get(field.name), field, split, source, numbers) for field in schema
                        ]
                        writer.write_batch(pa.record_batch(arrays, schema=schema))
            if writer is not None:
                writer.close()
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"the rows of {self.files[split][0].name} could not be written to {datasets_cache()}: {first_line(error)}; "
                "choose another place with HF_DATASETS_CACHE"
            ) from error
        names = (
            self.files[split][0].name if len(self.files[split]) == 1 else f"{self.files[split][0].name} and the others"
        )
        require(count > 0, f"{names}: there are no rows in it")
        if not self.schema(split).names:
            found = ", ".join(self.columns[split]) or "none"
            raise UserError(f"{names} has no column of texts, numbers or lists of them; its columns are: {found}")
        return schema if writer is not None else None

    def batches(self, source: Source, split: str) -> Iterator[tuple[dict[str, Any], Any]]:
        """Columns of some rows and the places of these, after their kinds were noted."""
        with open_unpacked(source) as (_, kind):
            pass
        if kind == "parquet":
            yield from self.parquet(source, split)
            return
        with open_rows(source) as rows:
            if rows.columns is not None:
                self.note_columns(rows.columns, {name: {"text"} for name in rows.columns}, source, split)
            for chunk in chunks(rows.items, rows.text):
                numbers = [number for number, _ in chunk]
                if rows.columns is not None:
                    values = zip(*(row for _, row in chunk), strict=True)
                    columns: dict[str, Any] = dict(zip(rows.columns, values, strict=True))
                    yield {name: text_array(cells, kind != "txt") for name, cells in columns.items()}, numbers
                    continue
                records = [record for _, record in chunk]
                names = dict.fromkeys(itertools.chain.from_iterable(records))
                columns = {name: [record.get(name) for record in records] for name in names}
                columns |= {name: list(map(object_text, columns[name])) for name in self.objects if name in columns}
                self.note_columns(names, {name: value_kinds(cells) for name, cells in columns.items()}, None, split)
                require(
                    len(self.columns[split]) <= MOST_COLUMNS,
                    f"{source.name} has more than {MOST_COLUMNS} different keys; the keys of all objects are the columns",
                )
                yield columns, numbers

    def parquet(self, source: Source, split: str) -> Iterator[tuple[dict[str, Any], Any]]:
        batches = parquet_batches(source, 10_000, self.objects)
        schema, start = next(batches), 1
        with contextlib.suppress(ValueError, KeyError, TypeError):  # features of a later version of `datasets`
            stored = {
                name: feature for name, feature in Features.from_arrow_schema(schema).items() if has_classes(feature)
            }
            others = [name for name in stored if self.stored[split].get(name, stored[name]) != stored[name]]
            if others and not self.features.get(split):
                raise UserError(
                    f"{source.name}: the classes of {others[0]} are not those of the other files of {split}"
                )
            self.stored[split] |= stored
        self.note_columns(schema.names, {field.name: {arrow_kind(field.type)} for field in schema}, source, split)
        for batch in batches:
            yield dict(zip(schema.names, batch.columns, strict=True)), range(start, start + len(batch))
            start += len(batch)

    def note_columns(self, names: Iterable[str], kinds: Kinds, source: Source | None, split: str) -> None:
        """Add the columns and kinds of some rows. Tables of one split (`source`: not JSON) must have the same columns."""
        known = self.columns[split]
        if source is not None and known and {*known} != {*names}:
            raise UserError(
                f"{source.name} has the columns {', '.join(names)}, but others of the {split} split {', '.join(known)}"
            )
        for name in names:
            known.setdefault(name)
            described = self.features.get(split, {}).get(name)
            if has_classes(described):
                self.stored[split][name] = described
            seen = self.kinds.setdefault(name, set())
            if name not in self.stored[split]:
                seen.update(kinds[name])

    def array(self, cells: Any, field: Any, split: str, source: Source, numbers: Any) -> Any:
        """The values of a column as an array of the type that the whole column has."""
        if cells is None:
            return pa.nulls(len(numbers), field.type)
        try:
            stored = self.stored[split].get(field.name)
            if stored is not None:
                return cast_array_to_feature(cells if isinstance(cells, pa.Array) else pa.array(cells), stored)
            if isinstance(cells, pa.Array):
                return cells if cells.type == field.type else cells.cast(field.type)
            return pa.array(convert(cells, field.type), field.type)
        except UnicodeEncodeError:
            for number, cell in zip(numbers, cells, strict=True):
                try:
                    json.dumps(cell, ensure_ascii=False).encode()
                except UnicodeEncodeError:
                    if self.needed is not None and field.name not in self.needed:
                        break
                    raise FaultyColumn(
                        f"{place_of(source.name, number)} holds characters that are not valid Unicode in {field.name}, "
                        "such as half of an emoji; correct the text",
                        field.name,
                    ) from None
            return pa.nulls(len(numbers), field.type)  # not needed; if it is used after all, its rows have no text
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise UserError(
                f"{source.name}: the column {field.name} is not {field.type}, as its description or another file says: "
                f"{first_line(error)}"
            ) from error


def has_classes(feature: Any) -> bool:
    return isinstance(feature, ClassLabel) or (isinstance(feature, List) and isinstance(feature.feature, ClassLabel))


def chunks(items: Iterable[Any], text: Any) -> Iterator[list[Any]]:
    """Lists of at most ROWS items, or of about CHARACTERS characters read."""
    chunk: list[Any] = []
    start = 0
    for item in items:
        chunk.append(item)
        if len(chunk) == ROWS or text.size - start > CHARACTERS:
            yield chunk
            chunk, start = [], text.size
    if chunk:
        yield chunk


def text_array(cells: Any, empty_is_missing: bool) -> Any:
    array = pa.array(cells, pa.string())
    return pc.if_else(pc.equal(array, ""), pa.scalar(None, pa.string()), array) if empty_is_missing else array


def object_text(cell: Any) -> Any:
    """An object or a list of JSON as text; all else as it is."""
    return json.dumps(cell, ensure_ascii=False) if isinstance(cell, dict | list) else cell


def value_kinds(cells: list[Any]) -> set[Any]:
    """The kinds of some values of JSON."""
    types = set(map(type, cells)) - {type(None)}
    kinds: set[Any] = {NAMES[kind] for kind in types if kind is not list}
    if list in types:
        items = set(map(type, itertools.chain.from_iterable(cell for cell in cells if type(cell) is list)))
        nested = items & {list, dict, Doubled}
        kinds |= {"object"} if nested else {("list", NAMES[kind]) for kind in items - {type(None)}} | {("list", None)}
    return kinds


def arrow_kind(kind: Any) -> Any:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return ("list", kind.value_type)
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def general_kind(kind: Any) -> str:
    """The key of ARROW for a type of Arrow that is not alone in its column."""
    if not isinstance(kind, pa.DataType):
        return kind
    if pa.types.is_boolean(kind):
        return "truth"
    return "whole" if pa.types.is_integer(kind) else "real" if pa.types.is_floating(kind) else "text"


def convert(cells: list[Any], kind: Any) -> list[Any]:
    """Values of JSON for a column of a type: numbers beside text as they are written, single values among lists as lists."""
    if pa.types.is_list(kind):
        lists = [cell if cell is None or isinstance(cell, list) else [cell] for cell in cells]
        return [None if cell is None else convert(cell, kind.value_type) for cell in lists]
    if pa.types.is_string(kind):
        return list(map(spell, cells))
    if pa.types.is_floating(kind):
        return [None if cell is None else float(cell) for cell in cells]
    return cells
