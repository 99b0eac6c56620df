"""Loading: equal rows are equal data in every file format, and the notes say what was guessed, held out or truncated."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, ByT5Tokenizer

from lib.config.sections import DataConfig
from lib.data.catalog import dataset_name
from lib.data.encoding import Encoder, Windows
from lib.data.load import Data, count_shared, load_data
from lib.data.tokenization import tokenize
from lib.errors import UserError
from lib.evaluation.scores import default_metrics
from tests.conftest import sentences, write_csv

Row = Sequence[str]
Load = Callable[..., Data]

AWKWARD = [
    ("null", "bad"),
    ("NA", "good"),
    ("None", "bad"),
    ("nan", "good"),
    ("12", "bad"),
    ('a "fine", quiet film', "good"),
    ("süß, 很好", "good"),
    ("two\nlines", "bad"),
]
"""Texts that csv readers may change."""

AWKWARD_TEXTS = [text for text, _ in AWKWARD]


@pytest.fixture(scope="module")
def load(roberta: Path) -> Load:
    """`load(train_file=...)`: the data set of these options, tokenized by the tiny tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(roberta)

    def call(label_names: list[str] | None = None, splits: Sequence[str] | None = None, **options: Any) -> Data:
        options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        config = DataConfig(**({"max_length": 64} | options))
        return load_data(config, tokenizer, splits or ("train", "validation", "test"), label_names)

    return call


def as_dicts(rows: Sequence[Row]) -> list[dict[str, str]]:
    return [{"text": text, "label": label} for text, label in rows]


def write_tsv(path: Path, rows: Sequence[Row]) -> Path:
    quoted = ["\t".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in [("text", "label"), *rows]]
    path.write_text("\n".join(quoted) + "\n", encoding="utf-8")
    return path


def write_json(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text(json.dumps(as_dicts(rows)), encoding="utf-8")
    return path


def write_jsonl(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in as_dicts(rows)), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Sequence[Row]) -> Path:
    Dataset.from_list(as_dicts(rows)).to_parquet(path)
    return path


def write_folder(path: Path, rows: Sequence[Row]) -> Path:
    Dataset.from_list(as_dicts(rows)).save_to_disk(path)
    return path


def texts(data: Data, split: str) -> list[str]:
    return list(data.texts[split]["text"])


def notes_with(data: Data, words: str) -> list[str]:
    return [note for note in data.notes if words in note]


# ---------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("train.tsv", write_tsv),
        ("train.json", write_json),
        ("train.jsonl", write_jsonl),
        ("train.parquet", write_parquet),
        ("folder", write_folder),
        ("TRAIN.CSV", write_csv),
    ],
)
def test_equal_rows_are_equal_data_in_every_format(
    load: Load, tmp_path: Path, name: str, write: Callable[..., Path]
) -> None:
    rows = AWKWARD + sentences(20)
    expected = load(train_file=write_csv(tmp_path / "train.csv", rows))
    data = load(train_file=write(tmp_path / name, rows))
    assert data.fingerprint() == expected.fingerprint()
    assert data.label_names == expected.label_names
    for split in ("train", "validation"):
        assert texts(data, split) == texts(expected, split)


def test_csv_cells_are_read_as_written(load: Load, tmp_path: Path) -> None:
    labelled = [*AWKWARD, ("fine", "None"), ("dull", "NA")]
    path = write_csv(tmp_path / "train.csv", labelled)
    data = load(train_file=path, validation_file=path)
    assert texts(data, "train") == [text for text, _ in labelled]
    assert data.label_names == ["NA", "None", "bad", "good"]


@pytest.mark.parametrize(("name", "write"), [("b.csv", write_csv), ("b.tsv", write_tsv), ("b.jsonl", write_jsonl)])
def test_byte_order_mark_is_ignored(load: Load, tmp_path: Path, name: str, write: Callable[..., Path]) -> None:
    path = write(tmp_path / name, sentences(12))
    plain = load(train_file=path).fingerprint()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(train_file=path).fingerprint() == plain


def test_saved_folder_gives_each_split_by_its_role(load: Load, tmp_path: Path) -> None:
    rows = as_dicts(sentences(30))
    parts = {"train": rows[:12], "dev": rows[12:21], "test": rows[21:]}
    DatasetDict({name: Dataset.from_list(part) for name, part in parts.items()}).save_to_disk(tmp_path / "saved")
    data = load(dataset=tmp_path / "saved")
    assert {split: len(tokens) for split, tokens in data.tokens.items()} == {"train": 12, "validation": 9, "test": 9}
    assert texts(data, "validation") == [row["text"] for row in parts["dev"]]
    assert texts(load(test_file=tmp_path / "saved", splits=["test"]), "test") == [row["text"] for row in parts["test"]]


