"""Splits, label names and token ids: from an alias, a Hub id, a folder or files to data a model can be trained on."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import cached_assets_path

from lib import embedded
from lib.batching import permutation
from lib.catalog import CATALOG, Source
from lib.config import DataConfig, UserError
from lib.labels import encode_labels

ROLES = ("train", "validation", "test")
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
FILE_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


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


def dataset_name(config: DataConfig) -> str:
    """A short name for run names and reports."""
    given = config.train_file or config.test_file or config.validation_file
    if given:
        return Path(given).stem
    name = (config.dataset or "movie_reviews").rstrip("/").split("/")[-1]
    return f"{name}-{config.dataset_config}" if config.dataset_config else name


def default_metrics(config: DataConfig) -> tuple[str, ...]:
    source = catalog_source(config)
    return source.metrics if source else ("accuracy", "f1_macro")


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
    labelled = {split: take(dataset, split, config) for split, dataset in labelled.items()}
    report_overlap(labelled, text_columns, notes)
    tokens = {split: tokenize(dataset, tokenizer, text_columns, config) for split, dataset in labelled.items()}
    lengths = {split: np.asarray(dataset["length"], dtype=np.int64) for split, dataset in tokens.items()}
    report_truncation(tokens, tokenizer, config, notes)
    return Data(
        name=dataset_name(config),
        texts={split: dataset.select_columns(list(text_columns)) for split, dataset in labelled.items()},
        tokens={split: dataset.remove_columns(["length", "truncated"]) for split, dataset in tokens.items()},
        lengths=lengths,
        label_names=names,
        text_columns=tuple(text_columns),
        notes=notes,
    )


# ---------------------------------------------------------------------------------------------------- reading


def load_raw(config: DataConfig) -> dict[str, Dataset]:
    """All splits as they are stored, by their own names."""
    files = {role: getattr(config, f"{role}_file") for role in ROLES if getattr(config, f"{role}_file")}
    if files:
        return {role: load_file(path, f"--{role}_file") for role, path in files.items()}
    name = config.dataset or "movie_reviews"
    if name == "movie_reviews":
        return load_movie_reviews(config.dataset_config or "five")
    if Path(name).is_dir():
        return load_folder(name, "--dataset")
    if Path(name).is_file():
        raise UserError(f"--dataset {name} is a file; give files as --train_file, --validation_file and --test_file")
    source = CATALOG.get(name)
    path, hub_config = (
        (source.path, config.dataset_config or source.config) if source else (name, config.dataset_config)
    )
    return load_hub(path, hub_config, config.revision)


def load_movie_reviews(kind: str) -> dict[str, Dataset]:
    """The embedded ratings as five classes, as two (ratings of exactly 0 left out), or as they are."""
    rows = embedded.movie_reviews(Path(cached_assets_path("movie_reviews", "vaderSentiment", embedded.VADER_VERSION)))
    if kind == "five":
        label: Any = ClassLabel(names=list(embedded.FIVE_NAMES))
        labelled = [(text, embedded.five_label(rating)) for text, rating in rows]
    elif kind == "binary":
        label = ClassLabel(names=list(embedded.BINARY_NAMES))
        labelled = [(text, int(rating > 0)) for text, rating in rows if rating != 0]
    elif kind == "rating":
        label, labelled = Value("float32"), rows  # type: ignore[assignment]
    else:
        raise UserError(f"--dataset_config {kind}: movie_reviews has the configurations five, binary and rating")
    splits: dict[str, dict[str, list[Any]]] = {role: {"text": [], "label": []} for role in ROLES}
    for text, value in labelled:
        split = splits[embedded.split_of(text)]
        split["text"].append(text)
        split["label"].append(value)
    features = Features({"text": Value("string"), "label": label})
    return {role: Dataset.from_dict(columns, features=features) for role, columns in splits.items()}


def load_hub(path: str, hub_config: str | None, revision: str | None) -> dict[str, Dataset]:
    try:
        return dict(load_dataset(path, hub_config, revision=revision))
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--dataset {path}{f' --dataset_config {hub_config}' if hub_config else ''} could not be loaded: {reason}\n"
            f"Check the name (user/name), the network or a mirror (HF_ENDPOINT), or use one of: "
            f"{', '.join(CATALOG)}."
        ) from error


def load_folder(path: str, flag: str) -> dict[str, Dataset]:
    """A folder saved by `datasets`, or one that holds data files."""
    try:
        if (Path(path) / "dataset_dict.json").exists() or (Path(path) / "state.json").exists():
            saved = load_from_disk(path)
            return dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}
        return dict(load_dataset(path))
    except EmptyDatasetError as error:
        raise UserError(f"{flag} {path}: the folder holds no data files") from error
    except IndexError as error:
        raise UserError(f"{flag} {path}: a split saved there is empty") from error
    except (DatasetGenerationError, FileNotFoundError, ValueError, OSError) as error:
        raise UserError(f"{flag} {path} could not be loaded: {root_cause(error)}") from error


def load_file(path: str, flag: str) -> Dataset:
    file = Path(path)
    if file.is_dir():
        splits = load_folder(path, flag)
        role = flag.removeprefix("--").removesuffix("_file")
        if len(splits) > 1 and role not in splits:
            raise UserError(
                f"{flag} {path} holds the splits {', '.join(splits)}, none of them {role}; use --dataset {path}"
            )
        return splits[role] if role in splits else next(iter(splits.values()))
    if not file.is_file():
        raise UserError(f"{flag} {path}: no such file")
    if file.suffix.lower() not in FILE_FORMATS:
        raise UserError(f"{flag} {path}: the name must end in one of {', '.join(FILE_FORMATS)}")
    if file.stat().st_size == 0:
        raise UserError(f"{flag} {path} is empty")
    options: dict[str, Any] = {}
    if file.suffix.lower() in (".csv", ".tsv"):
        # Without these, the words "null", "NA" and "None" would be read as missing values.
        options = {"keep_default_na": False, "na_values": [""], "encoding": "utf-8-sig"}
        options["sep"] = "\t" if file.suffix.lower() == ".tsv" else ","
    try:
        dataset = load_dataset(FILE_FORMATS[file.suffix.lower()], data_files={"train": path}, **options)["train"]
    except Exception as error:  # the readers behind `datasets` raise all kinds, each about this one file
        raise UserError(f"{flag} {path} could not be read: {bad_line(file) or root_cause(error)}") from error
    header = dataset.column_names[0]
    if "sep" in options and len(dataset.column_names) == 1 and any(mark in header for mark in ",;\t|"):
        wanted = "tabs" if options["sep"] == "\t" else "commas"
        raise UserError(f"{flag} {path} has one column, {header!r}; separate its columns by {wanted}")
    return dataset


def root_cause(error: BaseException) -> str:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    lines = str(error).strip().splitlines() or [type(error).__name__]
    bare = any(sign in lines[0] for sign in ("corresponds to no data", "No columns to parse"))
    return "there are no rows in it" if bare else lines[0]


def bad_line(file: Path) -> str | None:
    """Where a text file breaks, for the ways readers do not say: wrong encoding, and a line that is no JSON object."""
    if file.suffix.lower() == ".parquet":
        return None
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            text = line.decode("utf-8-sig")
            if file.suffix.lower() == ".jsonl" and text.strip() and not isinstance(json.loads(text), dict):
                return f'line {number} is not a JSON object, such as {{"text": "...", "label": "..."}}'
        except UnicodeDecodeError:
            return f"line {number} is not UTF-8; save the file as UTF-8"
        except json.JSONDecodeError as error:
            return f"line {number} is not JSON: {error}"
    return None


# ---------------------------------------------------------------------------------------------------- choosing


def catalog_source(config: DataConfig) -> Source | None:
    """The row of the catalog that `config` names; None for files, folders and other Hub ids."""
    if config.train_file or config.validation_file or config.test_file:
        return None
    return CATALOG.get(config.dataset or "movie_reviews")


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
        elif role == "train" or role not in ROLES:
            raise UserError(f"there is no {role} split; {dataset_name(config)} has: {', '.join(raw)}")
    return chosen


def guess_text_columns(raw: dict[str, Dataset], config: DataConfig, notes: list[str]) -> tuple[str, ...]:
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
        missing = [i for i, text in enumerate(dataset[column]) if text is None]
        if missing:
            raise UserError(
                f"{len(missing)} rows of the {split} split have no {column}, the first is row {missing[0] + 1}"
            )


# ---------------------------------------------------------------------------------------------------- shaping


def hold_out_validation(train: Dataset, notes: list[str]) -> dict[str, Dataset]:
    """Every tenth sample of each class as validation; fixed, so that runs with other seeds can be compared."""
    labels = np.asarray(train["labels"])
    order = permutation(len(train), 0)
    order = order[np.argsort(labels[order], kind="stable")]
    held_out = np.zeros(len(train), dtype=bool)
    held_out[order[min(5, len(train) - 1) :: 10]] = True
    if held_out.all():
        raise UserError("the train split has one row only; there is nothing left to validate on")
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
    seen = set(zip(*(splits["train"][column] for column in text_columns), strict=True))
    for split, dataset in splits.items():
        texts = zip(*(dataset[column] for column in text_columns), strict=True)
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

    workers = config.preprocessing_num_workers
    return dataset.map(encode, batched=True, remove_columns=dataset.column_names, num_proc=workers, desc="tokenize")


def report_truncation(tokens: dict[str, Dataset], tokenizer: Any, config: DataConfig, notes: list[str]) -> None:
    limit = min(config.max_length, tokenizer.model_max_length)
    if limit < config.max_length:
        notes.append(f"--max_length {config.max_length} is more than the model can take: {limit} is used")
    for split, dataset in tokens.items():
        share = float(np.mean(dataset["truncated"]))
        if share:
            notes.append(f"{share:.1%} of the {split} texts are longer than {limit} tokens and were cut (--max_length)")
