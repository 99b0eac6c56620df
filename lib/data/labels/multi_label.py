"""Multi-label classification: from lists of names or numbers, from multi-hot lists, or from a 0/1 column for each label."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Value

from lib.data.labels.names import (
    check_names,
    flag_values,
    in_order,
    is_blank,
    listed,
    look_alike_notes,
    match_model,
    put_in_order,
    quoted,
    resembling,
)
from lib.data.labels.numerals import INTEGER
from lib.data.labels.single_label import name_of
from lib.data.labels.stored import Stored, arrow_column, merged, read_array, read_column, spell_alike
from lib.data.labels.targets import LEFT_OUT, Targets, check_labeled, has_no_labels, hide_marks
from lib.data.labels.text_lists import find_separator, is_broken_list, read_list, split_at
from lib.errors import UserError


@dataclasses.dataclass(frozen=True)
class LabelSets:
    """The labels of a split: `labels` holds those of all rows one after another, `sizes` how many each row has.

    sizes: int64 (rows,); missing: bool (rows,), whether a row is unlabeled. A labeled row may have no label.
    """

    labels: Stored
    sizes: np.ndarray
    missing: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """The row of each label, from 0."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    @property
    def positions(self) -> np.ndarray:
        """The place of each label in its list, from 0."""
        return np.arange(len(self.labels)) - np.repeat(np.cumsum(self.sizes) - self.sizes, self.sizes)

    def row_of(self, place: int) -> int:
        """The first row with the label at `place` of the distinct ones, counted from 1."""
        return int(self.rows[self.labels.row(place) - 1]) + 1


def encode_label_sets(
    splits: dict[str, Dataset],
    columns: tuple[str, ...],
    model_names: list[str] | None = None,
    order: Sequence[str] = (),
) -> Targets:
    """Multi-hot vectors: 0.0 or 1.0 for each label, float32. A row may have no label at all.

    Names come from a ClassLabel, from the lists themselves, or are those of the columns; lists may be written as text.
    Their order is that of the ClassLabel, of `order` (--label_order), of the columns, or sorted. With `model_names`, labels
    and their order are those of an existing model. A test split without any label is left out.

    Raises UserError for unlabeled rows, labels that are not in train, and fewer than two labels.
    """
    column, notes = " ".join(columns), tuple[str, ...]()
    if len(columns) > 1:
        sets = {split: read_flags(dataset, columns, split) for split, dataset in splits.items()}
    else:
        sets, notes = read_label_sets(splits, column, model_names or order)
    for split, given in list(sets.items()):
        if has_no_labels(split, given.missing | (given.sizes == 0), sets):
            notes, sets = (*notes, LEFT_OUT), {other: kept for other, kept in sets.items() if other != split}
            continue
        check_labeled(
            given.missing, split, column, "" if len(columns) > 1 else "; write [] for a row without any label"
        )
    known = {"train": sets["train"]} if "train" in sets else sets
    classes = None if len(columns) > 1 else class_names(splits[next(iter(known))], column)
    counted = len(model_names) if model_names is not None else len(classes) if classes is not None else None
    width = None if len(columns) > 1 else multi_hot_width(sets, known, counted)
    if width is not None:
        sets = {split: by_position(given, width, split, column) for split, given in sets.items()}
        values, names = list[Any](range(width)), classes or [str(place) for place in range(width)]
        notes += (f"the lists of {column} hold 0 or 1 for each of {width} labels by position",)
    elif len(columns) > 1:
        values = names = list(columns)
    else:
        sets = name_labels(splits, sets, column)
        known = {split: sets[split] for split in known}
        values = classes or in_order({value for given in known.values() for value in given.labels.present})
        names = [str(value) for value in values]
        rows = sum(len(given.labels) for given in known.values())
        if len(values) > max(50, rows):
            raise UserError(f"--label_column {column} has {len(values)} different labels; is it the label?")
    check_names(names, column)
    if model_names is not None:
        by_number = None if any(map(is_text, values)) else [int(value) for value in values]
        if classes and len(classes) == len(model_names):
            by_number = list(range(len(classes)))
        places, outputs, matched = match_model(names, model_names, order, by_number)
        notes += matched
        if len(columns) > 1 and len(places) < len(outputs):
            lacking = [name for place, name in enumerate(outputs) if place not in places]
            raise UserError(
                f"--label_columns {column}: the model also has the labels {', '.join(lacking)}; name them all"
            )
    else:
        sequence = put_in_order(names, order) if order else list(range(len(names)))
        places, outputs = np.argsort(sequence).tolist(), [names[place] for place in sequence]
    if len(outputs) < 2:
        raise UserError(
            f"--label_column {column} has {len(outputs)} label only, but multi-label classification needs at least two; "
            "use single-label classification with two classes"
        )
    number_of = dict(zip(values, places, strict=True))
    encoded = {split: multi_hot(given, number_of, len(outputs), split, column) for split, given in sets.items()}
    counts = sum(encoded[split].sum(axis=0, dtype=np.int64) for split in known)
    by_name = dict(zip(outputs, np.asarray(counts).tolist(), strict=True))
    notes += look_alike_notes({name: count for name, count in by_name.items() if count})
    unused = [name for name, count in by_name.items() if not count]
    if "train" in encoded and unused:
        notes += (f"warning: no train row has the label {listed(unused)}",)
    return Targets(encoded, outputs, notes)


