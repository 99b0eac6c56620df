"""Own files: what was written is what is read, in training and in prediction, or the file is refused with its line."""

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset

from lib.config.predict import InputConfig
from lib.config.sections import DataConfig
from lib.data.sources import load_raw
from lib.errors import UserError
from lib.inference.inputs import read_examples

PIECES = (
    *("good", "film", "电影", "naïve", "🎬👍🏽", "\u2028", "\x85", "\x1c", "\u0301", "\xa0", "\ufeff", "ｱ", "مرحبا"),
    *(" ", " ", ",", ";", "|", '"', '""', "'", "\\", '\\"', "#", "{", "]", "\n", "\r\n", "\r", "\n\n", "\t", "0", "00"),
)
WORDS = (
    "",
    "",
    " ",
    "None",
    "NA",
    "null",
    "NaN",
    "true",
    "0111",
    "1E1",
    "1.10",
    "1_000",
    "+1",
    "-0",
    "inf",
    '"',
    '"a" b',
)
LABELS = ("0110", "2E3", "1.20", "True", "N/A", "好")
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zip": lambda content: zipped(("inner", content)),
}


def zipped(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def trained(path: Path | str, **options: Any) -> Dataset:
    return load_raw(DataConfig(train_file=str(path), **options))["train"]


def predicted(path: Path | str, **options: Any) -> list[str]:
    return [example.texts[0] for example in read_examples(InputConfig(input=str(path), **options), [("text",)])]


def refusals(path: Path) -> list[str]:
    """The messages of training and of prediction, without the name of the file."""
    messages = []
    for read, flag in ((trained, "--train_file"), (predicted, "--input")):
        with pytest.raises(UserError) as error:
            read(path)
        messages.append(str(error.value).removeprefix(f"{flag} {path}"))
    return messages


# ------------------------------------------------------------------------------------------------ what is written is read


def random_text(rng: random.Random) -> str:
    if rng.random() < 0.2:
        return rng.choice(WORDS)
    if rng.random() < 0.01:
        return rng.choice(PIECES) * 50_000
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 12)))


def write_table(kind: str, columns: dict[str, list[str]], rng: random.Random) -> bytes:
    if kind in ("csv", "tsv"):
        file = io.StringIO(newline="")
        writer: Any = csv.writer(file, delimiter="," if kind == "csv" else "\t")
        if rng.random() < 0.5:
            quoting = csv.QUOTE_ALL
            writer = csv.writer(file, delimiter="," if kind == "csv" else "\t", quoting=quoting, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        return file.getvalue().encode("utf-8")
    if kind == "parquet":
        parquet = io.BytesIO()
        pq.write_table(pa.table(columns), parquet)
        return parquet.getvalue()
    frame, plain = pandas.DataFrame(columns), {"ensure_ascii": rng.random() < 0.5}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    form = rng.choice(["list", "indented", "data", "columns", "split", "index"]) if kind == "json" else "lines"
    texts = {
        "list": lambda: json.dumps(rows, **plain),
        "indented": lambda: json.dumps(rows, indent=1, **plain),
        "data": lambda: json.dumps({"version": 1, "data": rows}, **plain),
        "columns": lambda: json.dumps(columns, **plain),
        "split": lambda: frame.to_json(orient="split"),
        "index": lambda: frame.to_json(orient="index"),
        "lines": lambda: "\n".join(json.dumps(row, **plain) for row in rows) + "\n" * rng.randint(0, 2),
    }
    return texts[form]().encode()


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize("seed", range(4))
def test_random_tables_come_back_letter_by_letter(tmp_path: Path, kind: str, seed: int) -> None:
    rng = random.Random(f"{kind} {seed}")
    for number in range(10):
        texts = [random_text(rng) for _ in range(rng.randint(2, 30))]
        if kind == "tsv":  # a text of several lines with tabs can be several rows
            texts = [text.replace("\t", " ") if "\n" in text or "\r" in text else text for text in texts]
        columns = {
            "text": texts,
            "label": [rng.choice(LABELS) for _ in texts],
            "other": [random_word(rng) for _ in texts],
        }
        names = rng.sample(sorted(columns), 3)
        content = write_table(kind, {name: columns[name] for name in names}, rng)
        encoding = rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "gb18030"])
        options: dict[str, Any] = {}
        if kind != "parquet":
            content = content.decode("utf-8").encode(encoding)
            options = {"encoding": "gb18030"} if encoding == "gb18030" else {}
        packing = rng.choice(list(PACKERS))
        path = tmp_path / f"{number}.{kind}{packing}"
        path.write_bytes(PACKERS[packing](content))
        table = trained(path, **options)
        empty = None if kind in ("csv", "tsv") else ""
        for name, cells in columns.items():
            assert table[name][:] == [cell or empty for cell in cells], (path, name)
        assert predicted(path, **options) == texts, path


