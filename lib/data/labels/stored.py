"""Labels as a data set stores them: the distinct values of a column, and which of them each row has."""

import dataclasses
import datetime
import decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from lib.errors import UserError


@dataclasses.dataclass(frozen=True)
class Stored:
    """The distinct values of a column, and the place of each row's value among them: int64 (rows,).

    Values are text, bools, ints, floats, or None where one is missing: null, NaN and empty text.
    """

    values: list[Any]
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    @property
    def counts(self) -> np.ndarray:
        """Rows of each value, int64."""
        return np.bincount(self.places, minlength=len(self.values))

    @property
    def missing(self) -> np.ndarray:
        """Whether each row has no value, bool."""
        return np.array([value is None for value in self.values], dtype=bool)[self.places]

    def row(self, place: int) -> int:
        """The first row with the value at `place`, counted from 1."""
        return int(np.argmax(self.places == place)) + 1

    def replaced(self, values: list[Any]) -> "Stored":
        """The same rows with other values in these places; equal ones become one."""
        return merged(values, self.places)

    @property
    def present(self) -> list[Any]:
        """The values that are not missing."""
        return [value for value in self.values if value is not None]


def arrow_column(dataset: Dataset, column: str) -> Any:
    """A column as one Arrow array."""
    table = dataset.select_columns([column]).with_format("arrow")[:]
    return table[column].combine_chunks()


def read_column(dataset: Dataset, column: str) -> Stored:
    """The values of a column that holds no lists. Raises UserError for bytes and other things that are no labels."""
    return read_array(arrow_column(dataset, column), column)


def read_array(array: Any, column: str) -> Stored:
    """The values of an Arrow array. Raises UserError as `read_column` does."""
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if pa.types.is_string_view(array.type):
        array = array.cast(pa.large_string())
    if pa.types.is_null(array.type):
        return Stored([None], np.zeros(len(array), dtype=np.int64))
    try:
        encoded = array if pa.types.is_dictionary(array.type) else pc.dictionary_encode(array, null_encoding="encode")
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise UserError(
            f"--label_column {column} holds {array.type}; labels are text, numbers, or lists of these"
        ) from error
    places = encoded.indices.fill_null(len(encoded.dictionary)).to_numpy(zero_copy_only=False).astype(np.int64)
    values = [simple(value, column) for value in encoded.dictionary.to_pylist()]
    return merged([*values, None], places)


def simple(value: Any, column: str) -> Any:
    """A stored value as text, bool, int or float; None where it is missing."""
    if isinstance(value, decimal.Decimal):
        value = float(value)
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta):
        return str(value)
    if not (value is None or isinstance(value, str | int | float)):
        raise UserError(
            f"--label_column {column} holds {type(value).__name__}, such as {str(value)[:40]}; "
            "labels are text, numbers, or lists of these"
        )
    return value if value != "" else None


def merged(values: list[Any], places: np.ndarray) -> Stored:
    """A column with each value once, and without those that no row has; True is another value than 1, but 1.0 is none."""
    used = (np.bincount(places, minlength=len(values)) > 0).tolist()
    number: dict[Any, int] = {}
    new = [
        number.setdefault((True, value) if value is True or value is False else value, len(number))
        if used[place]
        else 0
        for place, value in enumerate(values)
    ]
    distinct = [key[1] if isinstance(key, tuple) else key for key in number]
    return Stored(distinct, np.array(new, dtype=np.int64)[places])


BOOL_SPELLINGS = (("False", "True"), ("false", "true"), ("FALSE", "TRUE"), ("0", "1"))


def spell_alike(splits: dict[str, Stored]) -> dict[str, Stored]:
    """The labels of all splits in one kind: if one is text, all are; and whole floats are integers."""
    texts = {value for stored in splits.values() for value in stored.values if isinstance(value, str)}
    no, yes = next((pair for pair in BOOL_SPELLINGS if texts & {*pair}), BOOL_SPELLINGS[0])

    def spell(value: Any) -> Any:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not texts or value is None:
            return value
        return (yes if value else no) if isinstance(value, bool) else str(value)

    return {split: stored.replaced([spell(value) for value in stored.values]) for split, stored in splits.items()}
