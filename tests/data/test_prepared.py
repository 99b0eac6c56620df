"""Prepared data answer for content: what a start finds is what it would make of the same bytes, or it makes it again."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

import lib.data.load
from lib.config.sections import DataConfig, ModelConfig
from lib.data.load import Data, load_data
from lib.data.prepared import (
    find_or_prepare,
    prepared_folder,
    prepared_key,
    read_fields,
    tokenizer_identity,
    write_fields,
)
from lib.errors import UserError
from lib.model.load import load_tokenizer
from lib.runtime.atomic import MANIFEST, find_damage, remove_unused, write_manifest
from tests.conftest import ROOT, Command, sentences, write_csv

Load = Callable[..., Data]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for prepared data."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prepared"


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders into which data were prepared, one for each time."""
    folders: list[Path] = []
    prepare = lib.data.load.prepare_data

    def counted(folder: Path, *arguments: Any) -> None:
        folders.append(folder)
        prepare(folder, *arguments)

    monkeypatch.setattr("lib.data.load.prepare_data", counted)
    return folders


@pytest.fixture(scope="module")
def tokenizer(roberta: Path) -> Any:
    return load_tokenizer(ModelConfig(model=str(roberta)))


@pytest.fixture
def load(tokenizer: Any) -> Load:
    """`load(train_file=...)`: the data of these options."""

    def call(label_names: list[str] | None = None, **options: Any) -> Data:
        options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        return load_data(DataConfig(**options), tokenizer, label_names=label_names)

    return call


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir())


def everything(data: Data) -> dict[str, Any]:
    """All that data hold, as plain values."""
    tables = {name: {split: table[:] for split, table in getattr(data, name).items()} for name in ("texts", "tokens")}
    lengths = {split: values.tolist() for split, values in data.lengths.items()}
    fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    return fields | tables | {"lengths": lengths, "fingerprint": data.fingerprint()}


# ---------------------------------------------------------------------------------------------------- second start


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 6},
        {"max_length": 6, "window_stride": 2},
        {"max_train_samples": 20, "max_eval_samples": 3, "pad_to_max_length": True},
    ],
)
def test_second_start_finds_the_same_data_and_prepares_nothing(
    load: Load, tmp_path: Path, prepared: list[Path], options: dict[str, Any]
) -> None:
    path = write_csv(tmp_path / "train.csv", sentences(40))
    first = load(train_file=path, **options)
    second = load(train_file=path, **options)
    assert len(prepared) == 1
    assert everything(second) == everything(first)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_labels_of_any_kind_are_found_as_they_were_made(
    load: Load, tmp_path: Path, prepared: list[Path], problem: str
) -> None:
    values = [0.5, 1.5, -2.25] if problem == "regression" else [["a"], ["a", "b"], []]
    rows = [{"text": text, "label": values[number % 3]} for number, (text, _) in enumerate(sentences(30))]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = load(train_file=path), load(train_file=path)
    assert (len(prepared), second.problem_type) == (1, problem)
    assert everything(second) == everything(first)
    assert second.labels("train").tolist() == second.tokens["train"]["labels"][:]


def test_stored_fingerprint_is_that_of_the_tables(load: Load, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "train.csv", sentences(40))
    load(train_file=path)
    found = load(train_file=path)
    assert dataclasses.replace(found).fingerprint() == found.fingerprint()  # computed anew
    other = dataclasses.replace(found, label_names=["x", "y", "z"])
    assert other.fingerprint() != found.fingerprint()


def test_windows_are_written_into_the_tokenizer_when_data_are_found(roberta: Path, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "train.csv", sentences(40))
    for _ in range(2):
        tokenizer = load_tokenizer(ModelConfig(model=str(roberta)))
        load_data(DataConfig(train_file=str(path), max_length=6, window_stride=2), tokenizer)
        assert tokenizer.init_kwargs["windows"] == {"max_length": 6, "stride": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 5},
        {"max_train_samples": 9},
        {"problem_type": "single_label_classification"},
        {"window_stride": 2, "max_length": 6},
        {"label_names": ["mixed", "good", "bad"]},
    ],
)
def test_another_option_is_other_data(
    load: Load, tmp_path: Path, prepared: list[Path], options: dict[str, Any]
) -> None:
    path = write_csv(tmp_path / "train.csv", sentences(30))
    load(train_file=path)
    load(train_file=path, **options)
    assert len(prepared) == 2