def random_word(rng: random.Random) -> str:
    return rng.choice(WORDS).strip('"')


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_is_read_or_refused_and_nothing_else(tmp_path: Path, seed: int) -> None:
    """No error but UserError, and no death of the process, whatever bytes are changed."""
    rng, refused = random.Random(seed), 0
    for number in range(60):
        kind = rng.choice(["csv", "tsv", "json", "jsonl", "parquet"])
        texts = ["".join(rng.choice(PIECES) for _ in range(4)) for _ in range(5)]
        content = bytearray(write_table(kind, {"text": texts, "label": list("ababa")}, rng))
        packing = rng.choice(list(PACKERS))
        packed = bytearray(PACKERS[packing](bytes(content)))
        for _ in range(rng.randint(1, 5)):
            place = rng.randrange(len(packed))
            packed[place : place + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        path = tmp_path / f"{number}.{kind}{packing}"
        path.write_bytes(packed)
        for read in (trained, predicted):
            with contextlib.suppress(UserError):
                read(path)
                refused -= 1
            refused += 1
    assert refused > 20


# ------------------------------------------------------------------------------------------------ delimited text


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ("text,label\na, b,x\nc,y\n", 2, ["3 values", "the header has 2"]),
        ("text,label\na,x,\nb,y,\n", 2, ["3 values"]),
        ("text,label\na,x\nb,y\nc\n", 4, ["1 value", "text, label"]),
        ("text,label\na,x,\nb,y\n", 2, ["3 values"]),
        ('text,label\na,x\n"b,y\nc,x\nd,y\n', 3, ["never ends"]),
        ('text,label\na,x\n"b,y\nc,x\n"d,y\n', 3, ["line 5", "quote"]),
        ('text,label\na,x\nb,y\n"c,x\nd,y\na film of 5",y\n', 4, ["3 lines", "quote"]),
        ('label,text\nx,a\ny,b\nx,"c\ny,d\nx,5"\n', 4, ["3 lines", "quote"]),
        ('text,label\n"He said \\"fine\\" twice",x\n', 2, ['""']),
        ("text,label,text\na,x,b\n", 1, ["two columns", "'text'"]),
        (",\na,x\n", 1, ["header", "names no column"]),
        ("text,label\na,x\nb\0,y\n", 3, ["NUL"]),
        (b"text,label\na,x\ncaf\xe9,y\n", 3, ["not UTF-8", "--encoding"]),
    ],
)
def test_csv_that_is_not_a_table_is_refused_with_its_line(
    tmp_path: Path, content: str | bytes, line: int, words: list[str]
) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for message in refusals(path):
        assert f": line {line}" in message
        assert [word for word in words if word not in message] == []


def test_far_line_is_named_where_bytes_are_of_another_encoding(tmp_path: Path) -> None:
    for encoding, given in (("latin-1", None), ("cp1252", "ascii")):
        path = tmp_path / f"{encoding}.csv"
        rows = "".join(f"a film of the year {number},x\n" for number in range(40_000))
        path.write_bytes(f"text,label\n{rows}café,y\n{rows}".encode(encoding))
        with pytest.raises(UserError, match=f"line 40002 is not {given or 'UTF-8'}"):
            trained(path, encoding=given)


