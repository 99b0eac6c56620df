"""Splits, label names and token ids: from an alias, a Hub id, a folder or files to data a model can be trained on."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Value

from lib.batching import permutation
from lib.config import DataConfig, UserError
from lib.labels import encode_labels
from lib.sources import ROLES, catalog_source, dataset_name, load_raw
from lib.token_cache import cache_file, tokens_key

TEXT_GUESSES = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
    ("review",),
    ("content",),
)
LABEL_GUESSES = ("label", "labels", "target", "class", "category", "sentiment", "stars", "rating")


@dataclasses.dataclass(frozen=True)
class Data:
    """Splits ready for training.

    `texts[split]` holds the text columns as given; `tokens[split]` holds input_ids (lists of int), labels (int), and
    token_type_ids where the tokenizer makes them. `lengths[split]` counts tokens. `notes` are sentences for the log.
    """

    name: str
    texts: dict[str, Dataset]
    tokens: dict[str, Dataset]
    lengths: dict[str, np.ndarray]
    label_names: list[str]
    text_columns: tuple[str, ...]
    notes: list[str]
    problem_type: str = "single_label_classification"
    """As in a transformers configuration."""
    max_length: int = 0
    """Tokens of the longest text that is possible."""
    pad_to_max_length: bool = False

    @property
    def padded_to(self) -> int | None:
        """Length of every batch; None: that of its longest text."""
        return self.max_length if self.pad_to_max_length else None

    def fingerprint(self) -> str:
        """Hash of all token ids and labels, in order: equal exactly when the model sees equal data."""
        digest = hashlib.sha256()
        for split, tokens in sorted(self.tokens.items()):
            digest.update(f"{split} {len(tokens)} {self.label_names}".encode())
            for batch in tokens.with_format("arrow").iter(batch_size=10_000):
                for column in ("input_ids", "labels"):
                    values = batch[column].combine_chunks()
                    values = values.flatten() if column == "input_ids" else values
                    digest.update(values.to_numpy(zero_copy_only=False).tobytes())
            digest.update(self.lengths[split].tobytes())
        return digest.hexdigest()[:16]


def load_data(
    config: DataConfig, tokenizer: Any, splits: Sequence[str] = ROLES, label_names: list[str] | None = None
) -> Data:
    """Load, check and tokenise the data set that `config` describes.

    `splits` are the splits wanted; of those in `ROLES`, missing ones are made (validation) or left out (test). With
    `label_names`, labels are matched to the classes of an existing model instead of being derived from the data.

    Raises UserError for whatever is wrong with files, columns, labels or names.
    """
    raw = load_raw(config)
    notes: list[str] = []
    text_columns = config.text_columns or known_columns(config)[0] or guess_text_columns(raw, config, notes)
    label_column = config.label_column or known_columns(config)[1] or guess_label_column(raw, notes)
    raw = {role: raw[source] for role, source in choose_splits(raw, config, splits).items()}
    for split, dataset in raw.items():
        check_columns(dataset, split, text_columns, label_column)
    labelled, names = encode_labels(raw, label_column, label_names, notes)
    if "train" in labelled and "validation" in splits and "validation" not in labelled:
        labelled |= hold_out_validation(labelled["train"], notes)
    labelled = {split: take(labelled[split], split, config) for split in splits if split in labelled}
    report_overlap(labelled, text_columns, notes)
    tokens = {split: tokenize(dataset, tokenizer, text_columns, config) for split, dataset in labelled.items()}
    lengths = {split: np.asarray(dataset["length"][:], dtype=np.int64) for split, dataset in tokens.items()}
    report_truncation(tokens, tokenizer, config, notes)
    return Data(
        name=dataset_name(config),
        texts={split: dataset.select_columns(list(text_columns)) for split, dataset in labelled.items()},
        tokens={split: dataset.remove_columns(["length", "truncated"]) for split, dataset in tokens.items()},
        lengths=lengths,
        label_names=names,
        text_columns=tuple(text_columns),
        notes=notes,
        max_length=min(config.max_length, tokenizer.model_max_length),
        pad_to_max_length=config.pad_to_max_length,
    )


# ---------------------------------------------------------------------------------------------------- choosing


def known_columns(config: DataConfig) -> tuple[tuple[str, ...] | None, str | None]:
    source = catalog_source(config)
    return (source.text_columns, source.label_column) if source else (None, None)


def choose_splits(raw: dict[str, Dataset], config: DataConfig, wanted: Sequence[str]) -> dict[str, str]:
    """Which stored split plays which role: {role: stored name}; raises UserError when one that must be there is not."""
    source = catalog_source(config)
    aliases = {"validation": ("validation", source.validation if source else "validation", "dev", "valid", "val")}
    chosen = {}
    for role in wanted:
        found = next((name for name in aliases.get(role, (role,)) if name in raw), None)
        if found is not None:
            chosen[role] = found
        elif role == "validation" and "train" in raw:
            chosen["train"] = "train"  # from which a validation split is made
        elif role == "train" or len(wanted) == 1:
            raise UserError(f"there is no {role} split; {dataset_name(config)} has: {', '.join(raw)}")
    return chosen


def guess_text_columns(raw: dict[str, Dataset], config: DataConfig, notes: list[str]) -> tuple[str, ...]:
    """Usual names, else the only text column; raises UserError when there are several."""
    features = next(iter(raw.values())).features
    for guess in TEXT_GUESSES:
        if all(column in features for column in guess):
            break
    else:
        strings = tuple(name for name, feature in features.items() if is_text(feature) and name not in LABEL_GUESSES)
        strings = tuple(name for name in strings if name not in (config.label_column, "label_text", "id", "idx"))
        if len(strings) != 1:
            raise UserError(
                f"which column holds the text? The columns are {', '.join(features)}; name it with --text_columns"
            )
        guess = strings
    notes.append(f"text columns: {' '.join(guess)} (guessed; set --text_columns to change)")
    return guess


def guess_label_column(raw: dict[str, Dataset], notes: list[str]) -> str:
    features = next(iter(raw.values())).features
    for guess in LABEL_GUESSES:
        if guess in features:
            if guess not in ("label", "labels"):
                notes.append(f"label column: {guess} (guessed; set --label_column to change)")
            return guess
    raise UserError(f"which column holds the label? The columns are {', '.join(features)}; name it with --label_column")


def is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


def check_columns(dataset: Dataset, split: str, text_columns: Sequence[str], label_column: str) -> None:
    """Raise UserError when the split is empty, lacks a column, or has text that is not text."""
    have = ", ".join(dataset.features)
    if not len(dataset):
        raise UserError(f"the {split} split is empty")
    for flag, columns in (("--text_columns", text_columns), ("--label_column", [label_column])):
        for column in columns:
            if column not in dataset.features:
                raise UserError(f"{flag} {column}: the {split} split has no such column; it has: {have}")
    for column in text_columns:
        if not is_text(dataset.features[column]):
            kind = getattr(dataset.features[column], "dtype", dataset.features[column])
            raise UserError(
                f"--text_columns {column}: not text but {kind} in the {split} split; name a text column of: {have}"
            )
        missing = [i for i, text in enumerate(dataset[column][:]) if text is None]
        if missing:
            raise UserError(
                f"{len(missing)} rows of the {split} split have no {column}, the first is row {missing[0] + 1}"
            )


# ---------------------------------------------------------------------------------------------------- shaping


def hold_out_validation(train: Dataset, notes: list[str]) -> dict[str, Dataset]:
    """Every tenth sample of each class as validation; fixed, so that runs with other seeds can be compared.

    The only sample of a class stays in train: nothing could be learnt of it in validation.
    """
    labels = np.asarray(train["labels"])
    order = permutation(len(train), 0)
    order = order[np.argsort(labels[order], kind="stable")]
    order = order[np.bincount(labels)[labels[order]] > 1]
    if not len(order):
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
    seen = set(zip(*(splits["train"][column][:] for column in text_columns), strict=True))
    for split, dataset in splits.items():
        texts = zip(*(dataset[column][:] for column in text_columns), strict=True)
        count = sum(text in seen for text in texts) if split != "train" else 0
        if count:
            notes.append(f"warning: {count} of {len(dataset)} {split} texts are in train as well")


def tokenize(dataset: Dataset, tokenizer: Any, text_columns: Sequence[str], config: DataConfig) -> Dataset:
    """Token ids, cut to max_length and not padded; padding belongs to the batch."""
    limit = min(config.max_length, tokenizer.model_max_length)
    special = tokenizer.num_special_tokens_to_add(pair=len(text_columns) == 2)
    if limit < special + len(text_columns):
        raise UserError(f"--max_length {config.max_length} leaves no room for text beside {special} special tokens")

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        # Empty texts stay: they still get special tokens, and dropping them would shift the order of predictions.
        batch = tokenizer(*(list(rows[column]) for column in text_columns), truncation=True, max_length=limit)
        ids = batch["input_ids"]
        cut = [bool(e.overflowing) for e in batch.encodings] if batch.encodings else [len(i) >= limit for i in ids]
        encoded = {"input_ids": ids, "labels": rows["labels"], "length": [len(i) for i in ids], "truncated": cut}
        if "token_type_ids" in batch:
            encoded["token_type_ids"] = batch["token_type_ids"]
        return encoded

    key = tokens_key(dataset, tokenizer, text_columns, limit)
    return dataset.map(
        encode,
        batched=True,
        remove_columns=dataset.column_names,
        num_proc=config.preprocessing_num_workers,
        desc="tokenize",
        new_fingerprint=key,
        cache_file_name=cache_file(key),
    )


def report_truncation(tokens: dict[str, Dataset], tokenizer: Any, config: DataConfig, notes: list[str]) -> None:
    limit = min(config.max_length, tokenizer.model_max_length)
    if limit < config.max_length:
        notes.append(f"--max_length {config.max_length} is more than the model can take: {limit} is used")
    for split, dataset in tokens.items():
        share = float(np.mean(dataset["truncated"][:]))
        if share:
            notes.append(f"{share:.1%} of the {split} texts are longer than {limit} tokens and were cut (--max_length)")
