"""From an alias, a Hub id, a folder or files to splits of token ids that a model can be trained on."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features
from datasets.utils import tqdm

from lib.config.sections import CLASSIFICATION, REGRESSION, DataConfig
from lib.data.batching import count_windows, permutation
from lib.data.catalog import ROLES, catalog_entry, dataset_name, own_files
from lib.data.columns import check_columns, choose_splits, find_columns, find_soft
from lib.data.labels.problem_types import encode_targets, find_problem
from lib.data.labels.soft_label import encode_soft_labels, soft_problem
from lib.data.labels.targets import as_arrow, feature_of, hard_labels
from lib.data.prepared import (
    find_or_prepare,
    open_table,
    prepared_key,
    read_column,
    read_fields,
    write_fields,
    write_table,
)
from lib.data.sources import data_identity, load_raw
from lib.data.tokenization import choose_windows, stored_windows, token_limit, tokenize, truncation_notes
from lib.data.trained_on import UNKNOWN, TrainedOn
from lib.errors import UserError

CHUNK = 4000
"""Rows that are read, tokenized and written at a time: enough for all cores, little memory even for long texts."""

COMPARED = 100_000
"""Rows of a split whose texts are looked for in train at a time; they are held in memory."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Splits ready for training.

    `texts[split]` holds the text columns as stored. `tokens[split]` holds input_ids (lists of int), labels, and
    token_type_ids if the tokenizer makes them; with windows, a list of these for each text, and num_windows. Labels are
    class numbers (int), numbers (float), or lists of float: multi-hot, or the probabilities of a split with soft labels.
    `lengths[split]` counts the tokens of each text.
    `notes` are sentences for the log.
    """

    name: str
    texts: dict[str, Dataset]
    tokens: dict[str, Dataset]
    lengths: dict[str, np.ndarray]
    label_names: list[str]
    text_columns: tuple[str, ...]
    notes: tuple[str, ...]
    problem_type: str = CLASSIFICATION
    """As in a transformers configuration."""
    label_columns: tuple[str, ...] = ()
    """Those of splits without soft labels."""
    soft_labels: tuple[str, ...] = ()
    """Where soft labels are, as --soft_labels; empty if no split has any."""
    max_length: int = 0
    """Most tokens that a text, or a window of one, can have."""
    window_stride: int | None = None
    """Tokens that neighboring windows share; None: longer texts are truncated."""
    pad_to_max_length: bool = False

    @property
    def padded_to(self) -> int | None:
        """The length that every batch is padded to; None: that of its longest text."""
        return self.max_length if self.pad_to_max_length else None

    def positions(self, split: str) -> np.ndarray:
        """How many positions each text takes in a batch of equal lengths: its tokens, or its windows of fixed length."""
        if not self.pad_to_max_length:
            return self.lengths[split]
        return count_windows(self.lengths[split], self.max_length) * self.max_length

    def targets(self, split: str) -> np.ndarray:
        """What a model learns of a split: int64 (rows,), float32 (rows,), or float32 (rows, labels), multi-hot or soft."""
        return read_column(self.tokens[split], "labels")

    def labels(self, split: str) -> np.ndarray:
        """The labels of a split that scores count: int64 (rows,), float32 (rows,), or multi-hot float32 (rows, labels)."""
        return hard_labels(self.targets(split), self.problem_type)

    def is_soft(self, split: str) -> bool:
        """Whether the targets of a split are probabilities."""
        if not self.soft_labels:
            return False
        targets = self.targets(split)
        return targets.ndim == 2 if self.problem_type == CLASSIFICATION else not np.isin(targets, (0, 1)).all()

    def fingerprint(self) -> str:
        """Hash of all token ids, labels and label names, in order: equal exactly when the model sees equal data."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for split, tokens in sorted(self.tokens.items()):
            digest.update(f"{split} {len(tokens)} {self.label_names}".encode())
            for batch in tokens.with_format("arrow").iter(batch_size=10_000):
                for column in ("input_ids", "labels"):
                    values = batch[column].combine_chunks()
                    while hasattr(values.type, "value_type"):
                        values = values.flatten()
                    digest.update(values.to_numpy(zero_copy_only=False).tobytes())
            digest.update(self.lengths[split].tobytes())
        return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a program asks of a data set, see `load_data`; it is part of the key of prepared data."""

    splits: Sequence[str]
    label_names: list[str] | None
    model_problem: str | None
    trained_on: TrainedOn


def load_data(
    config: DataConfig,
    tokenizer: Any,
    splits: Sequence[str] = ROLES,
    label_names: list[str] | None = None,
    model_problem: str | None = None,
    trained_on: TrainedOn = UNKNOWN,
) -> Data:
    """Load, check and tokenize a data set, or find what an earlier start made of the same content.

    `splits` are those wanted: a missing validation split is held out from train, a missing test split is left out; with
    all three come further validation splits of the catalog. `label_names` and `model_problem` are the outputs and the
    problem type of an existing model, which the data must fit; the columns it was `trained_on` are used where the data has
    them.

    Raises UserError for whatever is wrong with files, columns, labels or names.
    """
    if (config.fold or "test" not in splits) and own_files(config).keys() > {"test"}:
        config = dataclasses.replace(config, test_file=None)  # not read at all
    identity, trained = data_identity(config), label_names is not None
    asked = Asked(tuple(splits), label_names, model_problem, trained_on)
    windows = stored_windows(tokenizer) if trained else None
    if not (config.soft_labels or config.label_column or config.label_columns):
        config = dataclasses.replace(config, soft_labels=trained_on.soft_labels or None)
    key = None if identity is None else prepared_key(identity, config, tokenizer, windows and windows.stride, asked)

    def prepare(folder: Path) -> None:
        prepare_data(folder, config, tokenizer, asked)
        if data_identity(config) != identity:
            raise UserError("the data were changed while they were read; start again when they are complete")

    data, notes = find_or_prepare(key, prepare, read_data)
    limit = min(config.max_length, tokenizer.model_max_length)
    choose_windows(tokenizer, limit, config.window_stride, len(data.text_columns), trained)
    return dataclasses.replace(data, notes=(*data.notes, *notes)) if notes else data


def prepare_data(folder: Path, config: DataConfig, tokenizer: Any, asked: Asked) -> None:
    """Read, check and tokenize a data set as `load_data` promises, and write into `folder` what `read_data` reads."""
    raw, splits, label_names = load_raw(config), asked.splits, asked.label_names
    text_columns, label_columns, notes = find_columns(raw, config, asked.trained_on)
    entry = catalog_entry(config)
    if entry and splits == ROLES:
        splits = (*splits, *entry.further_validation)
    # A fold is a part of what is left of train after validation.
    raw, unused = choose_splits(raw, config, ROLES[:2] if config.fold else splits)
    notes += unused
    soft, order = find_soft(raw, config.soft_labels or ()), config.label_order or ()
    check_columns(raw, text_columns, label_columns, soft)
    if soft:
        problem, found = soft_problem(config.problem_type, asked.model_problem), tuple[str, ...]()
        targets = encode_soft_labels(raw, soft, label_columns, problem, label_names, order)
    else:
        problem, found = find_problem(
            raw, label_columns, config.problem_type, asked.model_problem, label_names or order
        )
        targets = encode_targets(raw, label_columns, problem, label_names, order)
    labeled = {
        split: Rows(raw[split].select_columns(list(text_columns)).with_format("arrow"), labels)
        for split, labels in targets.labels.items()
    }
    notes += found + targets.notes
    if "train" in labeled and (config.fold or "validation" in splits) and "validation" not in labeled:
        train = labeled["train"]
        held_out = hold_out_validation(train.labels, problem)
        labeled |= {"train": train.take(np.flatnonzero(~held_out)), "validation": train.take(np.flatnonzero(held_out))}
        counts = f"{held_out.sum()} of {len(held_out)} training samples"
        notes += (f"no validation split: {counts} held out, stratified by label",)
    for split in labeled:
        chosen = subsample(len(labeled[split]), split, config)
        labeled[split] = labeled[split] if chosen is None else labeled[split].take(chosen)
    if config.fold:
        number, total = map(int, config.fold.split("/"))
        train = labeled["train"]
        left_out = assign_folds(train.labels, problem, total) == number - 1
        labeled |= {"train": train.take(np.flatnonzero(~left_out)), "test": train.take(np.flatnonzero(left_out))}
        notes += (
            f"fold {config.fold}: {left_out.sum():,} of {len(left_out):,} training samples are left out, and scored as test",
        )
    labeled = {split: labeled[split] for split in splits if split in labeled}
    for split, rows in labeled.items():
        write_table(folder / f"texts-{split}.arrow", rows.dataset.features, rows.texts())
    texts = {split: open_table(folder / f"texts-{split}.arrow") for split in labeled}
    notes += overlap_notes(texts)
    limit = token_limit(tokenizer, config, len(text_columns))
    windows = choose_windows(tokenizer, limit, config.window_stride, len(text_columns), label_names is not None)
    tokens = {}
    with tqdm(total=sum(map(len, texts.values())), desc="tokenize", unit=" texts") as progress:
        for split, rows in labeled.items():
            batches = tokenize(columns_of(texts[split]), tokenizer, limit, windows, config.preprocessing_num_workers)
            tables = label_tables(batches, rows.labels, progress)
            first = next(tables)
            features = Features(Features.from_arrow_schema(first.schema) | {"labels": feature_of(rows.labels)})
            write_table(folder / f"tokens-{split}.arrow", features, itertools.chain([first], tables))
            tokens[split] = open_table(folder / f"tokens-{split}.arrow")
    notes += truncation_notes(tokens, limit, config, windows)
    data = Data(
        name=dataset_name(config),
        **read_splits(folder, list(labeled)),
        label_names=targets.names,
        text_columns=tuple(text_columns),
        label_columns=tuple(label_columns),
        soft_labels=tuple(config.soft_labels or ()) if soft else (),
        notes=notes,
        problem_type=problem,
        max_length=windows.max_length if windows else limit,
        window_stride=windows.stride if windows else None,
        pad_to_max_length=config.pad_to_max_length,
    )
    in_tables = ("texts", "tokens", "lengths")
    fields = {
        field.name: getattr(data, field.name) for field in dataclasses.fields(Data) if field.name not in in_tables
    }
    write_fields(folder, {"fields": fields, "splits": list(labeled), "fingerprint": data.fingerprint()})


def read_data(folder: Path) -> Data:
    """What `prepare_data` wrote, mapped into memory."""
    stored = read_fields(folder)
    data = Data(**stored["fields"], **read_splits(folder, stored["splits"]))
    data.__dict__["_fingerprint"] = stored["fingerprint"]
    return data


def read_splits(folder: Path, splits: Sequence[str]) -> dict[str, Any]:
    """The fields of Data that are tables."""
    tokens = {split: open_table(folder / f"tokens-{split}.arrow") for split in splits}
    return {
        "texts": {split: open_table(folder / f"texts-{split}.arrow") for split in splits},
        "tokens": {split: table.remove_columns(["length", "truncated"]) for split, table in tokens.items()},
        "lengths": {split: read_column(table, "length") for split, table in tokens.items()},
    }


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a stored split: its text columns as Arrow tables, the labels of the rows, and which rows, in stored order.

    Where `chosen` is None these are all rows.
    """

    dataset: Dataset
    labels: np.ndarray
    chosen: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, places: np.ndarray) -> "Rows":
        """The rows at `places`, which ascend."""
        return Rows(self.dataset, self.labels[places], places if self.chosen is None else self.chosen[places])

    def texts(self) -> Iterator[pa.Table]:
        """The text columns, a few rows at a time."""
        for start in range(0, len(self.dataset), CHUNK):
            stop = start + CHUNK
            if self.chosen is None:
                yield self.dataset[start:stop]
            else:
                first, last = np.searchsorted(self.chosen, [start, stop])
                if first < last:
                    yield self.dataset[start:stop].take(self.chosen[first:last] - start)