def test_windows_of_a_trained_model_are_part_of_the_key(roberta: Path, tmp_path: Path, prepared: list[Path]) -> None:
    path, tokenizer = write_csv(tmp_path / "train.csv", sentences(30)), load_tokenizer(ModelConfig(model=str(roberta)))
    names = ["bad", "good", "mixed"]
    whole = load_data(DataConfig(train_file=str(path)), tokenizer, label_names=names)
    tokenizer.init_kwargs["windows"] = {"max_length": 6, "stride": 2}
    for _ in range(2):
        windowed = load_data(DataConfig(train_file=str(path)), tokenizer, label_names=names)
    assert "num_windows" in windowed.tokens["train"].column_names
    assert "num_windows" not in whole.tokens["train"].column_names
    assert len(prepared) == 2


def test_number_of_processes_for_tokenization_does_not_matter(load: Load, tmp_path: Path, prepared: list[Path]) -> None:
    path = write_csv(tmp_path / "train.csv", sentences(30))
    load(train_file=path)
    load(train_file=path, preprocessing_num_workers=2)
    assert len(prepared) == 1


def test_another_tokenizer_has_another_identity(roberta: Path) -> None:
    def identity(change: Callable[[Any], None]) -> str:
        tokenizer = AutoTokenizer.from_pretrained(roberta)
        change(tokenizer)
        return str(tokenizer_identity(tokenizer))

    plain = identity(lambda tokenizer: None)
    assert identity(lambda tokenizer: tokenizer(["a film"], truncation=True, max_length=4)) == plain
    for change in (
        lambda tokenizer: tokenizer.add_tokens(["zzz"]),
        lambda tokenizer: setattr(tokenizer, "model_max_length", 7),
        lambda tokenizer: setattr(tokenizer, "truncation_side", "left"),
        lambda tokenizer: setattr(tokenizer, "split_special_tokens", True),
    ):
        assert identity(change) != plain


def test_key_is_the_same_in_every_process(run: Command, roberta: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from lib.config.sections import DataConfig, ModelConfig\n"
        "from lib.data.prepared import prepared_key\n"
        "from lib.model.load import load_tokenizer\n"
        "tokenizer = load_tokenizer(ModelConfig(model=sys.argv[1]))\n"
        "print(prepared_key('content', DataConfig(), tokenizer, ('train',), None))\n"
    )
    keys = {
        run(script, roberta, env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(seed)}).stdout.split()[-1]
        for seed in (1, 2)
    }
    assert len(keys) == 1


def test_another_program_prepares_again(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    before = prepared_key("content", DataConfig(), tokenizer)
    monkeypatch.setattr("lib.data.prepared.program_identity", lambda: "changed")
    assert prepared_key("content", DataConfig(), tokenizer) != before


# ---------------------------------------------------------------------------------------------------- content

OLD, NEW = "the old film", "a new actor!"
"""Texts of one length."""


def as_csv(path: Path, text: str) -> None:
    path.write_text(f"text,label\n{text} 1,good\n{text} 2,bad\n{text} 3,good\n{text} 4,bad\n")


def as_jsonl(path: Path, text: str) -> None:
    rows = [{"text": f"{text} {number}", "label": ("bad", "good")[number % 2]} for number in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_parquet(path: Path, text: str) -> None:
    Dataset.from_dict({"text": [f"{text} {n}" for n in range(4)], "label": ["bad", "good"] * 2}).to_parquet(path)


def as_folder(path: Path, text: str) -> None:
    path.mkdir(exist_ok=True)
    as_csv(path / "train.csv", text)
    as_csv(path / "validation.csv", text)


def as_saved(path: Path, text: str) -> None:
    rows = Dataset.from_dict({"text": [f"{text} {n}" for n in range(4)], "label": ["bad", "good"] * 2})
    DatasetDict({"train": rows, "validation": rows}).save_to_disk(path)


@pytest.mark.parametrize(
    ("name", "write", "flag"),
    [
        ("train.csv", as_csv, "train_file"),
        ("train.jsonl", as_jsonl, "train_file"),
        ("train.parquet", as_parquet, "train_file"),
        ("saved", as_saved, "train_file"),
        ("folder", as_folder, "dataset"),
        ("saved", as_saved, "dataset"),
    ],
)
def test_other_content_of_the_same_path_size_and_time_is_read(
    load: Load, tmp_path: Path, name: str, write: Callable[[Path, str], None], flag: str
) -> None:
    path = tmp_path / name
    for text in (OLD, NEW, OLD):
        write(path, text)
        for item in [path, *path.rglob("*")]:
            os.utime(item, (1_000_000_000, 1_000_000_000))
        found = load(**{flag: path})
        assert all(row.startswith(text) for split in found.texts.values() for row in split["text"])


def test_data_that_change_while_they_are_read_are_refused(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    path = write_csv(tmp_path / "train.csv", sentences(30))
    read = lib.data.load.load_raw

    def append(config: DataConfig) -> Any:
        raw = read(config)
        with path.open("a") as file:
            file.write("one more,good\n")
        return raw

    monkeypatch.setattr("lib.data.load.load_raw", append)
    with pytest.raises(UserError, match="changed"):
        load(train_file=path)
    assert entries(cache) == []


# ---------------------------------------------------------------------------------------------------- damage and space


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "tokens-train.arrow"),
        lambda folder: flip(folder / "fields.txt"),
        lambda folder: (folder / "texts-validation.arrow").unlink(),
        lambda folder: (folder / "tokens-train.arrow").write_bytes(b""),
        lambda folder: (folder / MANIFEST).write_text("{"),
        lambda folder: (flip(folder / "tokens-train.arrow"), (folder / MANIFEST).write_text('{"files": {}}')),
    ],
)
def test_damaged_data_are_said_and_made_again(
    load: Load, tmp_path: Path, prepared: list[Path], cache: Path, damage: Callable[[Path], Any]
) -> None:
    path = write_csv(tmp_path / "train.csv", sentences(30))
    first = everything(load(train_file=path))
    (folder,) = entries(cache)
    damage(folder)
    second = load(train_file=path)
    assert any(str(folder) in note and "damaged" in note for note in second.notes)
    assert everything(second) | {"notes": first["notes"]} == first
    assert everything(load(train_file=path)) == first
    assert len(prepared) == 2
    assert find_damage(folder) is None