def read_flags(dataset: Dataset, columns: tuple[str, ...], split: str) -> LabelSets:
    """The labels of each row by a column of 0 and 1 for each. Raises UserError with the row for another value."""
    given = np.zeros((len(dataset), len(columns)), dtype=bool)
    missing = np.zeros(len(dataset), dtype=bool)
    for number, column in enumerate(columns):
        if not isinstance(dataset.features[column], ClassLabel | Value):
            raise UserError(f"--label_columns {column}: the {split} split holds lists; these columns hold 0 or 1")
        stored = read_column(dataset, column)
        flags = [FLAGS.get(str(value).strip(" ").lower()) for value in stored.values]
        for place, flag in enumerate(flags):
            if flag is None:
                raise UserError(
                    f"--label_columns {column}: row {stored.row(place)} of the {split} split holds "
                    f"{stored.values[place]!r}; these columns hold 0 or 1. Probabilities are given with --soft_labels "
                    f"{flag_values(columns)}"
                )
        kinds = np.array(flags, dtype=np.int64)[stored.places]
        given[:, number] = kinds == 1
        missing |= kinds == -1
    return LabelSets(Stored(list(columns), np.nonzero(given)[1]), given.sum(axis=1), missing)


FLAGS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "none": -1, "-1": -1, "-1.0": -1}
"""What the values of a 0/1 column mean; -1: the row is unlabeled."""


def read_label_sets(
    splits: dict[str, Dataset], column: str, names: Sequence[str]
) -> tuple[dict[str, LabelSets], tuple[str, ...]]:
    """The labels of each row as stored, and notes on how text was split. A single value is a list of one."""
    sets, texts = dict[str, LabelSets](), dict[str, Stored]()
    for split, dataset in splits.items():
        feature = dataset.features[column]
        if isinstance(feature, Value) and "string" in feature.dtype:
            texts[split] = read_column(dataset, column)
        elif isinstance(feature, ClassLabel | Value):
            stored = read_column(dataset, column)
            sets[split] = LabelSets(stored, np.ones(len(stored), dtype=np.int64), stored.missing)
        else:
            sets[split] = read_lists(dataset, column, split)
    bare = {text for stored in texts.values() for text in stored.present if read_list(text) is None}
    separator = find_separator(bare, names)
    sets |= {split: read_texts(stored, separator, split, column) for split, stored in texts.items()}
    notes = tuple[str, ...]()
    if texts:
        total = sum(map(len, texts.values()))
        several = sum(int((sets[split].sizes > 1).sum()) for split in texts)
        bracketed = any(value not in bare for stored in texts.values() for value in stored.present)
        how = ["lists in brackets"] * bracketed + [f"labels between {separator!r}"] * bool(separator)
        found = " and ".join(how) or "one label each, since none of | ; , separates several"
        notes = (f"the text in {column} is read as {found}: {several:,} of {total:,} rows have several labels",)
    sets = {split: sets[split] for split in splits}
    for split, given in sets.items():
        for place, value in enumerate(given.labels.values):
            if not (value is None or isinstance(value, str | int) or (isinstance(value, float) and value.is_integer())):
                raise UserError(
                    f"the {column} of row {given.row_of(place)} of the {split} split is or holds {value}; "
                    "give lists of names, or of 0 and 1"
                )
    hidden, _ = hide_marks({split: given.labels for split, given in sets.items()}, names)
    return {split: with_missing(given, hidden[split]) for split, given in sets.items()}, notes


