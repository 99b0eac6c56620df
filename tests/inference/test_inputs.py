"""Every input gives its texts in order, one at a time; errors name the line."""

import csv
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.config.predict import InputConfig
from lib.errors import UserError
from lib.inference.inputs import Example, count_rows, read_examples

TEXTS = ["a good film", "", 'with "quotes", commas\nand a line break', "tab\there", "naïve 电影 🎬"]
GUESSES = (("sentence1", "sentence2"), ("text",), ("sentence",))


def examples(guesses=GUESSES, **settings) -> list[Example]:
    return list(read_examples(InputConfig(**settings), guesses))


def write(path: Path, texts: list[str]) -> Path:
    kind = path.suffix
    if kind == ".parquet":
        pq.write_table(pa.table({"key": [f"k{i}" for i in range(len(texts))], "text": texts}), path)
    elif kind == ".jsonl":
        lines = [json.dumps({"key": f"k{i}", "text": text}) for i, text in enumerate(texts)]
        path.write_text("\n".join(lines) + "\n")
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter="\t" if kind == ".tsv" else ",")
            writer.writerows([("key", "text"), *((f"k{i}", text) for i, text in enumerate(texts))])
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_round_trips_the_texts(tmp_path, kind):
    path = write(tmp_path / f"t.{kind}", TEXTS)
    assert examples(input=str(path)) == [Example(i, i, (text,)) for i, text in enumerate(TEXTS)]
    assert [example.id for example in examples(input=str(path), id_column="key")] == [f"k{i}" for i in range(5)]
    renamed = path.rename(tmp_path / "data.bin")
    assert [example.texts for example in examples(input=str(renamed), input_format=kind)] == [(text,) for text in TEXTS]


def test_every_line_of_a_txt_file_is_a_text(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("\ufeffa film\r\n\n  padded \nlast\u2028line".encode())
    assert [example.texts[0] for example in examples(input=str(path))] == ["a film", "", "  padded ", "last\u2028line"]


def test_arguments_and_questions_are_examples():
    assert examples(texts=("a", "b")) == [Example(0, 0, ("a",)), Example(1, 1, ("b",))]
    asked = examples((("question", "context"),), question="who", context="a man")
    assert asked == [Example(0, 0, ("who", "a man"))]


@pytest.mark.parametrize(
    ("settings", "lines"),
    [({}, "a film\ndull\n"), ({"input": "-", "input_format": "jsonl"}, '{"text": "a film"}\n{"text": "dull"}')],
)
def test_standard_input_is_read(monkeypatch, settings, lines):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert [example.texts for example in examples(**settings)] == [("a film",), ("dull",)]


def test_rows_are_read_lazily(monkeypatch):
    """Otherwise a file larger than memory, or an endless pipe, could not be read."""
    taken = 0

    class Endless(io.RawIOBase):
        def read1(self, _size: int) -> bytes:
            nonlocal taken
            taken += 1
            return b"a film of some more letters than one\n"

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Endless(), isatty=lambda: False))
    stream = read_examples(InputConfig(), GUESSES)
    assert [next(stream).texts for _ in range(3)] == [("a film of some more letters than one",)] * 3
    assert taken <= 4


@pytest.mark.parametrize(
    ("header", "settings", "wanted"),
    [
        (("text", "label"), {}, ("text",)),
        (("sentence2", "text", "sentence1"), {}, ("sentence1", "sentence2")),
        (("title", "body"), {"text_columns": ("body",)}, ("body",)),
        (("title", "body"), {"text_columns": ("body", "title")}, ("body", "title")),
        (("title", "key"), {"id_column": "key"}, ("title",)),
        (("anything",), {}, ("anything",)),
    ],
)
def test_text_columns_are_named_else_usual_else_the_only_one(tmp_path, header, settings, wanted):
    path = tmp_path / "t.csv"
    path.write_text(",".join(header) + "\n" + ",".join(header) + "\n")
    assert examples(input=str(path), **settings)[0].texts == wanted


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("t.csv", b"title,body\na,b\n", {}, "which column holds the text.*title, body.*--text_columns"),
        ("t.csv", b"text\na\n", {"text_columns": ("body",)}, "--text_columns body: .* no such column; it has: text"),
        ("t.csv", b"text\na\n", {"id_column": "key"}, "--id_column key: .* no such column"),
        ("t.csv", b"text,label\na,b\na,b,c\n", {}, "t.csv: line 3 has 3 values, the header has 2: text, label"),
        ("t.csv", b"text;label\na;b\n", {}, "has one column, 'text;label'; separate its columns by commas"),
        ("t.csv", b"text\n", {}, "t.csv holds no text"),
        ("t.csv", b"", {}, "t.csv holds no text"),
        ("t.txt", b"a\nb\xff\n", {}, "t.txt: line 2 is not UTF-8.*--encoding"),
        ("t.txt", "text".encode("utf-16-le"), {}, "line 1 holds a NUL.*--encoding utf-16-le"),
        ("t.jsonl", b'{"text": "a"}\n{"text": [3]}\n', {}, r"line 2 has \[3\], not text, in column text"),
        ("t.jsonl", b'{"text": "a"}\n{"t": "b"}\n', {}, "t.jsonl: line 2 has no value in column text"),
        ("t.jsonl", b'{"text": "\\ud800"}\n', {}, "line 1 holds .*not valid Unicode"),
        ("t.jsonl", b'{"text": "a"}\n{"text"\n', {}, "line 2 is not JSON"),
        ("t.jsonl", b'["a"]\n', {}, "line 1 is not a JSON object"),
        ("t.jsonl", b'{"text": "a", "k": 1}\n{"text": "b"}\n', {"id_column": "k"}, "line 2 has no value in column k"),
        ("t.parquet", b"PAR1 not really", {}, "is not parquet"),
    ],
)
def test_unreadable_row_is_reported_with_its_line(tmp_path, name, content, settings, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"(?s){message}"):
        examples(input=str(path), **settings)


def test_missing_file_and_terminal_without_text_are_user_errors(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--input .*t\.csv: no such file"):
        examples(input=str(tmp_path / "t.csv"))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(UserError, match="there is no text; give it as an argument"):
        examples()


def test_csv_texts_may_be_longer_than_the_limit_of_the_csv_module(tmp_path):
    path = write(tmp_path / "t.csv", ["word " * 50_000])
    assert len(examples(input=str(path))[0].texts[0]) == 250_000


def test_rows_are_counted_except_of_standard_input(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("a\nb\nc\n")
    assert count_rows(InputConfig(input=str(path))) == 3
    assert count_rows(InputConfig(texts=("a", "b"))) == 2
    assert count_rows(InputConfig(input="-")) is None