def test_text_of_several_lines_with_commas_is_a_text(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('text,label\na,x\n"A film,\nand one, too\nreally, good",x\nb,y\n')
    assert trained(path)["text"][1] == "A film,\nand one, too\nreally, good"


def test_quote_in_tsv_is_a_character_unless_the_field_is_quoted(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    rows = [
        '"great" film\tx',
        '"wholly ""quoted"""\ty',
        '"a\tb"\tx',
        '"two\nlines"\ty',
        '5" tv\tx',
        '"open\ty',
        'to 5"\tx',
    ]
    path.write_text("text\tlabel\n" + "\n".join([*rows, '"open again\ty']) + "\n")
    texts = ['"great" film', 'wholly "quoted"', "a\tb", "two\nlines", '5" tv', '"open', 'to 5"', '"open again']
    assert trained(path)["text"][:] == predicted(path) == texts


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (" text , label\na,x\n", ["text", "label"]),
        (",text,label\n0,a,x\n", ["Unnamed: 0", "text", "label"]),
        ("text,label,\na,x,\n", ["text", "label", "Unnamed: 2"]),
        ("sep=;\ntext;label\na;x\n", ["text", "label"]),
        ("text,label\ra,x\r", ["text", "label"]),
        ("\n\ntext,label\n\na,x\n\n", ["text", "label"]),
    ],
)
def test_headers_and_lines_as_programs_write_them(tmp_path: Path, content: str, names: list[str]) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content.encode())
    table = trained(path)
    assert table.column_names == names
    assert (table["text"][:], table["label"][:], predicted(path)) == (["a"], ["x"], ["a"])


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("t.csv", "text;label\na, b;x\n", "commas"),
        ("t.csv", "text\tlabel\na\tx\n", "commas"),
        ("t.tsv", "text,label\na,x\n", "tabs"),
    ],
)
def test_other_separators_are_refused_with_the_one_wanted(tmp_path: Path, name: str, content: str, wanted: str) -> None:
    (tmp_path / name).write_text(content)
    for message in refusals(tmp_path / name):
        assert wanted in message


# ------------------------------------------------------------------------------------------------ one type for a column


def test_column_has_one_type_over_all_files(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 1.10}\n{"text": 10, "label": 2}\n')
    (tmp_path / "dev.jsonl").write_text('{"text": "a", "label": "1.10"}\n')
    (tmp_path / "test.csv").write_text("text,label\n20,2\n")
    numbers = load_raw(DataConfig(train_file=str(tmp_path / "train.jsonl")))["train"]
    assert (numbers["label"][:], numbers["text"][:]) == ([1.1, 2.0], ["a", "10"])
    files = {
        f"{role}_file": str(tmp_path / name) for role, name in (("train", "train.jsonl"), ("validation", "dev.jsonl"))
    }
    splits = load_raw(DataConfig(**files, test_file=str(tmp_path / "test.csv")))
    assert [splits[role]["label"][:] for role in splits] == [["1.10", "2"], ["1.10"], ["2"]]
    pq.write_table(pa.table({"text": ["a", "b"], "label": [1, 0]}), tmp_path / "train.parquet")
    splits = load_raw(DataConfig(train_file=str(tmp_path / "train.parquet"), test_file=str(tmp_path / "test.csv")))
    assert (splits["train"]["label"][:], splits["test"]["label"][:]) == (["1", "0"], ["2"])