def test_unwritable_cache_does_not_change_the_data_and_is_said(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "saved"
    as_saved(path, "a film")
    kept = load(train_file=path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    data = load(train_file=path)
    (note,) = set(data.notes) - set(kept.notes)
    assert str(prepared_folder()) in note
    assert "HF_DATASETS_CACHE" in note
    assert everything(data) | {"notes": kept.notes} == everything(kept)


def test_full_disk_names_the_variable(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"No space left.*HF_DATASETS_CACHE"):
        find_or_prepare("key", write, str)
    assert entries(prepared_folder()) == []


def test_data_that_cannot_be_known_by_content_are_not_kept(cache: Path) -> None:
    found, notes = find_or_prepare(
        None, lambda folder: write_fields(folder, {"a": 1}), lambda folder: read_fields(folder)
    )
    assert (found, notes) == ({"a": 1}, ())
    assert not cache.exists()


def test_two_starts_at_once_leave_one_entry_that_verifies(cache: Path) -> None:
    def prepare(folder: Path) -> None:
        write_fields(folder, {"a": (1, 2)})

    def prepare_beside_another(folder: Path) -> None:
        prepare(folder)
        assert find_or_prepare("key", prepare, read_fields) == ({"a": (1, 2)}, ())

    assert find_or_prepare("key", prepare_beside_another, read_fields) == ({"a": (1, 2)}, ())
    assert entries(cache) == [cache / "key"]
    assert find_damage(cache / "key") is None


def test_data_in_use_outlive_their_deletion(load: Load, tmp_path: Path, cache: Path) -> None:
    path = write_csv(tmp_path / "train.csv", sentences(30))
    data = load(train_file=path)
    before = everything(data)
    remove_unused(cache, 0)
    assert entries(cache) == []
    assert everything(data) == before


def test_least_recently_used_data_are_deleted_first(
    load: Load, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_csv(tmp_path / "train.csv", sentences(30))
    folders = []
    for size in (5, 6, 7):
        load(train_file=path, max_length=size)
        folders += [folder for folder in entries(cache) if folder not in folders]
    for age, folder in enumerate(folders):
        os.utime(folder / MANIFEST, (1000 + age, 1000 + age))
    load(train_file=path, max_length=5)  # used now
    used = sum(item.stat().st_size for item in folders[0].iterdir())
    monkeypatch.setattr("lib.data.prepared.LIMIT", int(2.5 * used))
    load(train_file=path, max_length=8)
    kept = entries(cache)
    assert folders[0] in kept
    assert not {folders[1], folders[2]} & set(kept)
    assert len(kept) == 2


def test_entry_above_the_limit_is_kept_for_its_own_run(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.data.prepared.LIMIT", 0)
    for key in "ab":
        find_or_prepare(key, lambda folder: write_fields(folder, {"a": 1}), read_fields)
        assert entries(cache) == [cache / key]


def test_plain_values_keep_their_types_and_others_are_refused(tmp_path: Path) -> None:
    values = {"names": ["ä'\n", '"'], "columns": ("a", "b"), "sizes": {0: 1.5, "x": None}, "deep": [(1, [True])]}
    write_fields(tmp_path, values)
    assert read_fields(tmp_path) == values
    write_manifest(tmp_path, {})
    assert find_damage(tmp_path) is None
    with pytest.raises((TypeError, ValueError)):
        write_fields(tmp_path, {"folder": tmp_path})
