"""Splits, label names and token ids: from an alias, a Hub id, a folder or files to data a model can be trained on."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from lib.config.sections import CLASSIFICATION, REGRESSION, DataConfig
from lib.data.batching import count_windows, permutation
from lib.data.catalog import dataset_name, further_splits
from lib.data.columns import find_columns, select_splits
from lib.data.labels.targets import encode_targets
from lib.data.sources import ROLES, load_raw
from lib.data.tokenization import (
    choose_windows,
    report_truncation,
    tokenize,
)
from lib.errors import UserError


@dataclasses.dataclass(frozen=True)
class Data:
    """Splits ready for training.

    `texts[split]` holds the text columns as given; `tokens[split]` holds input_ids (lists of int), labels, and
    token_type_ids where the tokenizer makes them; where texts are read in windows, a list of each for every window, and
    num_windows. Labels are int for classes, float for numbers, lists of 0.0 and 1.0 for several labels.
    `lengths[split]` counts tokens. `notes` are sentences for the log.
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
    max_length: int = 0
    """Tokens of the longest text, or window, that is possible."""
    pad_to_max_length: bool = False

    @property
    def padded_to(self) -> int | None:
        """Length of every batch; None: that of its longest text."""
        return self.max_length if self.pad_to_max_length else None

    def positions(self, split: str) -> np.ndarray:
        """Positions that each text takes in a batch of its like: its tokens, or windows of a fixed length."""
        if not self.pad_to_max_length:
            return self.lengths[split]
        return count_windows(self.lengths[split], self.max_length) * self.max_length

    def fingerprint(self) -> str:
        """Hash of all token ids and labels, in order: equal exactly when the model sees equal data."""
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


def load_data(
    config: DataConfig,
    tokenizer: Any,
    splits: Sequence[str] = ROLES,
    label_names: list[str] | None = None,
    model_problem: str | None = None,
) -> Data:
    """Load, check and tokenise the data set that `config` describes.

    `splits` are those wanted; missing ones are made (validation) or left out (test), further validation sets come along.
    With `label_names` and, where it is known, `model_problem`, the outputs of an existing model rule.

    Raises UserError for whatever is wrong with files, columns, labels or names.
    """
    raw, notes = load_raw(config), list[str]()
    text_columns, targets = find_columns(raw, config, notes)
    splits = (*splits, *further_splits(config)) if tuple(splits) == ROLES else splits
    raw = select_splits(raw, config, splits, text_columns, targets)
    labelled, names, problem = encode_targets(raw, targets, config.problem_type, label_names, model_problem, notes)
    if "train" in labelled and "validation" in splits and "validation" not in labelled:
        labelled |= hold_out_validation(labelled["train"], problem, notes)
    labelled = {split: take(labelled[split], split, config) for split in splits if split in labelled}
    report_overlap(labelled, text_columns, notes)
    limit = min(config.max_length, tokenizer.model_max_length)
    windows = choose_windows(tokenizer, limit, config.window_stride, len(text_columns), label_names is not None)
    tokens = {split: tokenize(dataset, tokenizer, text_columns, config, windows) for split, dataset in labelled.items()}
    report_truncation(tokens, limit, config, windows, notes)
    return Data(
        name=dataset_name(config),
        texts={split: dataset.select_columns(list(text_columns)) for split, dataset in labelled.items()},
        tokens={split: dataset.remove_columns(["length", "truncated"]) for split, dataset in tokens.items()},
        lengths={split: np.asarray(dataset["length"][:], dtype=np.int64) for split, dataset in tokens.items()},
        label_names=names,
        text_columns=tuple(text_columns),
        notes=tuple(notes),
        max_length=windows.max_length if windows else limit,
        pad_to_max_length=config.pad_to_max_length,
        problem_type=problem,
    )


def hold_out_validation(train: Dataset, problem: str, notes: list[str]) -> dict[str, Dataset]:
    """Every tenth sample of each class as validation; fixed, so that runs with other seeds can be compared.

    Every tenth number in their order; of several labels, every tenth sample of each set of them. The only sample of a
    class, or of a set, stays in train: nothing could be learnt of it in validation.
    """
    labels = np.asarray(train["labels"][:])
    kinds = labels if problem == REGRESSION else np.unique(labels, axis=0, return_inverse=True)[1].ravel()
    order = permutation(len(train), 0)
    order = order[np.argsort(kinds[order], kind="stable")]
    if problem != REGRESSION:
        order = order[np.bincount(kinds)[kinds[order]] > 1]
    if len(order) < 2:
        raise UserError("no class of the train split has two rows; there is nothing left to validate on")
    held_out = np.zeros(len(train), dtype=bool)
    held_out[order[min(5, len(order) - 1) :: 10]] = True
    notes.append(
        f"no validation split: {held_out.sum()} of {len(train)} training samples held out, stratified by label"
    )
    return {"train": train.select(np.flatnonzero(~held_out)), "validation": train.select(np.flatnonzero(held_out))}


def take(dataset: Dataset, split: str, config: DataConfig) -> Dataset:
    """At most the samples asked for: a fixed random choice, as many sets are sorted, in the order of the data."""
    limit = config.max_train_samples if split == "train" else config.max_eval_samples
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.select(np.sort(permutation(len(dataset), 0)[:limit]))


def report_overlap(splits: dict[str, Dataset], text_columns: Sequence[str], notes: list[str]) -> None:
    """Note how many texts of the other splits are in train as well: scores on them say little."""
    if "train" not in splits:
        return
    seen = text_keys(splits["train"], text_columns)
    for split, dataset in splits.items():
        count = np.isin(text_keys(dataset, text_columns), seen).sum() if split != "train" else 0
        if count:
            notes.append(f"warning: {count} of {len(dataset)} {split} texts are in train as well")


def text_keys(dataset: Dataset, text_columns: Sequence[str]) -> np.ndarray:
    """uint64 (rows,): equal texts have equal keys; that others do happens once in billions of data sets of this kind."""
    batches = dataset.select_columns(list(text_columns)).with_format("arrow").iter(batch_size=10_000)
    texts = (row for batch in batches for row in zip(*(column.to_pylist() for column in batch.columns), strict=True))
    digests = (hashlib.blake2b(repr(row).encode(), digest_size=8).digest() for row in texts)
    return np.fromiter((int.from_bytes(digest, "little") for digest in digests), np.uint64, len(dataset))