def test_type_is_not_that_of_the_first_rows(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1}] * 60_000 + [{"text": "b", "label": "other", "late": {"deep": [1, {}]}, "n": 2}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = trained(tmp_path / "t.jsonl")
    assert (table["label"][0], table["label"][-1], table["n"][-2:]) == ("1", "other", [None, 2])
    assert "late" not in table.column_names


@pytest.mark.parametrize(
    ("cells", "wanted"),
    [
        ([1, 2, None], [1, 2, None]),
        ([1, 2.5], [1.0, 2.5]),
        ([True, False], [True, False]),
        ([True, 1, "x"], ["true", "1", "x"]),
        ([["x", "y"], [], None, "z"], [["x", "y"], [], None, ["z"]]),
        ([[1, 0], [0, 1]], [[1, 0], [0, 1]]),
        ([10**30, 1], [str(10**30), "1"]),
        ([float("nan"), 1], [None, 1]),
        ([None, None], [None, None]),
    ],
)
def test_json_keeps_types_that_all_rows_have(tmp_path: Path, cells: list, wanted: list) -> None:
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": "a", "label": cell}) for cell in cells))
    table = trained(tmp_path / "t.jsonl")
    assert table["label"][:] == wanted
    assert [type(cell) for cell in table["label"]] == [type(cell) for cell in wanted]


def test_parquet_keeps_its_types_and_its_classes(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}).cast_column(
        "label", ClassLabel(names=["no", "yes"])
    ).to_parquet(tmp_path / "named.parquet")
    assert trained(tmp_path / "named.parquet").features["label"].names == ["no", "yes"]
    table = pa.table(
        {
            "text": pa.array(["a", "b"]).dictionary_encode(),
            "label": pa.array([1, 0], pa.uint8()),
            "objects": [{"a": 1}, {"a": 2}],
            "lists": [[[1]], [[2]]],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    read = trained(tmp_path / "t.parquet")
    assert {name: feature.dtype for name, feature in read.features.items()} == {"text": "string", "label": "uint8"}
    assert predicted(tmp_path / "t.parquet") == ["a", "b"]


# ------------------------------------------------------------------------------------------------ JSON


@pytest.mark.parametrize("orient", ["columns", "index", "split", "records", "table"])
@pytest.mark.parametrize("index", [None, ["p", "q", "r"]])
def test_json_of_pandas_is_read(tmp_path: Path, orient: Any, index: list[str] | None) -> None:
    frame = pandas.DataFrame({"text": ["a", "b", "c"], "label": [1, 0, 1]}, index=index)
    frame.to_json(tmp_path / "t.json", orient=orient)
    table = trained(tmp_path / "t.json")
    assert (table["text"][:], table["label"][:]) == (["a", "b", "c"], [1, 0, 1])
    assert predicted(tmp_path / "t.json") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("null", ["null", "list of objects"]),
        ("3", ["number", "list of objects"]),
        ('["a", "b"]', ["line 1", "object", "text"]),
        ('[["a", "x"]]', ["line 1", "object", "list"]),
        ('{"text": ["a", "b"], "label": ["x"]}', ["text 2", "label 1", "list of objects"]),
        ('{"train": [{"text": "a"}], "test": [{"text": "b"}]}', ["train, test"]),
        ('[\n{"text": "a"},\n{"text": "b" "label"}]', ["line 3"]),
        ('[{"text": "a"}\n', ["the list does not end"]),
        ('[{"text": "a"}] []', ["after the list"]),
        ('{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', ["line 2 is not JSON"]),
        ('{"text": "a"}\n{"text": "b", "text": "c"}\n', ["line 2", "'text' twice"]),
        ('{"text": "a"}\n{"text": "half \\ud83d"}\n', ["line 2", "Unicode", "text"]),
        ('{"text": "a"}\nnull\n', ["line 2", "null"]),
        ('{"text": "a", "n": ' + "[" * 100_000 + "]" * 100_000 + "}", ["line 1", "deep"]),
        ("[" * 300_000, ["line 1", "deep"]),
    ],
)
def test_json_that_is_no_table_is_refused_with_line_or_form(tmp_path: Path, content: str, words: list[str]) -> None:
    (tmp_path / "t.json").write_text(content)
    for message in refusals(tmp_path / "t.json"):
        assert [word for word in words if word not in message] == []


