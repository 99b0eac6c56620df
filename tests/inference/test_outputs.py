"""Predictions are written one by one, and a file appears only when it is complete."""

import csv
import io
import json
import math
import os
import re
import sys
import threading

import numpy as np
import pyarrow.parquet as pq
import pytest

from lib.errors import UserError, printable
from lib.inference.inputs import Example
from lib.inference.outputs import to_record, write_predictions
from tests.conftest import read_lines

EXAMPLES = [Example(0, 0, ("a film",)), Example(1, 1, ("dull, 电影",))]
PREDICTIONS = [
    {"label": "good", "probabilities": {"bad": 0.12345678, "good": 0.87654322}},
    {"label": "bad", "probabilities": {"bad": np.float32(0.75), "good": 0.25}},
]


def test_jsonl_holds_id_text_and_prediction(tmp_path):
    path = tmp_path / "deep" / "out.jsonl"
    assert write_predictions(str(path), zip(EXAMPLES, PREDICTIONS, strict=True)) == 2
    first, second = read_lines(path)
    assert first == {"id": 0, "text": "a film", "label": "good", "probabilities": {"bad": 0.123457, "good": 0.876543}}
    assert second["text"] == "dull, 电影"
    assert "电影" in path.read_text(encoding="utf-8")


def test_csv_has_a_column_for_each_class_and_lists_as_json(tmp_path):
    path = tmp_path / "out.csv"
    answers = [
        PREDICTIONS[0] | {"entities": [{"word": "x", "score": np.float32(0.5)}]},
        PREDICTIONS[1] | {"entities": []},
    ]
    write_predictions(str(path), zip([EXAMPLES[0], Example(1, "k", ("a", "b"))], answers, strict=True))
    first, second = list(csv.DictReader(path.open(encoding="utf-8")))
    assert list(first) == ["id", "text", "label", "probabilities/bad", "probabilities/good", "entities"]
    assert (first["probabilities/bad"], first["label"]) == ("0.123457", "good")
    assert json.loads(first["entities"]) == [{"word": "x", "score": 0.5}]
    assert (second["id"], json.loads(second["text"])) == ("k", ["a", "b"])