def test_saved_folder_without_the_wanted_split_is_refused(load: Load, tmp_path: Path) -> None:
    part = Dataset.from_list(as_dicts(sentences(6)))
    DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"--validation_file .* holds the splits train, test, none of them validation"):
        load(train_file=tmp_path / "saved", validation_file=tmp_path / "saved")


# ---------------------------------------------------------------------------------------------------- columns


def test_pairs_are_tokenized_as_pairs(load: Load, tmp_path: Path) -> None:
    rows = [("good film", "bad plot", "no"), ("fine actor", "good actor", "yes")] * 3
    path = write_csv(tmp_path / "pairs.csv", rows, header=("one", "two", "label"))
    data = load(train_file=path, text_columns=("one", "two"))
    swapped = load(train_file=path, text_columns=("two", "one"))
    first_only = load(train_file=path, text_columns=("one",))
    assert data.text_columns == ("one", "two")
    assert data.texts["train"].column_names == ["one", "two"]
    assert set(data.lengths["train"]) == {8}
    assert set(first_only.lengths["train"]) == {4}
    assert len({data.fingerprint(), swapped.fingerprint(), first_only.fingerprint()}) == 3


def test_named_columns_are_used_without_a_note(load: Load, tmp_path: Path) -> None:
    rows = [(text, "another text", label, "x") for text, label in sentences(12)]
    path = write_csv(tmp_path / "train.csv", rows, header=("review", "text", "mood", "label"))
    data = load(train_file=path, text_columns=("review",), label_column="mood")
    assert data.label_names == ["bad", "good", "mixed"]
    assert notes_with(data, "guessed") == []


def test_guessed_columns_are_in_the_notes(load: Load, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "train.csv", sentences(12), header=("opinion", "stars"))
    data = load(train_file=path)
    text_note, label_note = notes_with(data, "guessed")
    assert "opinion" in text_note
    assert "--text_columns" in text_note
    assert "stars" in label_note
    assert "--label_column" in label_note


def test_pair_columns_are_guessed_by_their_usual_names(load: Load, tmp_path: Path) -> None:
    rows = [(text, "a plot", label) for text, label in sentences(12)]
    data = load(train_file=write_csv(tmp_path / "train.csv", rows, header=("hypothesis", "premise", "label")))
    assert data.text_columns == ("premise", "hypothesis")
    (note,) = notes_with(data, "guessed")
    assert "premise hypothesis" in note


# ---------------------------------------------------------------------------------------------------- splits


def test_missing_validation_split_is_a_stratified_tenth_of_train(load: Load, tmp_path: Path) -> None:
    sizes = {"a": 10, "b": 20, "c": 30, "d": 140}
    rows = [(f"{label} {row}", label) for label, size in sizes.items() for row in range(size)]
    data = load(train_file=write_csv(tmp_path / "train.csv", rows))
    train, held_out = texts(data, "train"), texts(data, "validation")
    assert sorted(train + held_out) == sorted(text for text, _ in rows)
    assert np.bincount(data.tokens["validation"]["labels"]).tolist() == [1, 2, 3, 14]
    (note,) = notes_with(data, "held out")
    assert "20 of 200" in note


def test_held_out_samples_are_fixed_and_spread_over_the_file(load: Load, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "train.csv", sentences(60))
    held_out = texts(load(train_file=path), "validation")
    assert texts(load(train_file=path, max_length=9), "validation") == held_out
    order = [text for text, _ in sentences(60)]
    places = [order.index(text) for text in held_out]
    assert max(places) - min(places) >= 30


def test_only_sample_of_a_class_stays_in_train(load: Load, tmp_path: Path) -> None:
    """Wherever it is among the sorted labels, and for any number of such classes."""
    common = [(f"common {row}", "common") for row in range(12)]
    for number in range(1, 13):
        rows = common + [(f"rare {row}", f"rare {row}") for row in range(number)]
        data = load(train_file=write_csv(tmp_path / f"{number}.csv", rows))
        assert {text for text, label in rows if label != "common"} <= set(texts(data, "train"))
        assert texts(data, "validation")
        assert all(text.startswith("common") for text in texts(data, "validation"))