def test_what_is_wrong_in_a_column_that_is_not_read_does_not_matter(tmp_path: Path) -> None:
    rows = [
        '{"text": "a", "label": "x", "z": "half \\ud83d", "m": {"k": 1, "k": 2}}',
        '{"text": "b", "label": "y", "m": 3}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    assert trained(tmp_path / "t.jsonl")["text"][:] == predicted(tmp_path / "t.jsonl") == ["a", "b"]
    with pytest.raises(UserError, match=r"line 1 .*Unicode in z"):
        trained(tmp_path / "t.jsonl", text_columns=("z",), label_column="label")


def test_texts_that_are_numbers_are_predicted_as_written(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": 1.10}\n{"text": 7}\n{"text": true}\n')
    assert predicted(tmp_path / "t.jsonl") == ["1.10", "7", "true"]


# ------------------------------------------------------------------------------------------------ names and kinds of files


@pytest.mark.parametrize(
    "name", ["a*.csv", "a?.csv", "[a].csv", "a::b.csv", " a b .csv", "a#b.csv", "%41.csv", "~a.csv", "$HOME.csv"]
)
def test_names_are_literal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    for other in ("a1.csv", "a.csv", "A.csv"):
        Path(other).write_text("text,label\nwrong,x\n")
    Path(name).write_text("text,label\nright,x\n")
    assert trained(name)["text"][:] == predicted(name) == ["right"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf://datasets/user/name/t.csv", "no such file"),
        ("https://host/t.csv", "download"),
        ("none/t.csv", "no such file"),
        ("pipe.csv", "pipe"),
        ("excel.csv", "Excel"),
        ("pointer.csv", "git lfs pull"),
        ("parquet.csv", ".parquet"),
        ("two.csv.zip", "a.csv, b.csv"),
        ("cut.csv.gz", "damaged"),
        ("page.csv", "web page"),
        ("text.parquet", "not parquet"),
    ],
)
def test_what_is_no_file_of_data_is_refused_with_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.csv")
    Path("excel.csv").write_bytes(zipped(("[Content_Types].xml", b""), ("xl/workbook.xml", b"")))
    Path("pointer.csv").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n")
    pq.write_table(pa.table({"text": ["a"]}), "parquet.csv")
    Path("two.csv.zip").write_bytes(zipped(("a.csv", b"text\na\n"), ("b.csv", b"text\nb\n")))
    Path("cut.csv.gz").write_bytes(gzip.compress(b"text,label\na,x\n" * 9000)[:-20])
    Path("page.csv").write_text("<!DOCTYPE html><html></html>")
    Path("text.parquet").write_text("text,label\na,x\n")
    for message in refusals(Path(name)) if "://" not in name else [refusal(name)]:
        assert words in message


def refusal(name: str) -> str:
    with pytest.raises(UserError) as error:
        trained(name)
    assert name in str(error.value)
    return str(error.value)


def test_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.csv").write_text("text,label\na,x\n")
    monkeypatch.setattr(os, "access", lambda *_: False)  # to the superuser every file is open
    for message in refusals(tmp_path / "t.csv"):
        assert "permissions" in message


@pytest.mark.parametrize("build", [DataConfig, InputConfig])
def test_unknown_encoding_and_empty_name_are_refused_at_once(build: Any) -> None:
    for name in ("gb18031", "rot13", "base64", "idna", "unicode_escape", "undefined", "", "a\0b"):
        with pytest.raises(UserError, match="--encoding"):
            build(encoding=name)
    field = "train_file" if build is DataConfig else "input"
    with pytest.raises(UserError, match=f"--{field}.* empty"):
        build(**{field: ""})
    assert build(encoding="GB18030").encoding == "GB18030"


def test_parquet_with_views_of_text_is_read_as_text(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(["a", "b"], pa.string_view()), "label": pa.array(["x", "y"], pa.string_view())})
    pq.write_table(table, tmp_path / "train.parquet")
    read = load_raw(DataConfig(train_file=str(tmp_path / "train.parquet")))["train"]
    assert (read["text"][:], read["label"][:]) == (["a", "b"], ["x", "y"])
    assert len(read.select([1]).with_format("arrow")[:].take([0])) == 1


def test_same_bytes_under_another_ending_are_read_as_that_ending_says(tmp_path: Path) -> None:
    for name in ("train.csv", "train.tsv"):
        (tmp_path / name).write_text("text,label\na,x\nb,y\n")
    assert load_raw(DataConfig(train_file=str(tmp_path / "train.csv")))["train"].column_names == ["text", "label"]
    with pytest.raises(UserError, match="by tabs"):
        load_raw(DataConfig(train_file=str(tmp_path / "train.tsv")))