def columns_of(texts: Dataset) -> Iterator[list[list[str]]]:
    """A list of texts for each column, a few rows at a time."""
    for table in texts.with_format("arrow").iter(CHUNK):
        yield [column.to_pylist() for column in table.columns]


def label_tables(tables: Iterator[pa.Table], labels: np.ndarray, progress: Any) -> Iterator[pa.Table]:
    """`tables` with the labels of their rows."""
    start = 0
    for table in tables:
        column = as_arrow(labels[start : start + len(table)])
        start += len(table)
        progress.update(len(table))
        yield table.add_column(0, "labels", column)


def hold_out_validation(labels: np.ndarray, problem: str) -> np.ndarray:
    """bool (rows,): every tenth sample of each class; the same for all seeds, so that their runs can be compared.

    Of numbers, every tenth in sorted order; of multi-label rows, every tenth of each set of labels. The only sample of a
    class, or of a set, stays in train. Raises UserError when nothing is left to hold out.
    """
    kinds, order = by_label(labels, problem)
    if problem != REGRESSION:
        order = order[np.bincount(kinds)[kinds[order]] > 1]
    if len(order) < 2:
        raise UserError(
            "no class of the train split has two rows, so that no validation split can be held out; "
            "give a validation split, or more rows"
        )
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[order[min(5, len(order) - 1) :: 10]] = True
    return held_out