def test_standard_output_gets_jsonl(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert write_predictions(None, zip(EXAMPLES, PREDICTIONS, strict=True)) == 2
    assert [json.loads(line)["id"] for line in out.getvalue().splitlines()] == [0, 1]
    assert not out.closed


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.npy", "out.parquet"])
def test_interrupted_write_keeps_the_old_file(tmp_path, name):
    (tmp_path / name).write_text("old")

    def interrupted():
        yield EXAMPLES[0], {"embedding": np.ones(3, np.float32)}
        assert any(path.suffix == ".part" for path in tmp_path.iterdir())
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_predictions(str(tmp_path / name), interrupted())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "old"


def test_unwritable_output_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .* cannot be written"):
        write_predictions(str(tmp_path / "file" / "out.jsonl"), zip(EXAMPLES, PREDICTIONS, strict=True))


def test_npy_and_parquet_of_many_rows_equal_the_vectors(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(9001, 5)).astype(np.float32)
    for name in ("v.npy", "v.parquet"):
        rows = ((Example(i, i, ("",)), {"embedding": vector}) for i, vector in enumerate(vectors))
        assert write_predictions(str(tmp_path / name), rows) == 9001
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy", mmap_mode="r"), vectors)
    table = pq.ParquetFile(tmp_path / "v.parquet")
    assert (table.metadata.num_rows, table.metadata.num_row_groups) == (9001, 3)
    found = np.stack(table.read().column("embedding").to_numpy())
    np.testing.assert_array_equal(found, vectors)


def test_nan_becomes_text_and_numpy_integers_numbers():
    assert to_record(EXAMPLES[0], {"scores": [float("nan"), np.int64(3)]})["scores"] == ["NaN", 3]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bar_is_for_terminals_only(tmp_path, monkeypatch, terminal):
    error = io.StringIO()
    error.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", error)
    write_predictions(str(tmp_path / "out.jsonl"), zip(EXAMPLES, PREDICTIONS, strict=True), total=2)
    assert ("2/2" in error.getvalue()) == terminal
    assert terminal or error.getvalue() == ""


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.npy", "out.parquet"])
def test_of_two_that_write_one_output_the_last_wins_whole(tmp_path, name):
    def rows(start, between):
        for number in range(start, start + 5):
            yield Example(number, number, ("",)), {"embedding": np.full(3, number, np.float32)}
            if number == start + 2:
                between()

    def files():
        return {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".part"}

    write_predictions(str(tmp_path / name), rows(0, lambda: None))
    alone = files()
    for path in tmp_path.iterdir():
        path.unlink()
    seen = []

    def other_run():
        write_predictions(str(tmp_path / name), rows(50, lambda: None))
        seen.append(files())

    write_predictions(str(tmp_path / name), rows(0, other_run))
    assert files() == alone
    assert {path.name for path in tmp_path.iterdir()} == set(alone)
    write_predictions(str(tmp_path / name), rows(50, lambda: None))
    assert seen == [files()]


def test_output_has_the_permissions_of_a_new_file_and_a_link_stays_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "elsewhere" / "labels.jsonl")
    write_predictions(str(tmp_path / "out.jsonl"), zip(EXAMPLES, PREDICTIONS, strict=True))
    assert (tmp_path / "out.jsonl").is_symlink()
    assert len(read_lines(tmp_path / "elsewhere" / "labels.jsonl")) == 2
    (tmp_path / "new").touch()
    assert (tmp_path / "out.jsonl").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_named_pipe_is_written_to_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "out.jsonl")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "out.jsonl").read_text()), daemon=True)
    reader.start()
    write_predictions(str(tmp_path / "out.jsonl"), zip(EXAMPLES, PREDICTIONS, strict=True))
    reader.join(30)
    assert (tmp_path / "out.jsonl").is_fifo()
    assert [json.loads(line)["id"] for line in read[0].splitlines()] == [0, 1]


FORMULAS = ["=cmd|' /C calc'!A0", "+1+cmd", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1", "'=1", "''-x"]
TEXTS = [*FORMULAS, "a=b", "'tis", "", " x", "-1", "+1", "-0.5", "1e-5", "--", "0=1"]


def test_csv_has_no_formula_and_every_text_can_be_read_back(tmp_path):
    rows = [(Example(i, text, (text,)), {"label": text, "=score": -0.5}) for i, text in enumerate(TEXTS)]
    write_predictions(str(tmp_path / "out.csv"), rows)
    found = list(csv.DictReader((tmp_path / "out.csv").open(encoding="utf-8", newline="")))
    cells = [cell for row in found for cell in (*row, *row.values())]
    assert [cell for cell in cells if cell[:1] in "=@\t\r\n＝" and cell] == []
    assert [cell for cell in cells if cell[:1] in "+-" and cell and not is_number(cell)] == []
    back = [re.sub(r"^'(?='*[=+@\t\r\n＝-])", "", row["label"]) for row in found]
    assert back == TEXTS
    assert [row["label"] for row in found[-4:]][:2] == ["-0.5", "1e-5"]
    assert [row["'=score"] for row in found] == ["-0.5"] * len(TEXTS)


def is_number(cell):
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def test_jsonl_shows_no_escape_sequence_and_is_read_back_equal(monkeypatch):
    texts = ["\x1b]0;x\x07", "a\r\n- forged", "\x9b31m", "\u202egpj.exe", "\u2028", "電影 👨\u200d👩", "\U000e0041"]
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    write_predictions(None, [(Example(i, i, (text,)), {"label": text}) for i, text in enumerate(texts)])
    lines = out.getvalue().split("\n")
    assert [json.loads(line)["label"] for line in lines[:-1]] == texts
    assert all(printable(line) == line for line in lines)
