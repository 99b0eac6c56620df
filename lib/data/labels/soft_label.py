"""Soft labels: a probability for each class or label, as several annotators or another model give them."""

import ast
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION
from lib.data.labels.names import check_names, in_order, listed, match_model, put_in_order, resembling, shown
from lib.data.labels.numerals import read_number
from lib.data.labels.problem_types import encode_targets
from lib.data.labels.single_label import NAME_COLUMNS
from lib.data.labels.stored import arrow_column, read_column
from lib.data.labels.targets import Targets, check_labeled
from lib.errors import UserError, require

TOLERANCE = 1e-3
"""Probabilities of a row may miss 1 by as much in sum, since they are written rounded; they are then divided by it."""


@dataclasses.dataclass(frozen=True)
class Table:
    """What is stored for each row and class: float64 (rows, names), 0 where a row leaves a class out.

    `names` is None where the values are lists; `missing`: bool (rows,), whether a row has nothing at all.
    """

    names: list[str] | None
    values: np.ndarray
    missing: np.ndarray


def soft_columns(dataset: Dataset, wanted: Sequence[str]) -> tuple[str, ...]:
    """The columns that hold the soft labels of a split; none where it has hard labels only, or no value in them.

    They are those `wanted` (--soft_labels) or, for a single name, the columns NAME/CLASS, as predict.py writes them to csv.
    Raises UserError where the split has some of them only.
    """
    there = [column for column in wanted if column in dataset.features]
    if len(wanted) == 1 and not there:
        there = [column for column in dataset.features if column.startswith(f"{wanted[0]}/")]
    elif there and len(there) < len(wanted):
        lacking = next(column for column in wanted if column not in there)
        hint = resembling(lacking, dataset.features)
        raise UserError(
            f"--soft_labels {shown(lacking)}: a split that has {listed(there)} has no such column; it has: "
            f"{listed(dataset.features)}{hint}"
        )
    empty = all(arrow_column(dataset, column).null_count == len(dataset) for column in there)
    return () if empty else tuple(there)


def soft_problem(wanted: str, model_problem: str | None) -> str:
    """The problem type: that of --problem_type or of the model, else single-label. Raises UserError for regression."""
    problem = wanted if wanted != "auto" else model_problem or CLASSIFICATION
    if model_problem not in (None, problem) or problem == REGRESSION:
        kind = (model_problem or problem).replace("_", " ")
        raise UserError(f"--soft_labels are probabilities of classes or labels, and the model is for {kind}")
    return problem


def encode_soft_labels(
    splits: dict[str, Dataset],
    soft: dict[str, tuple[str, ...]],
    label_columns: tuple[str, ...],
    problem: str,
    model_names: list[str] | None = None,
    order: Sequence[str] = (),
) -> Targets:
    """Probabilities, float32 (rows, names), of the splits with columns in `soft`; the labels of the others as they are.

    A row of single-label classification sums to 1; the probabilities of a multi-label row are independent. Whole numbers
    that sum to more than 1 are votes, and divided by their sum. Classes are those of the train split, in the order of
    `order` (--label_order), of the columns, of the rows where all list them alike, or sorted; or those of a model.

    Raises UserError, with the row, for what is no probability, rows without any, and classes that train does not have.
    """
    notes, labels, tables = tuple[str, ...](), dict[str, np.ndarray](), dict[str, Table]()
    for split, columns in soft.items():
        table = read_table(splits[split], columns, split)
        check_labeled(table.missing, split, shown(columns[0]))
        names = table.names or list(order or model_names or ())
        if table.values.shape[1] != len(names):
            raise UserError(
                f"--soft_labels {shown(columns[0])} holds lists of {table.values.shape[1]} numbers in the {split} split, for "
                f"{len(names) or 'unnamed'} classes; name them in the order of the lists with --label_order"
            )
        check_names(names, columns[0])
        values, noted = check_probabilities(table.values, split, columns, problem)
        tables[split], notes = Table(names, values, table.missing), (*notes, *noted)
    hard = {split: dataset for split, dataset in splits.items() if split not in soft}
    outputs = list(model_names or ())
    if model_names is None and "train" in soft:
        names = tables["train"].names or []
        outputs = [names[place] for place in put_in_order(names, order)] if order else names
        require(len(outputs) > 1, f"--soft_labels has one class only, {listed(outputs)}; a classifier needs two")
        if hard:  # their labels must be among the classes of train
            known = {"train": every_class(outputs, label_columns, problem)}
            spelled = {split: spell_labels(dataset, label_columns, outputs) for split, dataset in hard.items()}
            found = encode_targets(spelled | known, label_columns, problem, None, outputs)
            labels = {split: found.labels[split] for split in hard if split in found.labels}
            notes += found.notes
    elif hard:
        found = encode_targets(hard, label_columns, problem, model_names, order)
        labels, outputs, notes = dict(found.labels), found.names, notes + found.notes
    for split, table in tables.items():
        places, names = dict(zip(outputs, range(len(outputs)), strict=True)), table.names or []
        if model_names is not None:
            matched, outputs, noted = match_model(names, model_names, order)
            places, notes = dict(zip(names, matched, strict=True)), notes + noted
        unknown = [name for name in names if name not in places]
        if unknown:
            row = int(np.argmax(table.values[:, names.index(unknown[0])] > 0)) + 1
            raise UserError(
                f"the soft labels of the {split} split have the class {shown(unknown[0])} (row {row}), which is not among "
                f"{listed(outputs)}{resembling(unknown[0], outputs)}"
            )
        labels[split] = np.zeros((len(table.values), len(outputs)), dtype=np.float32)
        labels[split][:, [places[name] for name in names]] = table.values
        notes += (describe(labels[split], split, soft[split], problem),)
    if "train" in tables:
        unused = [name for name, total in zip(outputs, labels["train"].sum(axis=0), strict=True) if not total]
        notes += (f"warning: no train row gives {listed(unused)} any probability",) if unused else ()
    return Targets({split: labels[split] for split in splits if split in labels}, outputs, notes)


