"""JSON: records from lines, from a list, or from the other forms that people and pandas write."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from lib.errors import UserError, require

Record = dict[str, Any]
Place = int | str
"""The number of a line, or a text such as `row 3` in forms that have no line for each row."""
SPACE = re.compile(r"[ \t\n\r]*")
WANTED = 'a list of objects, such as [{"text": "...", "label": "..."}], or one such object in each line'
ROWS_KEYS = ("data", "rows", "records", "examples", "instances", "items")
"""Keys that hold the rows, in an object that has others as well."""


class Spelled(float):
    """A real number that keeps its spelling, such as 1.10 or 2E3."""

    text: str

    def __new__(cls, text: str) -> "Spelled":
        number = super().__new__(cls, text)
        number.text = text
        return number


class Digits(str):
    """An integer that does not fit into 64 bits, as text."""


class Doubled(dict):
    """An object with a key that is written twice."""

    twice: str


def parse_integer(text: str) -> int | Digits:
    number = int(text) if len(text) < 20 else None
    return number if number is not None and -(2**63) <= number < 2**63 else Digits(text)


def parse_constant(text: str) -> Spelled | None:
    """NaN, as pandas and Python write a missing value, is none; infinity is a number."""
    return None if text == "NaN" else Spelled(text)


def parse_object(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        record = Doubled(record)
        record.twice = next(name for number, name in enumerate(names) if name in names[:number])
    return record


DECODER = json.JSONDecoder(
    parse_float=Spelled, parse_int=parse_integer, parse_constant=parse_constant, object_pairs_hook=parse_object
)


class Values:
    """The JSON values in a text that comes in blocks, one after the other; no more of it is kept than one value needs."""

    def __init__(self, blocks: Iterable[str], name: str) -> None:
        self.blocks, self.name = iter(blocks), name
        self.buffer, self.place, self.line, self.counted = "", 0, 1, 0
        self.is_open = True

    def more(self) -> bool:
        """Read on: as much as there is of the value so far, so that a long one is not begun too often."""
        parts, size = [self.buffer[self.place :]], 0
        self.current_line()
        while self.is_open and size <= len(parts[0]):
            block = next(self.blocks, "")
            self.is_open = bool(block)
            parts.append(block)
            size += len(block) or 1
        self.buffer, self.place, self.counted = "".join(parts), 0, 0
        return size > 1 or self.is_open

    def current_line(self) -> int:
        self.line += self.buffer.count("\n", self.counted, self.place)
        self.counted = self.place
        return self.line

    def peek(self) -> str:
        """The next character that is no space, which stays; nothing at the end."""
        while True:
            self.place = SPACE.match(self.buffer, self.place).end()  # type: ignore[union-attr]
            if self.place < len(self.buffer):
                return self.buffer[self.place]
            if not self.is_open or not self.more():
                return ""

    def value(self, is_listed: bool = False) -> Any:
        """The next value, or the next one in a list. Raises UserError with the line where it is not JSON."""
        while True:
            try:
                value, self.place = DECODER.raw_decode(self.buffer, self.place)
                return value
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self.buffer) - 16 or error.msg.startswith("Unterminated string")
                if cut and self.is_open:
                    self.more()
                    continue
                begin = self.current_line()
                line = begin + self.buffer.count("\n", self.place, error.pos)
                found = "it ends too early" if error.pos >= len(self.buffer.rstrip()) else error.msg
                if is_listed and line > begin:
                    begin, line, found = line, line, f"{found} (in the object that begins in line {begin})"
                found += f" (in line {line})" if line > begin else ""
                raise UserError(f"{self.name}: line {begin} is not JSON: {found}") from None
            except RecursionError:
                raise UserError(f"{self.name}: line {self.current_line()} is nested too deep") from None


def read_objects(blocks: Iterable[str], name: str) -> Iterator[tuple[Place, Record]]:
    """Records with their places: the line in which each begins, where rows have lines.

    Read are objects one after the other, a list of them, `{"data": [...]}`, an object of columns, and all that
    DataFrame.to_json writes. Raises UserError with the line for what is not JSON, and names the form that is wanted.
    """
    values = Values(blocks, name)
    mark = values.peek()
    if mark == "[":
        yield from read_list(values, name)
        return
    number = 0
    while values.peek():
        line, value = values.current_line(), values.value()
        number += 1
        if number == 1 and not values.peek():
            rows = unwrap(value, name)
            if rows is not None:
                yield from enumerate(
                    (check_record(row, f"{name}: row {place}") for place, row in enumerate(rows, 1)), 1
                )
                return
        yield line, check_record(value, f"{name}: line {line}")


def read_list(values: Values, name: str) -> Iterator[tuple[int, Record]]:
    """Records of a list, each with the line in which it begins. Raises UserError for what is not a list to its end."""
    values.place += 1
    while values.peek() != "]":
        line = values.current_line()
        yield line, check_record(values.value(is_listed=True), f"{name}: line {line}")
        mark = values.peek()
        if mark == ",":
            values.place += 1
        elif mark != "]":
            found = f"{mark!r} where a comma or ] is due" if mark else "the list does not end"
            raise UserError(f"{name}: line {values.current_line()} is not JSON: {found}")
    values.place += 1
    after = values.peek()
    require(not after, f"{name}: line {values.current_line()}: there is more after the list; give {WANTED}")


def check_record(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(
            f'{place} is not a JSON object, such as {{"text": "...", "label": "..."}}, but {kind_of(value)}'
        )
    if isinstance(value, Doubled):
        raise UserError(f"{place} has the key {value.twice!r} twice")
    return value


def kind_of(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a text", Digits: "a number"}
    return names.get(type(value), "a number")


def unwrap(value: Any, name: str) -> list[Any] | None:
    """The rows in the only value of a file; None where it is a row itself. Raises UserError for a form that is not known."""
    if not isinstance(value, dict) or isinstance(value, Doubled):
        require(isinstance(value, dict), f"{name} holds {kind_of(value)}; give {WANTED}")
        return None
    kinds = {type(item) for item in value.values()}
    if isinstance(columns := value.get("columns"), list) and is_table(value.get("data"), list):  # pandas: split
        fits = all(isinstance(column, str | int) for column in columns) and len(set(map(str, columns))) == len(columns)
        require(fits, f"{name}: its key `columns` does not hold the names of the columns; give {WANTED}")
        for number, row in enumerate(value["data"], 1):
            require(len(row) == len(columns), f"{name}: row {number} has {len(row)} values for {len(columns)} columns")
        return [dict(zip(map(str, columns), row, strict=True)) for row in value["data"]]
    tables = [key for key, item in value.items() if is_table(item, dict)]
    if len(tables) == 1 and (len(value) == 1 or tables[0] in ROWS_KEYS):
        rows = value[tables[0]]
        nested = all(isinstance(row.get("row"), dict) and "row_idx" in row for row in rows)  # the Hub's viewer
        return [row["row"] for row in rows] if nested else rows
    if len(tables) > 1 and kinds == {list}:
        raise UserError(f"{name} holds several lists of rows ({', '.join(tables)}); give each in a file of its own")
    if value and kinds == {list}:
        lengths = {key: len(item) for key, item in value.items()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{key} {length}" for key, length in lengths.items())
            raise UserError(f"{name} holds one object with lists of different lengths ({found}); give {WANTED}")
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if value and kinds <= {dict, Doubled}:
        inner = list(dict.fromkeys(key for item in value.values() for key in item))
        by_column = all(map(str.isdecimal, inner)) or (not all(map(str.isdecimal, value)) and len(inner) > len(value))
        by_column = (by_column or {"text", "label"} <= value.keys()) and not {"text", "label"} <= {*inner}
        if not by_column:
            return list(value.values())
        return [{column: item.get(key) for column, item in value.items()} for key in inner]
    text = next((key for key, item in value.items() if isinstance(item, list | dict) and len(item) > 0), None)
    if text is not None and all(isinstance(item, list | dict) for item in value.values()):
        raise UserError(f"{name} holds one object (its key {text!r} holds {kind_of(value[text])}); give {WANTED}")
    return None


def is_table(value: Any, kind: type) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(row, kind) for row in value)