def with_missing(given: LabelSets, labels: Stored) -> LabelSets:
    """The sets with these labels, where a row with a missing one counts as unlabeled."""
    missing = given.missing.copy()
    missing[given.rows[labels.missing]] = True
    return LabelSets(labels, given.sizes, missing)


def read_lists(dataset: Dataset, column: str, split: str) -> LabelSets:
    """The labels of a column of lists. Raises UserError for lists of lists and the like."""
    feature = dataset.features[column]
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
    if not isinstance(inner, ClassLabel | Value):
        kind = "records" if isinstance(feature, dict) else f"lists of {inner}" if inner else type(feature).__name__
        raise UserError(f"--label_column {column}: the {split} split holds {kind}; give lists of names or numbers")
    array = arrow_column(dataset, column)
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    sizes = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    missing = array.is_null().to_numpy(zero_copy_only=False)
    return LabelSets(read_array(pc.list_flatten(array), column), sizes, missing)


def read_texts(stored: Stored, separator: str | None, split: str, column: str) -> LabelSets:
    """The labels of a column of text: lists in brackets, or labels with a separator between them."""
    items = list[Any]()
    starts, sizes = list[int](), list[int]()
    for value in stored.values:
        found = [] if value is None else read_list(value)
        if found is None and is_broken_list(value):
            raise UserError(
                f"row {stored.row(len(starts))} of the {split} split has the {column} {value[:80]!r}, which is no list; "
                "is a quote or bracket missing? Write ['a', 'b'], a|b or a,b"
            )
        if found is None:
            found = split_at(value, separator) if separator else [value]
        starts.append(len(items))
        sizes.append(len(found))
        items += found
    for place, value in enumerate(stored.values):
        if value is not None and any(
            isinstance(item, list | dict) for item in items[starts[place] : starts[place] + sizes[place]]
        ):
            raise UserError(
                f"row {stored.row(place)} of the {split} split has the {column} {value!r}; give lists of names or numbers"
            )
    items = [int(item) if isinstance(item, str) and INTEGER.fullmatch(item) else item for item in items]
    row_sizes, row_starts = np.array(sizes, np.int64)[stored.places], np.array(starts, np.int64)[stored.places]
    within = np.arange(row_sizes.sum()) - np.repeat(np.cumsum(row_sizes) - row_sizes, row_sizes)
    return LabelSets(merged(items, np.repeat(row_starts, row_sizes) + within), row_sizes, stored.missing)


def multi_hot_width(sets: dict[str, LabelSets], known: dict[str, LabelSets], counted: int | None) -> int | None:
    """The length of multi-hot lists; None where the lists hold the labels themselves.

    Multi-hot lists hold only 0 and 1, and some row repeats a number, which lists of labels never do. Where each row of all
    splits is [0, 1] or [1, 0], they are multi-hot too: lists of labels would give every row all labels. `counted` is the
    number of labels of a model or ClassLabel. Raises UserError where it is another.
    """
    known_sizes = np.concatenate([given.sizes[given.sizes > 0] for given in known.values()])
    if not len(known_sizes) or not all(holds_zero_one(given) for given in known.values()):
        return None
    width = int(np.bincount(known_sizes).argmax())
    if any(map(repeats_a_number, known.values())):
        if counted not in (None, width):
            raise UserError(f"the label lists hold {width} numbers of 0 and 1, but there are {counted} labels")
        return width
    pairs = all(holds_zero_one(given) and (given.sizes[~given.missing] == 2).all() for given in sets.values())
    return 2 if pairs and counted in (None, 2) else None