def assign_folds(labels: np.ndarray, problem: str, total: int) -> np.ndarray:
    """int64 (rows,): the fold of each row, 0 to `total` - 1, with every class in all folds as far as it has rows.

    The same for all seeds. Raises UserError if there are fewer rows than folds.
    """
    if len(labels) < total:
        raise UserError(f"--fold of {total}: the train split has {len(labels)} rows only")
    _, order = by_label(labels, problem)
    folds = np.empty(len(labels), dtype=np.int64)
    folds[order] = np.arange(len(labels)) % total
    return folds


def by_label(labels: np.ndarray, problem: str) -> tuple[np.ndarray, np.ndarray]:
    """What is stratified by, and the rows in an order of it that is random within equal ones: both (rows,)."""
    labels = hard_labels(labels, problem)
    kinds = labels if problem == REGRESSION else np.unique(labels, axis=0, return_inverse=True)[1].ravel()
    order = permutation(len(labels), 0)
    return kinds, order[np.argsort(kinds[order], kind="stable")]


def subsample(total: int, split: str, config: DataConfig) -> np.ndarray | None:
    """At most --max_train_samples or --max_eval_samples of `total` rows: a fixed random choice, in stored order.

    None: all of them.
    """
    limit = config.max_train_samples if split == "train" else config.max_eval_samples
    if limit is None or limit >= total:
        return None
    return np.sort(permutation(total, 0)[:limit])


