"""Stored data: folders and snapshots are read as files are, and what is kept of them answers for their content."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict

from lib.config.sections import DataConfig
from lib.data.files import tables
from lib.data.sources import data_identity, load_raw
from lib.errors import UserError
from lib.hub.cache.layout import Repo
from lib.hub.endpoint import datasets_cache
from lib.hub.needs import Need, missing_from_cache
from lib.runtime.atomic import umask
from tests.hub_layouts import cache_of_another_machine

ROWS = "text,label\nNone,0111\nNA,null\n1.10,1E1\n"
TEXTS, LABELS = ["None", "NA", "1.10"], ["0111", "null", "1E1"]


def rewrite(path: Path, content: str) -> None:
    """Other content of the same length, at the same time, as rsync and archives restore it."""
    before = path.stat()
    assert before.st_size == len(content.encode())
    path.write_text(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def folder_of(place: Path, **files: str) -> Path:
    for name, content in files.items():
        path = place / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return place


@pytest.mark.parametrize("name", ["data", "a*b?[c]", "a::b", "hf:", " a b ", "#a"])
def test_folder_is_read_as_its_files_are(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path / name, train__csv=ROWS, test__csv=ROWS)
    splits = load_raw(DataConfig(dataset=str(folder)))
    assert [*splits] == ["train", "test"]
    assert (splits["train"]["text"][:], splits["test"]["label"][:]) == (TEXTS, LABELS)


@pytest.mark.parametrize(
    "place", ["../secret.csv", "ABSOLUTE", "https://example.invalid/a.csv", "hf://datasets/a/b.csv"]
)
@pytest.mark.parametrize(
    "form", ["data_files: PLACE", "data_files:\n  - split: train\n    path: PLACE", "data_dir: PLACE"]
)
def test_readme_of_a_folder_cannot_name_data_outside_it(tmp_path: Path, place: str, form: str) -> None:
    (tmp_path / "secret.csv").write_text(ROWS)
    stated = form.replace("PLACE", place.replace("ABSOLUTE", str(tmp_path / "secret.csv")))
    folder = folder_of(tmp_path / "data", train__csv=ROWS)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {stated}\n---\n")
    with pytest.raises(UserError, match="README"):
        load_raw(DataConfig(dataset=str(folder)))
    assert data_identity(DataConfig(dataset=str(folder))) is None


def test_file_named_eval_in_a_folder_is_not_the_test_split(tmp_path: Path) -> None:
    other = ROWS.replace("text,label", "text,label\nonly here,x")
    folder = folder_of(tmp_path, train__csv=ROWS, eval__csv=other, test__csv=ROWS)
    splits = load_raw(DataConfig(dataset=str(folder)))
    assert sorted(splits) == ["eval", "test", "train"]
    assert splits["test"]["text"][:] == TEXTS
    assert splits["eval"]["text"][0] == "only here"


def test_file_of_a_folder_that_belongs_to_no_split_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_raw(DataConfig(dataset=str(folder_of(tmp_path, train__csv=ROWS, extra__csv=ROWS))))
    assert "extra.csv" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train.csv", "text,label\na,x\nb\n", ["train.csv", "line 3"]),
        ("train.csv", "text;label\na;x\n", ["train.csv", "by commas"]),
        ("train.jsonl", '{"text": "a"}\n{"text"\n', ["train.jsonl", "line 2"]),
        ("train.tsv", "text,label\na,x\n", ["train.tsv", "by tabs"]),
    ],
)
def test_fault_in_a_folder_names_file_and_line(tmp_path: Path, name: str, content: str, words: list[str]) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="--dataset") as error:
        load_raw(DataConfig(dataset=str(tmp_path)))
    assert [word for word in words if word not in str(error.value)] == []


def test_split_of_several_files_is_one_table(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path, train_1__jsonl='{"text": "a", "label": 1}', train_2__jsonl='{"text": "b", "label": "x"}'
    )
    table = load_raw(DataConfig(dataset=str(folder)))["train"]
    assert (table["text"][:], table["label"][:]) == (["a", "b"], ["1", "x"])
    folder_of(tmp_path / "csv", train_1__csv="text,label\na,x\n", train_2__csv="words,label\nb,y\n")
    with pytest.raises(UserError, match=r"train_2.csv has the columns words, label"):
        load_raw(DataConfig(dataset=str(tmp_path / "csv")))


def test_readme_of_a_folder_names_files_separator_and_classes(tmp_path: Path) -> None:
    head = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "x.csv"}], "sep": ";"}],
        "dataset_info": {
            "features": [
                {"name": "text", "dtype": "string"},
                {"name": "label", "dtype": {"class_label": {"names": {"0": "no", "1": "yes"}}}},
            ]
        },
    }
    folder_of(
        tmp_path,
        x__csv="text;label\nNA, a;1\nb;no\n",
        y__csv="a,b\n1,2\n",
        README__md=f"---\n{json.dumps(head)}\n---\n",
    )
    table = load_raw(DataConfig(dataset=str(tmp_path)))["train"]
    assert table.features["label"] == ClassLabel(names=["no", "yes"])
    assert (table["text"][:], table["label"][:]) == (["NA, a", "b"], [1, 0])


def test_options_that_only_datasets_knows_are_left_to_it(tmp_path: Path) -> None:
    head = {"configs": [{"config_name": "default", "data_files": "x.csv", "skiprows": 1}]}
    folder_of(tmp_path, x__csv="a remark\ntext,label\nNone,x\n", README__md=f"---\n{json.dumps(head)}\n---\n")
    assert load_raw(DataConfig(dataset=str(tmp_path)))["train"]["text"][:] == ["None"]
    rewrite(tmp_path / "x.csv", "a remark\ntext,label\nNine,x\n")
    assert load_raw(DataConfig(dataset=str(tmp_path)))["train"]["text"][:] == ["Nine"]


def test_encoding_is_that_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes("text,label\n好,正\n".encode("gb18030"))
    assert load_raw(DataConfig(dataset=str(tmp_path), encoding="gb18030"))["train"]["text"][:] == ["好"]
    assert load_raw(DataConfig(train_file=str(tmp_path / "train.csv"), encoding="gb18030"))["train"]["label"][:] == [
        "正"
    ]


# ------------------------------------------------------------------------------------------------ caches


@pytest.mark.parametrize("kind", ["csv", "jsonl", "folder", "saved"])
def test_other_content_of_the_same_size_and_date_is_read_anew(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "data.csv"
    contents = ["text,label\ngood,x\nb,y\n", "text,label\nevil,x\nb,y\n"]
    if kind == "jsonl":
        path, contents = (
            tmp_path / "data.jsonl",
            ['{"text": "good"}\n{"text": "b"}\n', '{"text": "evil"}\n{"text": "b"}\n'],
        )
    config = DataConfig(train_file=str(path)) if kind != "folder" else DataConfig(dataset=str(tmp_path))
    path.write_text(contents[0])
    if kind == "saved":
        config = DataConfig(dataset=str(tmp_path / "saved"))
        DatasetDict({"train": Dataset.from_dict({"text": ["good"]})}).save_to_disk(tmp_path / "saved")
    assert load_raw(config)["train"]["text"][0] == "good"
    before = data_identity(config)
    assert before == data_identity(config) is not None
    if kind == "saved":
        shutil.rmtree(tmp_path / "saved")
        DatasetDict({"train": Dataset.from_dict({"text": ["evil"]})}).save_to_disk(tmp_path / "saved")
    else:
        rewrite(path, contents[1])
    assert load_raw(config)["train"]["text"][0] == "evil"
    assert data_identity(config) != before


def test_identity_is_that_of_content_and_of_what_changes_its_reading(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv", "c.tsv"):
        (tmp_path / name).write_text("text,label\na,x\n")
    a, b, c = (str(tmp_path / name) for name in ("a.csv", "b.csv", "c.tsv"))
    same = data_identity(DataConfig(train_file=a))
    assert same == data_identity(DataConfig(train_file=b))
    others = [
        DataConfig(train_file=c),
        DataConfig(test_file=a),
        DataConfig(train_file=a, test_file=b),
        DataConfig(train_file=a, encoding="utf-16-le"),
        DataConfig(),
        DataConfig(dataset_config="binary"),
    ]
    hashes = [data_identity(config) for config in others]
    assert len({same, *hashes}) == 7
    assert None not in hashes
    assert data_identity(DataConfig(train_file=str(tmp_path / "none.csv"))) is None
    assert data_identity(DataConfig(dataset="user/unknown")) is None


def test_tables_are_kept_within_a_limit_and_the_longest_unused_go_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    configs = []
    for number in range(4):
        path = tmp_path / f"{number}.csv"
        path.write_text(f"text,label\n{'word ' * 1000}{number},x\n")
        configs.append(DataConfig(train_file=str(path)))
    for config in (configs[0], configs[1], configs[0], configs[2], configs[0], configs[3]):
        (file,) = load_raw(config)["train"].cache_files
        monkeypatch.setattr(tables, "KEPT_BYTES", int(2.5 * Path(file["filename"]).stat().st_size))
        time.sleep(0.02)
    kept = list((datasets_cache() / "files").iterdir())
    assert {folder.stat().st_mode & 0o777 for folder in kept} == {0o777 & ~umask()}  # others may share the cache
    assert 1 < len(kept) < 4
    texts = [Dataset.from_file(str(next(folder.glob("*.arrow"))))["text"][0][-1] for folder in kept]
    assert "0" in texts
    assert "1" not in texts


def test_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "file"))
    (tmp_path / "t.csv").write_text(ROWS)
    assert load_raw(DataConfig(train_file=str(tmp_path / "t.csv")))["train"]["text"][:] == TEXTS


def test_rows_are_not_held_in_memory(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\n" + "a film of the year,x\n" * 1_000)
    table = load_raw(DataConfig(train_file=str(tmp_path / "t.csv")))["train"]
    assert isinstance(table.data, datasets.table.MemoryMappedTable)
    assert table.cache_files == [] or Path(table.cache_files[0]["filename"]).is_file()


def test_classes_that_differ_between_files_of_a_split_are_refused(tmp_path: Path) -> None:
    for number, names in enumerate((["no", "yes"], ["yes", "no"])):
        table: Any = Dataset.from_dict({"text": ["a"], "label": [1]}).cast_column("label", ClassLabel(names=names))
        table.to_parquet(tmp_path / f"train_{number}.parquet")
    with pytest.raises(UserError, match="classes of label"):
        load_raw(DataConfig(dataset=str(tmp_path)))
    pq.write_table(pa.table({"text": ["a"], "label": ["x"]}), tmp_path / "plain.parquet")
    assert load_raw(DataConfig(train_file=str(tmp_path / "plain.parquet")))["train"]["label"][:] == ["x"]


# ------------------------------------------------------------------------------------------------ strangers' folders

OUTSIDE = ["../secret.csv", "https://example.invalid/a.csv", "zip://a.csv::https://example.invalid/a.zip"]


@pytest.mark.parametrize("place", OUTSIDE)
def test_yaml_file_of_a_folder_cannot_name_data_outside_it(tmp_path: Path, place: str, sockets: list) -> None:
    (tmp_path / "secret.csv").write_text(ROWS)
    folder = folder_of(tmp_path / "data", train__csv=ROWS)
    (folder / ".huggingface.yaml").write_text(f"configs:\n- config_name: default\n  data_files: {place}\n")
    with pytest.raises(UserError, match=r"huggingface\.yaml"):
        load_raw(DataConfig(dataset=str(folder)))
    assert data_identity(DataConfig(dataset=str(folder))) is None
    assert sockets == []


@pytest.mark.parametrize("place", OUTSIDE)
@pytest.mark.parametrize("several", [False, True])
def test_readme_of_a_hub_data_set_cannot_name_data_outside_it(
    tmp_path: Path, place: str, several: bool, sockets: list, empty_cache: None
) -> None:
    (tmp_path / "secret.csv").write_text(ROWS)
    given = folder_of(tmp_path / "given", train__csv=ROWS)
    listed = [{"config_name": "default", "data_files": [{"split": "train", "path": ["train.csv", place]}]}]
    listed += [{"config_name": "other", "data_files": "train.csv"}] if several else []
    (given / "README.md").write_text(f"---\n{json.dumps({'configs': listed})}\n---\n")
    cache_of_another_machine(given, Repo("user/data", "dataset").folder)
    with pytest.raises(UserError, match=r"README\.md names"):
        load_raw(DataConfig(dataset="user/data"))
    assert data_identity(DataConfig(dataset="user/data")) is None
    assert sockets == []


@pytest.mark.parametrize("linked", ["file", "folder", "packed"])
def test_link_that_leaves_a_folder_is_refused(tmp_path: Path, linked: str) -> None:
    secret = folder_of(tmp_path / "elsewhere", train__csv=ROWS)
    folder = folder_of(tmp_path / "data", test__csv=ROWS)
    if linked == "folder":
        (folder / "train").symlink_to(secret)
        (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: train/train.csv\n---\n")
    else:
        suffix = ".csv.gz" if linked == "packed" else ".csv"
        (folder / f"train{suffix}").symlink_to(secret / "train.csv")
    with pytest.raises(UserError, match="link that leaves the folder"):
        load_raw(DataConfig(dataset=str(folder)))
    assert data_identity(DataConfig(dataset=str(folder))) is None


def test_links_inside_a_folder_and_to_the_blobs_of_a_snapshot_are_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", rows__csv=ROWS)
    (folder / "train.csv").symlink_to("rows.csv")
    (tmp_path / "link").symlink_to(folder)
    assert load_raw(DataConfig(dataset=str(tmp_path / "link")))["train"]["text"][:] == TEXTS
    given = folder_of(tmp_path / "given", train__csv=ROWS)
    entry = cache_of_another_machine(given, tmp_path / "hub" / "datasets--user--data")
    (snapshot,) = (entry / "snapshots").iterdir()
    assert load_raw(DataConfig(dataset=str(snapshot)))["train"]["text"][:] == TEXTS


@pytest.mark.parametrize("form", ["named", "linked", "split"])
def test_saved_folder_cannot_name_files_outside_it(tmp_path: Path, form: str) -> None:
    for name in ("secret", "saved"):
        DatasetDict({"train": Dataset.from_dict({"text": [name]})}).save_to_disk(tmp_path / name)
    (table,) = (tmp_path / "secret" / "train").glob("*.arrow")
    state = tmp_path / "saved" / "train" / "state.json"
    if form == "named":
        stated = json.loads(state.read_text())
        stated["_data_files"] = [{"filename": f"../../secret/train/{table.name}"}]
        state.write_text(json.dumps(stated))
    elif form == "split":
        (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["../secret/train"]}')
    else:
        (own,) = (tmp_path / "saved" / "train").glob("*.arrow")
        own.unlink()
        own.symlink_to(table)
    with pytest.raises(UserError, match=r"not in the folder|leaves the folder"):
        load_raw(DataConfig(dataset=str(tmp_path / "saved")))


def test_features_of_a_readme_open_no_file_or_address(tmp_path: Path, sockets: list) -> None:
    head = {"dataset_info": {"features": [{"name": "text", "dtype": "string"}, {"name": "label", "dtype": "string"}]}}
    head["dataset_info"]["features"].append({"name": "picture", "dtype": "image"})
    rows = [{"text": f"a {n}", "label": "xy"[n % 2], "picture": "http://example.invalid/a.png"} for n in range(4)]
    folder = folder_of(tmp_path / "data", train__jsonl="".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text(f"---\n{json.dumps(head)}\n---\n")
    table = load_raw(DataConfig(dataset=str(folder)))["train"]
    assert table.select_columns(["text", "label"])[:]["label"] == ["x", "y", "x", "y"]
    assert sockets == []


@pytest.mark.parametrize("name", ["http://example.invalid/a.csv", "zip://a.csv::http://example.invalid/a.zip"])
def test_file_at_an_address_is_not_asked_for(name: str, sockets: list) -> None:
    with pytest.raises(UserError, match="--train_file"):
        load_raw(DataConfig(train_file=name))
    assert sockets == []


def test_pinned_revision_is_not_answered_by_the_tables_of_another(tmp_path: Path, empty_cache: None) -> None:
    (datasets_cache() / "user___data" / "default").mkdir(parents=True)
    need = Need("--dataset", Repo("user/data", "dataset"), "4" * 40)
    assert missing_from_cache(need) == ["all of it"]
    with pytest.raises(UserError, match="4444"):
        load_raw(DataConfig(dataset="user/data", revision="4" * 40))


# ------------------------------------------------------------------------------------------------ damage and full disks


@pytest.mark.parametrize("damage", ["altered", "cut"])
def test_damaged_tables_are_said_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "t.csv").write_text(ROWS)
    config = DataConfig(train_file=str(tmp_path / "t.csv"))
    load_raw(config)
    (table,) = (tmp_path / "cache" / "files").glob("*/0.arrow")
    content = table.read_bytes()
    assert b"1E1" in content
    table.write_bytes(content.replace(b"1E1", b"9E9") if damage == "altered" else content[:-200])
    assert load_raw(config)["train"]["label"][:] == LABELS
    assert str(table.parent) in caplog.text
    caplog.clear()
    assert load_raw(config)["train"]["label"][:] == LABELS
    assert caplog.text == ""


@pytest.mark.parametrize("reader", ["ours", "datasets"])
def test_folder_is_read_though_the_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reader: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file"))
    folder = folder_of(tmp_path / "data", train__csv="a remark\n" + ROWS if reader == "datasets" else ROWS)
    if reader == "datasets":
        head = {"configs": [{"config_name": "default", "data_files": "train.csv", "skiprows": 1}]}
        (folder / "README.md").write_text(f"---\n{json.dumps(head)}\n---\n")
    config = DataConfig(dataset=str(folder))
    assert load_raw(config)["train"]["text"][:2] == TEXTS[:2]
    assert data_identity(config) is not None
    assert ("HF_DATASETS_CACHE" in caplog.text) is (reader == "datasets")