def holds_zero_one(given: LabelSets) -> bool:
    return all(not isinstance(value, str) and value in (0, 1) for value in given.labels.present)


def repeats_a_number(given: LabelSets) -> bool:
    """Whether some row of 0 and 1 holds one of them twice."""
    truth = np.array([bool(value) for value in given.labels.values], dtype=bool)[given.labels.places]
    ones = np.bincount(given.rows[truth], minlength=len(given.sizes))
    return bool(((ones > 1) | (given.sizes - ones > 1)).any())


def by_position(given: LabelSets, width: int, split: str, column: str) -> LabelSets:
    """The positions that hold a 1 as labels. Raises UserError with the row for a list of another length or number."""
    other = np.flatnonzero((given.sizes != width) & ~given.missing)
    if len(other):
        raise UserError(
            f"the {column} of row {other[0] + 1} of the {split} split holds {given.sizes[other[0]]} numbers for "
            f"{width} labels"
        )
    for place, value in enumerate(given.labels.values):
        if value is not None and (isinstance(value, str) or value not in (0, 1)):
            raise UserError(
                f"the {column} of row {given.row_of(place)} of the {split} split holds {value!r}; these lists hold 0 or 1"
            )
    truth = np.array([bool(value) for value in given.labels.values], dtype=bool)[given.labels.places]
    sizes = np.bincount(given.rows[truth], minlength=len(given.sizes))
    return LabelSets(Stored(list(range(width)), given.positions[truth]), sizes, given.missing)


def class_names(dataset: Dataset, column: str) -> list[str] | None:
    """The names of a ClassLabel, or of a list of them."""
    feature = class_feature(dataset, column)
    return None if feature is None else list(feature.names)


def class_feature(dataset: Dataset, column: str) -> ClassLabel | None:
    feature = dataset.features[column]
    inner = getattr(feature, "feature", feature)
    return inner if isinstance(inner, ClassLabel) else None


def name_labels(splits: dict[str, Dataset], sets: dict[str, LabelSets], column: str) -> dict[str, LabelSets]:
    """The sets with the names of a ClassLabel for its numbers, and labels of one kind in all splits.

    Raises UserError, with the row, for a blank label.
    """
    named = {}
    for split, given in sets.items():
        feature, labels = class_feature(splits[split], column), given.labels
        named[split] = (
            labels.replaced([name_of(value, feature, column) for value in labels.values]) if feature else labels
        )
        for place, value in enumerate(labels.values):
            if isinstance(value, str) and is_blank(value):
                raise UserError(f"row {given.row_of(place)} of the {split} split has a blank {column}, {quoted(value)}")
    labels_of = spell_alike(named)
    return {split: dataclasses.replace(given, labels=labels_of[split]) for split, given in sets.items()}


def multi_hot(given: LabelSets, number_of: dict[Any, int], outputs: int, split: str, column: str) -> np.ndarray:
    """float32 (rows, outputs). Raises UserError, with the row, for a label that is none of the model or of train."""
    numbers = [number_of.get(value, -1) for value in given.labels.values]
    if -1 in numbers:
        place = min((place for place, number in enumerate(numbers) if number == -1), key=given.row_of)
        value = given.labels.values[place]
        hint = resembling(value, filter(is_text, number_of)) if isinstance(value, str) else ""
        raise UserError(
            f"row {given.row_of(place)} of the {split} split has the {column} {value!r}, which is not among "
            f"{listed(number_of)}{hint}"
        )
    matrix = np.zeros((len(given.sizes), outputs), dtype=np.float32)
    matrix[given.rows, np.array(numbers, dtype=np.int64)[given.labels.places]] = 1
    return matrix


def is_text(value: Any) -> bool:
    return isinstance(value, str)