def overlap_notes(splits: dict[str, Dataset]) -> tuple[str, ...]:
    """How many texts of the other splits are in train as well, where there are any."""
    notes = []
    for split, dataset in splits.items():
        count = count_shared(dataset, splits["train"]) if split != "train" and "train" in splits else 0
        if count:
            notes.append(f"warning: {count} of {len(dataset)} {split} texts are in train as well")
    return tuple(notes)


def count_shared(texts: Dataset, train: Dataset) -> int:
    """How many rows of `texts` have a text, or a pair of texts, that is in `train` as well."""
    shared = 0
    for wanted in map(joined_texts, texts.with_format("arrow").iter(COMPARED)):
        values = wanted.unique()
        seen = np.zeros(len(values), dtype=bool)
        for part in map(joined_texts, train.with_format("arrow").iter(max(CHUNK, len(values)))):
            seen[pc.index_in(part, values).drop_null().to_numpy()] = True
        shared += int(seen[pc.index_in(wanted, values).to_numpy()].sum())
    return shared


def joined_texts(table: pa.Table) -> pa.ChunkedArray:
    """One text for each row; of a pair, both with the length of the first before them, so that no two pairs are alike."""
    columns = [column.cast(pa.large_string()) for column in table.columns]
    if len(columns) == 1:
        return columns[0]
    sizes = pc.utf8_length(columns[0]).cast(pa.large_string())
    return pc.binary_join_element_wise(sizes, *columns, pa.scalar(" ", pa.large_string()))