def spell_labels(dataset: Dataset, columns: tuple[str, ...], names: list[str]) -> Dataset:
    """A split with its integer labels replaced by a column such as label_text, where that has the names of the classes."""
    spelled = next((name for name in NAME_COLUMNS if name in dataset.features), None)
    if len(columns) > 1 or spelled is None or not isinstance(dataset.features[columns[0]], Value):
        return dataset
    known = set(map(str, read_column(dataset, columns[0]).present)) <= set(names)
    return dataset if known else dataset.remove_columns(columns[0]).rename_column(spelled, columns[0])


def every_class(names: list[str], columns: tuple[str, ...], problem: str) -> Dataset:
    """Hard labels in which each class occurs."""
    if problem == MULTI_LABEL:
        several = {column: np.arange(len(columns)) == place for place, column in enumerate(columns)}
        return Dataset.from_dict(several if len(columns) > 1 else {columns[0]: [[name] for name in names]})
    return Dataset.from_dict(
        {column: range(len(names)) for column in columns},
        features=Features({column: ClassLabel(names=names) for column in columns}),
    )


def read_table(dataset: Dataset, columns: tuple[str, ...], split: str) -> Table:
    """The stored numbers of a split. Raises UserError, with the row, for what is no number."""
    if len(columns) > 1:
        numbers, prefix = np.zeros((len(dataset), len(columns))), columns[0].partition("/")[0] + "/"
        for place, column in enumerate(columns):
            if not isinstance(dataset.features[column], Value):
                raise UserError(f"--soft_labels {shown(column)}: the {split} split holds no numbers there")
            stored = read_column(dataset, column)
            found = [to_number(value) for value in stored.values]
            for value, number in zip(stored.values, found, strict=True):
                if number is None and value is not None:
                    row = stored.row(stored.values.index(value))
                    raise UserError(
                        f"--soft_labels {shown(column)}: row {row} of the {split} split holds {value!r}; give probabilities"
                    )
            numbers[:, place] = np.array([np.nan if number is None else number for number in found])[stored.places]
        named = all(column.startswith(prefix) for column in columns)
        names = [column.removeprefix(prefix) if named else column for column in columns]
        return Table(
            names, np.nan_to_num(numbers, posinf=np.inf, neginf=-np.inf), np.asarray(np.isnan(numbers).any(axis=1))
        )
    rows = [
        read_row(value, f"the {shown(columns[0])} of row {row} of the {split} split")
        for row, value in enumerate(dataset.select_columns([columns[0]])[:][columns[0]], 1)
    ]
    missing = np.array([not row for row in rows], dtype=bool)
    forms = {row: len(given) if isinstance(given, list) else 0 for row, given in enumerate(rows, 1) if given}
    width = next(iter(forms.values()), 0)
    other = next((row for row, form in forms.items() if form != width), None)
    if other is not None:
        raise UserError(
            f"--soft_labels {shown(columns[0])}: row {other} of the {split} split has another form, or another length, than "
            "those before it; give each row a number for each class"
        )
    if width:
        values = np.zeros((len(rows), width))
        values[~missing] = np.array([row for row in rows if row])
        return Table(None, values, missing)
    by_name = [row for row in rows if isinstance(row, dict) and row]
    orders = {tuple(row) for row in by_name}
    names = list(orders.pop()) if len(orders) == 1 else in_order({name for row in by_name for name in row})
    places = {name: place for place, name in enumerate(names)}
    values = np.zeros((len(rows), len(names)))
    for given, known in zip(rows, values, strict=True):
        if isinstance(given, dict):
            known[[places[name] for name in given]] = list(given.values())
    return Table(names, values, missing)


