"""Bad input ends with code 2, without a traceback: the message names flag or file, what was found and what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from lib.config.cli import dump_config
from lib.config.sections import DataConfig
from lib.config.train import OptimConfig, TrackingConfig, TrainConfig
from lib.data.load import load_data
from lib.errors import UserError
from tests.conftest import Command, sentences, write_csv

Refusal = Callable[..., str]

GOOD = "text,label\ngood film,pos\nbad film,neg\nfine film,pos\n"


def missing(words: list[str], message: str) -> list[str]:
    return [word for word in words if word not in message]


# ---------------------------------------------------------------------------------------------------- commands


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "train.csv", sentences(12))


def test_command_that_is_refused_ends_with_code_2_and_one_line(run: Command, roberta: Path, tmp_path: Path) -> None:
    done = run("train.py", "--model", roberta, "--report_to=none", "--train_file", "nowhere.csv", code=2)
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "--train_file nowhere.csv: no such file" in line
    assert not (tmp_path / "outputs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_that_is_not_there(run: Command, roberta: Path, train_file: Path, tmp_path: Path) -> None:
    env = {"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": "0"}
    done = run("train.py", "--model", roberta, "--report_to=none", "--train_file", train_file, code=2, env=env)
    assert (
        missing(["CUDA_VISIBLE_DEVICES=0 asks for GPUs", "PyTorch sees none", "unset the variable"], done.stderr) == []
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "outputs").exists()


@pytest.fixture
def refused(call: Command, roberta: Path, tmp_path: Path) -> Refusal:
    """`refused("--lr=0")`: what train.py says before it ends with code 2."""

    def refuse(*flags: object) -> str:
        done = call("train.py", "--model", roberta, "--report_to=none", "--mixed_precision=no", *flags, code=2)
        assert not (tmp_path / "outputs").exists()
        return done.stderr

    return refuse


def test_unknown_label_in_a_split(refused: Refusal, train_file: Path, tmp_path: Path) -> None:
    dev = write_csv(tmp_path / "dev.csv", [("a film", "good"), ("a plot", "great")])
    message = refused("--train_file", train_file, "--validation_file", dev)
    assert missing(["validation split", "label", "(bad, good, mixed)", "row 2 with 'great'"], message) == []


def test_missing_column(refused: Refusal, train_file: Path) -> None:
    message = refused("--train_file", train_file, "--label_column", "stars")
    assert missing(["--label_column stars", "train split has no such column", "text, label"], message) == []


def test_broken_line_of_json(refused: Refusal, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "label": label}) for text, label in sentences(12)]
    lines[6] = lines[6][:-1]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    message = refused("--train_file", "train.jsonl")
    assert "--train_file train.jsonl: line 7 is not JSON" in message


def test_folder_that_is_no_model(refused: Refusal, train_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refused("--train_file", train_file, "--model", tmp_path / "empty")
    assert missing([f"--model {tmp_path / 'empty'} could not be loaded", "--model minilm"], message) == []


def test_folder_of_another_run(refused: Refusal, roberta: Path, train_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    before = TrainConfig(
        data=DataConfig(train_file=str(train_file)),
        optim=OptimConfig(learning_rate=1e-3),
        tracking=TrackingConfig(report_to="none", notes="an earlier try"),
    )
    (folder / "config.yaml").write_text(dump_config(before), encoding="utf-8")
    saved = (folder / "config.yaml").read_bytes()
    message = refused("--train_file", train_file, "--output_dir", folder, "--lr=1e-4")
    assert f"{folder} holds a run with other settings" in message
    assert "learning_rate: 0.001 there, 0.0001 now" in message
    assert f"model: minilm there, {roberta} now" in message
    assert missing(["--output_dir", "--run_name"], message) == []
    assert "notes" not in message
    assert [file.name for file in folder.iterdir()] == ["config.yaml"]
    assert (folder / "config.yaml").read_bytes() == saved


# ---------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def tokenizer(roberta: Path) -> Any:
    return AutoTokenizer.from_pretrained(roberta)


@pytest.fixture
def complaint(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refusal:
    """`complaint(train_file="t.csv")`: why these data, named relative to the test's folder, are refused."""
    monkeypatch.chdir(tmp_path)

    def call(**options: Any) -> str:
        with pytest.raises(UserError) as error:
            load_data(DataConfig(**options), tokenizer)
        return str(error.value)

    return call


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", b"", ["t.csv is empty"]),
        ("t.csv", b"text,label\n", ["t.csv: there are no rows in it"]),
        ("t.csv", b"\n\n", ["t.csv: there are no rows in it"]),
        ("t.jsonl", b"\n", ["t.jsonl: there are no rows in it"]),
        ("t.json", b"[]", ["t.json: there are no rows in it"]),
        ("t.csv", GOOD.encode("utf-16-le"), ["t.csv: line 1 holds a NUL", "--encoding utf-16-le"]),
        ("t.csv", (GOOD + "café,pos\n").encode("latin-1"), ["t.csv: line 5 is not UTF-8", "--encoding"]),
        ("t.jsonl", b'{"text": "a", "label": "x"}\n\n["b", "y"]\n', ["t.jsonl", "line 3 is not a JSON object"]),
        ("t.json", b'[{"text": "a", "label"', ["t.json: line 1 is not JSON"]),
        ("t.csv", (GOOD + "a,b,c\n").encode(), ["t.csv: line 5 has 3 values", "the header has 2"]),
        ("t.csv", GOOD.replace(",", ";").encode(), ["t.csv has one column, 'text;label'", "by commas"]),
        ("t.tsv", GOOD.encode(), ["t.tsv has one column, 'text,label'", "by tabs"]),
        ("t.parquet", b"text", ["t.parquet is not parquet"]),
        ("t.txt", GOOD.encode(), ["t.txt: the name must end in one of .csv, .tsv, .json, .jsonl, .parquet"]),
        ("t.jsonl", b'{"text": 1, "label": "x"}\n', ["--text_columns text: not text but int64 in the train split"]),
        ("t.csv", b"text,label\na,x\n,y\nb,y\n,x\n", ["2 rows of the train split have no text", "row 2"]),
        ("t.csv", b"text,label\na,x\n,y\nb,y\n", ["row 2 of the train split has no text", "remove it"]),
        ("t.csv", b"text,label\na,x\nb\nc,y\n", ["t.csv: line 3 has 1 value", "the header has 2"]),
        ("t.csv", b"text,label\na,x\nb,x\n", ["--label_column label holds one class only, 'x'"]),
        ("t.csv", b"text,label\na,0.5\nb,\n", ["1 of 2 rows of the train split have no label: rows 2"]),
        ("t.csv", b"text,label\na,0.5\nb,0.5\n", ["--label_column label holds one value only, 0.5"]),
        ("t.csv", b"text,label\na,0.5\nb,inf\n", ["row 2 of the train split has the label", "inf"]),
        ("t.csv", b"a,b,label\nx,y,0\nz,w,1\n", ["which column holds the text?", "a, b, label", "--text_columns"]),
        ("t.csv", b"text,mood\nx,y\nz,w\n", ["which column holds the label?", "text, mood", "--label_column"]),
    ],
)
def test_refusal_names_the_file_and_what_was_found(
    complaint: Refusal, tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert missing(words, complaint(train_file=name)) == []


def test_refusal_names_the_flag_of_the_file(complaint: Refusal, tmp_path: Path) -> None:
    (tmp_path / "good.csv").write_text(GOOD)
    (tmp_path / "empty.csv").write_text("")
    message = complaint(train_file="good.csv", test_file="empty.csv")
    assert message == "--test_file empty.csv is empty"


def test_text_column_that_only_one_split_has(complaint: Refusal, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(GOOD)
    (tmp_path / "dev.csv").write_text(GOOD.replace("text", "review"))
    message = complaint(train_file="train.csv", validation_file="dev.csv")
    assert message == "--text_columns text: the validation split has no such column; it has: review, label"


# ---------------------------------------------------------------------------------------------------- folders and names


def test_saved_split_without_rows(complaint: Refusal, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
    DatasetDict({"train": rows, "validation": rows.select([])}).save_to_disk(tmp_path / "saved")
    assert complaint(dataset="saved") == "--dataset saved: a split saved there is empty"


def test_empty_split_of_a_loaded_data_set(complaint: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
    monkeypatch.setattr("lib.data.sources.load_dataset", lambda *_, **__: {"train": rows, "test": rows.select([])})
    assert complaint(dataset="user/name") == "the test split is empty"


def test_configuration_or_revision_that_does_not_exist(complaint: Refusal, tmp_path: Path) -> None:
    """Once they were ignored in silence."""
    (tmp_path / "data").mkdir()
    assert missing(["--dataset_config x", "data has none"], complaint(dataset="data", dataset_config="x")) == []
    assert missing(["--revision x", "a folder has no revisions"], complaint(dataset="data", revision="x")) == []
    assert missing(["--revision x", "movie_reviews has no revisions"], complaint(revision="x")) == []


def test_classes_of_one_row_each_leave_no_validation_split(complaint: Refusal, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\na,x\nb,y\n")
    assert missing(["no class of the train split has two rows"], complaint(train_file="t.csv")) == []


def test_folder_without_data(complaint: Refusal, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert complaint(train_file="folder") == "--train_file folder: the folder holds no data files"


def test_file_given_as_data_set(complaint: Refusal, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(GOOD)
    assert missing(["--dataset train.csv is a file", "--train_file"], complaint(dataset="train.csv")) == []


def test_data_set_that_cannot_be_reached(complaint: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'user/name' on the Hub\nand more")

    monkeypatch.setattr("lib.data.sources.load_dataset", unreachable)
    message = complaint(dataset="user/name", dataset_config="small")
    assert missing(["--dataset user/name --dataset_config small", "Couldn't reach", "HF_ENDPOINT"], message) == []
    assert "movie_reviews" in message
    assert "and more" not in message


def test_data_set_without_a_train_split(complaint: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
    monkeypatch.setattr("lib.data.sources.load_dataset", lambda *_, **__: {"test": rows})
    assert complaint(dataset="user/name") == "there is no train split; name has: test"