def test_given_validation_split_leaves_train_whole(load: Load, tmp_path: Path) -> None:
    train, dev = write_csv(tmp_path / "t.csv", sentences(15)), write_csv(tmp_path / "d.csv", sentences(6, seed=1))
    data = load(train_file=train, validation_file=dev)
    assert (len(data.tokens["train"]), len(data.tokens["validation"])) == (15, 6)
    assert notes_with(data, "held out") == []


def test_only_wanted_splits_are_loaded(load: Load, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", sentences(15))
    data = load(train_file=path, test_file=path, splits=["test"], label_names=["mixed", "good", "bad"])
    assert list(data.tokens) == ["test"]
    assert data.label_names == ["mixed", "good", "bad"]
    assert data.tokens["test"]["labels"][:3] == [2, 1, 0]


def test_missing_split_is_refused_with_the_existing_ones(load: Load, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no train split; only has: test"):
        load(test_file=write_csv(tmp_path / "only.csv", sentences(9)))


def test_max_samples_is_a_fixed_random_choice_in_stored_order(load: Load, tmp_path: Path) -> None:
    path, dev = write_csv(tmp_path / "t.csv", sentences(60)), write_csv(tmp_path / "d.csv", sentences(30, seed=1))
    everything = texts(load(train_file=path, validation_file=dev), "train")
    data = load(train_file=path, validation_file=dev, max_train_samples=20, max_eval_samples=7)
    chosen = texts(data, "train")
    assert (len(chosen), len(data.tokens["validation"])) == (20, 7)
    assert chosen == [text for text in everything if text in set(chosen)]
    assert chosen != everything[:20]
    again = load(train_file=path, validation_file=dev, max_train_samples=20, max_eval_samples=7)
    assert again.fingerprint() == data.fingerprint()


def test_max_samples_above_the_size_changes_nothing(load: Load, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", sentences(12))
    limited = load(train_file=path, max_train_samples=99, max_eval_samples=99)
    assert limited.fingerprint() == load(train_file=path).fingerprint()


# ---------------------------------------------------------------------------------------------------- notes


def test_texts_that_are_in_train_as_well_are_counted(load: Load, tmp_path: Path) -> None:
    train, fresh = sentences(12), sentences(6, seed=1)
    data = load(
        train_file=write_csv(tmp_path / "train.csv", train),
        validation_file=write_csv(tmp_path / "dev.csv", fresh),
        test_file=write_csv(tmp_path / "test.csv", [*train[:2], *fresh[:1]]),
    )
    (note,) = notes_with(data, "in train as well")
    assert "2 of 3 test texts" in note


def test_pairs_are_duplicates_only_when_both_texts_are(load: Load, tmp_path: Path) -> None:
    header = ("premise", "hypothesis", "label")
    train = write_csv(tmp_path / "train.csv", [("a", "good", "x"), ("a", "bad", "y")], header)
    dev = write_csv(tmp_path / "dev.csv", [("a", "fine", "x"), ("a", "bad", "x")], header)
    data = load(train_file=train, validation_file=dev)
    (note,) = notes_with(data, "in train as well")
    assert "1 of 2 validation texts" in note


def test_share_of_truncated_texts_is_reported(load: Load, tmp_path: Path) -> None:
    fits, too_long = "a film " * 3, "a film " * 3 + "good"
    train = [(fits, "x"), (too_long, "y"), (fits, "x"), (too_long, "y"), (fits, "x")]
    dev = [(fits, "x"), (fits, "y")]
    data = load(
        train_file=write_csv(tmp_path / "train.csv", train),
        validation_file=write_csv(tmp_path / "dev.csv", dev),
        max_length=8,
    )
    (note,) = notes_with(data, "--max_length")
    assert "40.0% of the train texts are longer than 8 tokens" in note
    assert data.lengths["train"].tolist() == [8] * 5
    assert data.texts["train"]["text"][1] == too_long


def test_max_length_above_that_of_the_model_is_lowered_with_a_note(load: Load, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [("film " * 100, "x"), ("good", "y")])
    data = load(train_file=path, validation_file=path, max_length=100)
    assert max(data.lengths["train"]) == 64
    assert "64" in notes_with(data, "--max_length 100")[0]


def test_pad_to_max_length_is_max_length_or_that_of_the_model(load: Load, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", sentences(30))
    assert load(train_file=path, max_length=33).padded_to is None
    assert load(train_file=path, max_length=33, pad_to_max_length=True).padded_to == 33
    assert load(train_file=path, max_length=99, pad_to_max_length=True).padded_to == 64


@pytest.mark.parametrize(("header", "shortest"), [(("text", "label"), 3), (("premise", "hypothesis", "label"), 6)])
def test_max_length_without_room_for_text_is_refused(
    load: Load, tmp_path: Path, header: tuple[str, ...], shortest: int
) -> None:
    rows = [("good film", "bad film", label)[-len(header) :] for label in "xyxyxy"]
    path = write_csv(tmp_path / "t.csv", rows, header)
    assert max(load(train_file=path, max_length=shortest).lengths["train"]) == shortest
    with pytest.raises(UserError, match=f"--max_length {shortest - 1} leaves no room for text"):
        load(train_file=path, max_length=shortest - 1)


# ---------------------------------------------------------------------------------------------------- tokens


def test_lengths_are_token_counts_without_padding(load: Load, tmp_path: Path) -> None:
    data = load(train_file=write_csv(tmp_path / "t.csv", sentences(30)))
    for split, tokens in data.tokens.items():
        words = [len(text.split()) + 2 for text in texts(data, split)]
        assert [len(ids) for ids in tokens["input_ids"]] == words
        assert data.lengths[split].tolist() == words


def test_empty_texts_keep_their_row(load: Load, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [("good", "x"), ("", "y"), ("bad", "x")])
    data = load(train_file=path, validation_file=path)
    assert data.lengths["train"].tolist() == [3, 2, 3]
    assert texts(data, "train") == ["good", "", "bad"]


def test_preprocessing_workers_do_not_change_the_data(load: Load, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", sentences(30))
    one, two = load(train_file=path), load(train_file=path, preprocessing_num_workers=2)
    assert two.fingerprint() == one.fingerprint()


# ---------------------------------------------------------------------------------------------------- fingerprint

ROWS = [("good film", "x"), ("bad film", "y"), ("fine plot", "x")]


def test_fingerprint_depends_only_on_what_the_model_sees(load: Load, tmp_path: Path) -> None:
    path, spaced = write_csv(tmp_path / "a.csv", ROWS), [("good   film", "x"), *ROWS[1:]]
    other = write_csv(tmp_path / "b.csv", spaced)
    first, second = load(train_file=path, validation_file=path), load(train_file=other, validation_file=path)
    assert texts(first, "train") != texts(second, "train")
    assert first.fingerprint() == second.fingerprint()


@pytest.mark.parametrize(
    "changed",
    [
        [("good plot", "x"), *ROWS[1:]],
        [("good film", "y"), *ROWS[1:]],
        [ROWS[1], ROWS[0], ROWS[2]],
        ROWS[:2],
        [*ROWS, ROWS[0]],
        [("good film bad", "x"), ("film", "y"), ROWS[2]],
        [("good film", "x"), ("bad film", "z"), ("fine plot", "x")],
    ],
)
def test_fingerprint_changes_with_tokens_labels_names_rows_and_order(
    load: Load, tmp_path: Path, changed: list[Row]
) -> None:
    path, other = write_csv(tmp_path / "a.csv", ROWS), write_csv(tmp_path / "b.csv", changed)
    first, second = load(train_file=path, validation_file=path), load(train_file=other, validation_file=other)
    assert first.fingerprint() != second.fingerprint()


# ---------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("config", "name", "metrics"),
    [
        (DataConfig(), "movie_reviews", ("accuracy", "f1_macro")),
        (DataConfig(dataset_config="binary"), "movie_reviews-binary", ("accuracy", "f1_macro")),
        (DataConfig(dataset="mrpc"), "mrpc", ("accuracy", "f1", "f1_macro")),
        (DataConfig(dataset="cola"), "cola", ("matthews_correlation", "accuracy", "f1_macro")),
        (DataConfig(dataset="sst2"), "sst2", ("accuracy", "f1_macro")),
        (DataConfig(dataset="user/reviews"), "reviews", ("accuracy", "f1_macro")),
        (DataConfig(train_file="some/where/mine.csv"), "mine", ("accuracy", "f1_macro")),
        (DataConfig(test_file="heldout.jsonl"), "heldout", ("accuracy", "f1_macro")),
    ],
)
def test_each_data_set_has_a_short_name_and_default_metrics(
    config: DataConfig, name: str, metrics: tuple[str, ...]
) -> None:
    assert dataset_name(config) == name
    assert default_metrics(config) == metrics


# ---------------------------------------------------------------------------------------------------- tokens in chunks


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("windows", [None, Windows(8, 2)])
def test_call_of_the_backend_gives_what_the_tokenizer_gives(
    roberta: Path, columns: int, windows: Windows | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(roberta)
    texts = [["", "film", "a film " * 9, *AWKWARD_TEXTS], ["good " * 9, "", "bad", *reversed(AWKWARD_TEXTS)]][:columns]
    if windows and columns == 2:
        pytest.skip("windows are for one text column")
    for names in (["input_ids"], ["input_ids", "token_type_ids"]):
        tokenizer.model_input_names = names
        limit = 60 if windows else 8
        fast = Encoder(tokenizer, limit, windows)(texts)
        with monkeypatch.context() as patched:
            patched.setattr("lib.data.encoding.has_plain_call", lambda _: False)
            assert Encoder(tokenizer, limit, windows)(texts) == fast
        assert set(names) <= set(fast)


def test_processes_of_a_slow_tokenizer_do_not_change_the_tokens() -> None:
    tokenizer = ByT5Tokenizer()
    chunks = [[[f"text {number} {part}" for part in range(3)]] for number in range(7)]
    alone, shared = (list(tokenize(iter(chunks), tokenizer, 9, None, workers)) for workers in (None, 2))
    assert alone == shared
    assert [len(table) for table in alone] == [3] * 7


def test_chunks_do_not_change_the_data(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a chunk holds rows of one split only."""
    path = write_csv(tmp_path / "t.csv", sentences(60))
    options = {"train_file": path, "max_train_samples": 40, "max_eval_samples": 4}
    whole = load(**options)
    monkeypatch.setattr("lib.data.load.CHUNK", 3)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "other"))
    chunked = load(**options)
    assert chunked.fingerprint() == whole.fingerprint()
    assert [texts(chunked, split) for split in chunked.texts] == [texts(whole, split) for split in whole.texts]


@pytest.mark.parametrize("columns", [1, 2])
def test_shared_texts_are_counted_exactly(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against sets of Python, in blocks of a few rows; the pairs differ only in where the first text ends."""
    monkeypatch.setattr("lib.data.load.COMPARED", 7)
    monkeypatch.setattr("lib.data.load.CHUNK", 5)
    draw = random.Random(0)
    for size in (1, 20):
        rows = [
            [tuple("".join(draw.choices("a 1é", k=draw.randrange(3))) for _ in range(columns)) for _ in range(count)]
            for count in (size, 3 * size)
        ]
        names = ["one", "two"][:columns]
        tables = [Dataset.from_dict(dict(zip(names, zip(*part, strict=True), strict=True))) for part in rows]
        assert count_shared(*tables) == sum(row in set(rows[1]) for row in rows[0])


@pytest.mark.parametrize("validation", [True, False])
def test_each_row_is_left_out_by_one_fold_and_none_is_both_trained_on_and_scored(load, tmp_path, validation):
    files = {"train_file": write_csv(tmp_path / "train.csv", sentences(61)), "test_file": tmp_path / "unread.csv"}
    if validation:
        files["validation_file"] = write_csv(tmp_path / "dev.csv", sentences(9, 1))
    whole = load(splits=("train", "validation"), **files)
    rows, left_out = sorted(whole.texts["train"]["text"]), []
    for number in (1, 2, 3, 4):
        part = load(fold=f"{number}/4", **files)
        assert sorted([*part.texts["train"]["text"], *part.texts["test"]["text"]]) == rows
        assert list(part.texts["validation"]["text"]) == list(whole.texts["validation"]["text"])
        assert set(np.bincount(part.labels("test"))) <= {4, 5, 6}  # of three classes
        only = load(fold=f"{number}/4", splits=("test",), label_names=part.label_names, **files)
        assert list(only.texts["test"]["text"]) == list(part.texts["test"]["text"])
        left_out += part.texts["test"]["text"]
    assert sorted(left_out) == rows


@pytest.mark.parametrize("fold", ["0/5", "6/5", "1/1", "2", "a/b", "²/5", "1/5/2"])
def test_fold_that_cannot_be_is_refused(fold):
    with pytest.raises(UserError, match="--fold"):
        DataConfig(fold=fold)


def test_more_folds_than_rows_are_refused(load, tmp_path):
    files = {split: write_csv(tmp_path / f"{split}.csv", sentences(6)) for split in ("train_file", "validation_file")}
    with pytest.raises(UserError, match="6 rows"):
        load(fold="1/7", **files)
