"""Which splits and columns of a stored data set are used: those named, those of the catalog, or obvious guesses."""

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value

from lib.config.sections import DataConfig
from lib.data.catalog import ROLES, catalog_entry, dataset_name, split_candidates
from lib.data.labels.names import folded, listed, quoted, resembling, shown
from lib.data.labels.numerals import read_number
from lib.data.labels.soft_label import soft_columns
from lib.data.trained_on import TrainedOn, columns_note
from lib.errors import UserError

TEXT_GUESSES = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
    ("review",),
    ("content",),
    *(("文本",), ("句子",), ("内容",), ("评论",), ("正文",), ("文章",), ("文字",), ("文章内容",), ("评论内容",)),
    *(("內容",), ("評論",), ("テキスト",), ("本文",), ("文",), ("텍스트",), ("문장",), ("본문",), ("리뷰",)),
)
"""Usual names of text columns, in any case, tried in this order."""

LABEL_GUESSES = (
    *("label", "labels", "target", "class", "category", "sentiment", "stars", "rating", "score"),
    *("标签", "类别", "分类", "情感", "情绪", "情感标签", "评分", "星级", "標籤", "類別", "分類", "情緒", "評分"),
    *("ラベル", "カテゴリ", "感情", "라벨", "레이블", "감정", "평점"),
)
"""Usual names of the label column, in any case, tried in this order."""

OBVIOUS = ("label", "labels", "标签")
"""Label columns that need no note."""

NO_TEXT = {*LABEL_GUESSES, "label_text", "id", "idx"}
"""Columns of text that are not taken for the text to classify."""

LOOKED_AT = 1000
"""As many rows are read to see whether a column holds words."""


