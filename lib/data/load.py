"""From an alias, a Hub id, a folder or files to splits of token ids that a model can be trained on."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from lib.config.sections import CLASSIFICATION, REGRESSION, DataConfig
from lib.data.batching import count_windows, permutation
from lib.data.catalog import ROLES, catalog_entry, dataset_name
from lib.data.columns import check_columns, choose_splits, find_columns
from lib.data.labels.problem_types import encode_targets, find_problem
from lib.data.sources import load_raw
from lib.data.tokenization import choose_windows, tokenize, truncation_notes
from lib.data.trained_on import UNKNOWN, TrainedOn
from lib.errors import UserError


@dataclasses.dataclass(frozen=True)
class Data:
    """Splits ready for training.

    `texts[split]` holds the text columns as stored. `tokens[split]` holds input_ids (lists of int), labels, and
    token_type_ids if the tokenizer makes them; with windows, a list of these for each text, and num_windows. Labels are
    class numbers (int), numbers (float), or multi-hot lists of float. `lengths[split]` counts the tokens of each text.
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

    def fingerprint(self) -> str:
        """Hash of all token ids, labels and label names, in order: equal exactly when the model sees equal data."""
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
    trained_on: TrainedOn = UNKNOWN,
) -> Data:
    """Load, check and tokenize a data set.

    `splits` are those wanted: a missing validation split is held out from train, a missing test split is left out; with
    all three come further validation splits of the catalog. `label_names` and `model_problem` are the outputs and the
    problem type of an existing model, which the data must fit; the columns it was `trained_on` are used where the data has
    them.

    Raises UserError for whatever is wrong with files, columns, labels or names.
    """
    raw = load_raw(config)
    text_columns, label_columns, notes = find_columns(raw, config, trained_on)
    entry = catalog_entry(config)
    if entry and tuple(splits) == ROLES:
        splits = (*splits, *entry.further_validation)
    raw, unused = choose_splits(raw, config, splits)
    notes += unused
    check_columns(raw, text_columns, label_columns)
    order = config.label_order or ()
    problem, found = find_problem(raw, label_columns, config.problem_type, model_problem, label_names or order)
    targets = encode_targets(raw, label_columns, problem, label_names, order)
    labeled = targets.attach(raw)
    notes += found + targets.notes
    if "train" in labeled and "validation" in splits and "validation" not in labeled:
        total = len(labeled["train"])
        labeled |= hold_out_validation(labeled["train"], problem)
        held_out = len(labeled["validation"])
        notes += (f"no validation split: {held_out} of {total} training samples held out, stratified by label",)
    labeled = {split: subsample(labeled[split], split, config) for split in splits if split in labeled}
    notes += overlap_notes(labeled, text_columns)
    limit = min(config.max_length, tokenizer.model_max_length)
    windows = choose_windows(tokenizer, limit, config.window_stride, len(text_columns), label_names is not None)
    tokens = {split: tokenize(dataset, tokenizer, text_columns, config, windows) for split, dataset in labeled.items()}
    notes += truncation_notes(tokens, limit, config, windows)
    return Data(
        name=dataset_name(config),
        texts={split: dataset.select_columns(list(text_columns)) for split, dataset in labeled.items()},
        tokens={split: dataset.remove_columns(["length", "truncated"]) for split, dataset in tokens.items()},
        lengths={split: np.asarray(dataset["length"][:], dtype=np.int64) for split, dataset in tokens.items()},
        label_names=targets.names,
        text_columns=tuple(text_columns),
        label_columns=tuple(label_columns),
        notes=notes,
        problem_type=problem,
        max_length=windows.max_length if windows else limit,
        window_stride=windows.stride if windows else None,
        pad_to_max_length=config.pad_to_max_length,
    )


def hold_out_validation(train: Dataset, problem: str) -> dict[str, Dataset]:
    """Every tenth sample of each class as validation; the same for all seeds, so that their runs can be compared.

    Of numbers, every tenth in sorted order; of multi-label rows, every tenth of each set of labels. The only sample of a
    class, or of a set, stays in train. Raises UserError when nothing is left to hold out.
    """
    labels = np.asarray(train["labels"][:])
    kinds = labels if problem == REGRESSION else np.unique(labels, axis=0, return_inverse=True)[1].ravel()
    order = permutation(len(train), 0)
    order = order[np.argsort(kinds[order], kind="stable")]
    if problem != REGRESSION:
        order = order[np.bincount(kinds)[kinds[order]] > 1]
    if len(order) < 2:
        raise UserError(
            "no class of the train split has two rows, so that no validation split can be held out; "
            "give a validation split, or more rows"
        )
    held_out = np.zeros(len(train), dtype=bool)
    held_out[order[min(5, len(order) - 1) :: 10]] = True
    return {"train": train.select(np.flatnonzero(~held_out)), "validation": train.select(np.flatnonzero(held_out))}


def subsample(dataset: Dataset, split: str, config: DataConfig) -> Dataset:
    """At most --max_train_samples or --max_eval_samples rows: a fixed random choice, in stored order."""
    limit = config.max_train_samples if split == "train" else config.max_eval_samples
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.select(np.sort(permutation(len(dataset), 0)[:limit]))


def overlap_notes(splits: dict[str, Dataset], text_columns: Sequence[str]) -> tuple[str, ...]:
    """How many texts of the other splits are in train as well, where there are any."""
    if "train" not in splits:
        return ()
    seen, notes = text_hashes(splits["train"], text_columns), list[str]()
    for split, dataset in splits.items():
        count = np.isin(text_hashes(dataset, text_columns), seen).sum() if split != "train" else 0
        if count:
            notes.append(f"warning: {count} of {len(dataset)} {split} texts are in train as well")
    return tuple(notes)


def text_hashes(dataset: Dataset, text_columns: Sequence[str]) -> np.ndarray:
    """uint64 (rows,): a 64-bit hash of each row's text or pair of texts."""
    batches = dataset.select_columns(list(text_columns)).with_format("arrow").iter(batch_size=10_000)
    texts = (row for batch in batches for row in zip(*(column.to_pylist() for column in batch.columns), strict=True))
    digests = (hashlib.blake2b(repr(row).encode(), digest_size=8).digest() for row in texts)
    return np.fromiter((int.from_bytes(digest, "little") for digest in digests), np.uint64, len(dataset))