def read_row(value: Any, where: str) -> dict[str, float] | list[float] | None:
    """Numbers by class or by position; None for a row without any. Raises UserError for what holds no numbers.

    Read are {class: number}, [{"label": class, "score": number}, ...] as pipelines of transformers return it, and lists of
    numbers; also as text, in JSON or as Python writes it.
    """
    found = value
    if isinstance(value, str):
        for parse in (json.loads, ast.literal_eval):
            try:
                found = parse(value)
                break
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    if isinstance(found, list) and found and all(isinstance(item, dict) for item in found):
        pairs = [(item.get("label"), item.get("score")) for item in found]
        found = dict(pairs) if len(dict(pairs)) == len(pairs) else value
    if isinstance(found, dict):
        numbers = {str(name): to_number(item) for name, item in found.items() if item is not None}
        if None not in numbers.values() and None not in found:
            return {name: number for name, number in numbers.items() if number is not None}
    elif isinstance(found, list):
        items = [to_number(item) for item in found]
        if None not in items:
            return [item for item in items if item is not None]
    elif found is None:
        return None
    raise UserError(
        f"{where} is {str(value)[:80]!r}; soft labels are {{class: probability}}, or a list with a probability for each class"
    )


def to_number(value: Any) -> float | None:
    """A number that is one, or is written as text; None for all else."""
    if isinstance(value, str):
        return read_number(value)
    return float(value) if isinstance(value, int | float) and value == value else None


def check_probabilities(
    values: np.ndarray, split: str, columns: tuple[str, ...], problem: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Probabilities in [0, 1], of single-label rows with the sum 1, and a note on votes. Raises UserError with the row."""
    where, notes = f"--soft_labels {shown(columns[0])}: row", tuple[str, ...]()
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)).all(axis=1))
    if len(wrong):
        number = values[wrong[0]][~(np.isfinite(values[wrong[0]]) & (values[wrong[0]] >= 0))][0]
        raise UserError(
            f"{where} {wrong[0] + 1} of the {split} split holds {number:g}; a probability lies between 0 and 1 (logits are "
            "none: let predict.py write probabilities, without --function_to_apply none)"
        )
    sums = values.sum(axis=1)
    if problem == MULTI_LABEL:
        beyond = np.flatnonzero((values > 1).any(axis=1))
        if len(beyond):
            raise UserError(
                f"{where} {beyond[0] + 1} of the {split} split holds {values[beyond[0]].max():g}; the probability of a "
                "label lies between 0 and 1"
            )
        return values, notes
    if (values == np.floor(values)).all() and (sums > 1).any() and (sums > 0).all():
        notes = (
            f"the whole numbers in {listed(columns)} of {split} are votes, and are divided by their sum in each row",
        )
    else:
        off = np.flatnonzero(np.abs(sums - 1) > max(TOLERANCE, 1e-6 * values.shape[1]))
        if len(off):
            short = " (with --top_k, predict.py leaves probabilities out)" if sums[off[0]] < 1 else ""
            raise UserError(
                f"{where} {off[0] + 1} of the {split} split has probabilities that sum to {sums[off[0]]:.6g}, not to 1"
                f"{short}. Where labels do not exclude each other, give --problem_type multi_label_classification"
            )
    return values / sums[:, None], notes


def describe(labels: np.ndarray, split: str, columns: tuple[str, ...], problem: str) -> str:
    """What is read as the soft labels of a split, and how its scores count them."""
    if problem == MULTI_LABEL:
        return f"soft labels of {split}: {listed(columns)}; scores count labels with a probability of 0.5 or more"
    ranked = np.sort(labels, axis=1)
    ties = int((ranked[:, -1] == ranked[:, -2]).sum())
    tied = f", of equal ones ({ties:,} rows) the first" if ties else ""
    return f"soft labels of {split}: {listed(columns)}; scores count the most probable class{tied}"