def find_columns(
    raw: dict[str, Dataset], config: DataConfig, trained_on: TrainedOn
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Text columns, label columns, and notes on what was guessed.

    They are those that the options name, else those of the model's training where the data has them, else those of the
    catalog, else guesses. Raises UserError when there is no obvious guess.
    """
    entry, dataset, notes, wanted = (
        catalog_entry(config),
        next(iter(raw.values())),
        list[str](),
        config.soft_labels or (),
    )
    soft = find_soft(raw, wanted)
    if wanted and not soft:
        if wanted != trained_on.soft_labels:
            raise UserError(
                f"--soft_labels {' '.join(map(shown, wanted))}: no split has such a column; there are: "
                f"{listed(dataset.features)}{resembling(wanted[0], dataset.features)}"
            )
        notes.append(f"the model was trained on the soft labels {' '.join(wanted)}, which are not there")
    labeled = next((other for split, other in raw.items() if split not in soft), None)  # in the usual way

    def trained(columns: tuple[str, ...]) -> tuple[str, ...] | None:
        return columns if columns and set(columns) <= {*dataset.features} else None

    texts = config.text_columns or trained(trained_on.text_columns) or (entry.text_columns if entry else None)
    labels = config.label_columns or ((config.label_column,) if config.label_column else None)
    from_training = trained(trained_on.label_columns) if labels is None else None
    lost = trained_on.label_columns if labels is None and from_training is None and labeled is not None else ()
    labels = labels or from_training or ((entry.label_column,) if entry else None)
    if texts is None:
        texts, others = guess_text_columns(dataset, (*(labels or ()), *itertools.chain(*soft.values())))
        left = f"; {listed(others)} is not used" if others else ""
        notes.append(f"text columns: {' '.join(map(shown, texts))} (guessed{left}; set --text_columns to change)")
    change = columns_note(texts, trained_on, config.text_columns is not None, dataset_name(config))
    notes += [change] if change else []
    if labeled is None:
        if labels and from_training is None and not entry:
            notes.append(f"the label {' '.join(map(shown, labels))} is not used, since every split has soft labels")
        labels = ()
    elif labels is None:
        labels, others = guess_label_column(labeled.features, texts)
        if labels[0] not in OBVIOUS or others:
            left = f"; {listed(others)} is not used" if others else ""
            notes.append(f"label column: {shown(labels[0])} (guessed{left}; set --label_column to change)")
    if lost:
        used = " ".join(labels)
        notes.append(
            f"warning: the model was trained on the label {' '.join(lost)}, which is not there; {used} is used"
        )
    return texts, labels, tuple(notes)


def find_soft(splits: dict[str, Dataset], wanted: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The columns of --soft_labels in each split that has them."""
    found = {split: soft_columns(dataset, wanted) for split, dataset in splits.items()}
    return {split: columns for split, columns in found.items() if columns}


def guess_label_column(features: Features, texts: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """The first column of a usual name that is no text column, and others that could be meant. Raises UserError for none."""
    names = [name for name in features if name not in texts]
    guesses = [spelled[0] for guess in LABEL_GUESSES if (spelled := find_names((guess,), names, "--label_column"))]
    if not guesses:
        raise UserError(
            f"which column holds the label? The columns are {listed(features)}; name it with --label_column"
            f"{header_hint(features)}"
        )
    return (guesses[0],), guesses[1:]


def guess_text_columns(dataset: Dataset, labels: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Columns of usual names, or else the only one that holds words; and others of usual names that could be meant.

    Raises UserError when there are several or none.
    """
    features = dataset.features
    names = [name for name in features if name not in labels]
    guesses = [spelled for guess in TEXT_GUESSES if (spelled := find_names(guess, names, "--text_columns"))]
    if guesses:
        others = [name for guess in guesses[1:] if len(guess) == 1 for name in guess if name not in guesses[0]]
        return guesses[0], others
    texts = [name for name in names if is_text(features[name]) and folded(name) not in NO_TEXT]
    if len(texts) > 1:
        texts = [name for name in texts if holds_words(dataset, name)] or texts
    if len(texts) != 1:
        raise UserError(
            f"which column holds the text? The columns are {listed(features)}; name it with --text_columns"
            f"{header_hint(features)}"
        )
    return tuple(texts), []


def find_names(guess: Sequence[str], names: Sequence[str], flag: str) -> tuple[str, ...] | None:
    """The columns that `guess` means, also in another case or with spaces around; None where one is missing.

    Raises UserError with `flag` where two columns could be meant.
    """
    found = []
    for wanted in guess:
        alike = [wanted] if wanted in names else [name for name in names if folded(name) == wanted]
        if len(alike) > 1:
            raise UserError(f"which column is meant, {' or '.join(map(quoted, alike))}? Name it with {flag}")
        found += alike
    return tuple(found) if len(found) == len(guess) else None


def holds_words(dataset: Dataset, column: str) -> bool:
    """Whether a column of text holds more than numbers, dates, true and false, by its first rows."""
    cells = dataset.select_columns([column])[:LOOKED_AT][column]
    return any(any(map(str.isalpha, cell)) and cell.lower() not in ("true", "false") for cell in cells if cell)


def header_hint(names: Sequence[str] | Features) -> str:
    """What to do where the names of columns look like a row of data; empty where they do not."""
    if any(len(name.split()) > 2 or len(name) > 40 or read_number(name) is not None for name in names):
        return ". These look like a row of data: give the file a header, a first line with the names of its columns"
    return ""


def choose_splits(
    raw: dict[str, Dataset], config: DataConfig, wanted: Sequence[str]
) -> tuple[dict[str, Dataset], tuple[str, ...]]:
    """The stored splits by the role they play, and notes on those that are not used.

    Train comes along where validation must be held out from it. Raises UserError when there is no train split, or not the
    only split that is wanted.
    """
    entry = catalog_entry(config)
    chosen, used, notes = dict[str, Dataset](), set[str](), list[str]()
    for role in wanted:
        player, found = role, split_candidates(raw, role)
        if role == "validation" and entry and entry.validation in raw:
            found = [entry.validation]
        if role == "validation" and not found:
            player, found = "train", split_candidates(raw, "train")
        if found:
            chosen[player] = raw[found[0]]
        elif role == "train" or len(wanted) == 1:
            raise UserError(f"there is no {role} split; {dataset_name(config)} has: {listed(raw)}")
        if len(found) > 1 and not used & {*found}:
            notes.append(f"each of {listed(found)} could be the {player} split; {shown(found[0])} is used")
        used |= {*found}
    unused = [name for name in raw if name not in used]
    if unused and set(ROLES) <= set(wanted):
        notes.append(f"the split {listed(unused)} is not used; the splits of a run are {', '.join(ROLES)}")
    return chosen, tuple(notes)


def check_columns(
    splits: dict[str, Dataset],
    text_columns: Sequence[str],
    label_columns: Sequence[str],
    soft: Collection[str] = (),
) -> None:
    """Raise UserError for an empty split, a missing column, a text column of another type, and a row without text.

    So does a column that is named twice, or as text and as label. Splits in `soft` need no label columns.
    """
    label_flag = "--label_columns" if len(label_columns) > 1 else "--label_column"
    both = next((column for column in text_columns if column in label_columns), None)
    if both is not None:
        raise UserError(
            f"--text_columns {shown(both)} is the label column as well: a model would read the answer; name another, "
            f"or another label with {label_flag}"
        )
    for flag, columns in (("--text_columns", text_columns), (label_flag, label_columns)):
        twice = next((column for column in columns if list(columns).count(column) > 1), None)
        if twice is not None:
            raise UserError(f"{flag} names {shown(twice)} twice")
    for split, dataset in splits.items():
        have = listed(dataset.features)
        if not len(dataset):
            raise UserError(f"the {split} split is empty")
        labels = () if split in soft else label_columns
        for flag, columns in (("--text_columns", text_columns), (label_flag, labels)):
            for column in columns:
                if column not in dataset.features:
                    raise UserError(
                        f"{flag} {shown(column)}: the {split} split has no such column; it has: {have}"
                        f"{resembling(column, dataset.features)}{header_hint(dataset.features)}"
                    )
        for column in text_columns:
            feature = dataset.features[column]
            if not is_text(feature):
                kind = getattr(feature, "dtype", feature)
                raise UserError(
                    f"--text_columns {shown(column)}: not text but {kind} in the {split} split; "
                    f"name a text column of: {have}"
                )
            missing = np.flatnonzero(dataset.select_columns([column]).with_format("arrow")[:][column].is_null())
            if len(missing):
                first = f"row {missing[0] + 1}"
                if len(missing) == 1:
                    raise UserError(f"{first} of the {split} split has no {shown(column)}; fill or remove it")
                raise UserError(
                    f"{len(missing)} rows of the {split} split have no {shown(column)}, the first is {first}; "
                    "fill or remove them"
                )


def is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")
