"""Archives: a tar of the cache carries repositories to another machine, and no archive is trusted."""

import io
import json
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from lib.config.hub import ImportConfig
from lib.config.sections import DataConfig, ModelConfig
from lib.data.sources import load_raw
from lib.errors import UserError
from lib.hub.cache.layout import Repo, find_snapshot, snapshot_files
from lib.hub.cache.verify import verify_repo
from lib.hub.importing.archives import opened
from lib.hub.importing.folder import Imported, import_source
from lib.model.load import load_tokenizer
from tests.hub_layouts import COMMIT, cache_of_another_machine, share_blobs, tarred, zipped
from tests.loopback_hub import repository_files

MODEL, DATA = Repo("user/tiny"), Repo("SetFit/sst5", "dataset")


def take(source: Path, repo: Repo = MODEL, revision: str = "main", move_ref: bool = False) -> Imported:
    """Import without loading in a fresh process."""
    return import_source(
        ImportConfig(str(source), repo.repo_id, repo.repo_type, revision, move_ref=move_ref, load_check=False)  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("shared", [False, True])
def test_tar_of_a_cache_and_import_keep_commits_hashes_and_revisions(
    shared: bool, served: Path, empty_cache: None, tmp_path: Path, sockets: list
) -> None:
    here = tmp_path / "here"
    for repo in (MODEL, DATA):
        cache_of_another_machine(served / f"{repo.repo_type}s" / repo.repo_id, here / repo.folder_name)
    (here / MODEL.folder_name / "refs" / "v1").write_text(COMMIT)
    if shared:
        share_blobs(here)
    archive = tmp_path / "lab.tar"
    command = ["tar", "-chf", archive, "-C", here, MODEL.folder_name, DATA.folder_name]
    subprocess.run(command, check=True, timeout=60)

    for repo, revision in ((MODEL, "main"), (MODEL, "v1"), (DATA, "main")):
        done = take(archive, repo, revision)
        assert (done.commit, done.unproven) == (COMMIT, ())
    for repo in (MODEL, DATA):
        snapshot = find_snapshot(repo)
        assert snapshot is not None
        assert repository_files(snapshot) == repository_files(served / f"{repo.repo_type}s" / repo.repo_id)
        assert all(path.is_symlink() for path in snapshot_files(snapshot).values())
        assert list(verify_repo(repo)) == []
    assert find_snapshot(MODEL, "v1") == find_snapshot(MODEL)
    assert load_tokenizer(ModelConfig("user/tiny"))("film").input_ids
    assert {name: len(split) for name, split in load_raw(DataConfig("sst5")).items()}["train"] == 40
    assert sockets == []


def test_flipped_bit_in_a_tar_of_a_cache_is_refused(roberta: Path, empty_cache: None, tmp_path: Path) -> None:
    entry = cache_of_another_machine(roberta, tmp_path / "here" / MODEL.folder_name)
    blob = next(path for path in (entry / "blobs").iterdir() if len(path.name) == 64)
    blob.write_bytes(blob.read_bytes()[:-1] + bytes([blob.read_bytes()[-1] ^ 1]))
    subprocess.run(["tar", "-chf", tmp_path / "lab.tar", "-C", tmp_path / "here", entry.name], check=True, timeout=60)
    with pytest.raises(UserError, match=r"model\.safetensors is not the file that its source names"):
        take(tmp_path / "lab.tar")
    assert find_snapshot(MODEL) is None


def tar_of(path: Path, name: str, **fields: object) -> Path:
    with tarfile.open(path, "w") as tar:
        head = tarfile.TarInfo(name)
        for field, value in fields.items():
            setattr(head, field, value)
        tar.addfile(head, io.BytesIO(b""))
    return path


def zip_of(path: Path, name: str, data: bytes = b"x") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return path


def test_archives_that_leave_their_folder_or_fill_the_disk_are_refused(empty_cache: None, tmp_path: Path) -> None:
    wicked = [
        tar_of(tmp_path / "1.tar", "../evil"),
        tar_of(tmp_path / "2.tar", "/tmp/evil"),
        tar_of(tmp_path / "3.tar", "link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        tar_of(tmp_path / "4.tar", "pipe", type=tarfile.FIFOTYPE),
        tar_of(tmp_path / "5.tar", "hard", type=tarfile.LNKTYPE, linkname="../../evil"),
        zip_of(tmp_path / "6.zip", "../evil"),
        zip_of(tmp_path / "7.zip", "bomb", bytes(2**22)),
        zip_of(tmp_path / "8.zip", "C:\\evil"),
        zip_of(tmp_path / "9.zip", "..\\evil"),
    ]
    with tarfile.open(tmp_path / "10.tar.gz", "w:gz") as tar:
        head = tarfile.TarInfo("bomb")
        head.size = 2**22
        tar.addfile(head, io.BytesIO(bytes(2**22)))
    with zipfile.ZipFile(tmp_path / "11.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(50):  # each below the size from which a single one is refused
            archive.writestr(str(number), bytes(2**17))
    for path in [*wicked, tmp_path / "10.tar.gz", tmp_path / "11.zip"]:
        with pytest.raises(UserError, match=f"{path.name}.*(not to be trusted|link or device)"), opened(path):
            pass
    assert not list((tmp_path / "hub").rglob("staging-*"))
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    ("kind", "damage"),
    [("zip", "cut"), ("zip", "flipped"), ("zip", "password"), ("tar.gz", "cut"), ("tar.gz", "flipped")],
)
def test_broken_archive_is_refused(kind: str, damage: str, roberta: Path, empty_cache: None, tmp_path: Path) -> None:
    path = (zipped if kind == "zip" else tarred)(roberta, tmp_path / "given")
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 255
    else:  # the bit of encryption, in the directory and before the file
        for start, mark in ((8, b"PK\1\2"), (6, b"PK\3\4")):
            data[data.find(mark) + start] |= 1
    path.write_bytes(data)
    told = r"given\.(zip|tar\.gz) (cannot be extracted|is neither|needs a password)"
    with pytest.raises(UserError, match=told), opened(path):
        pass


def test_archive_larger_than_the_free_disk_is_refused(
    roberta: Path, empty_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))  # type: ignore[attr-defined]
    for path in (zipped(roberta, tmp_path / "given"), tarred(roberta, tmp_path / "given")):
        with pytest.raises(UserError, match="GB are free beside the cache"), opened(path):
            pass


def test_hard_links_in_a_tar_and_backslashes_in_a_zip_are_extracted(
    roberta: Path, empty_cache: None, tmp_path: Path
) -> None:
    """tar keeps the second of two hard links as a link; some programs of Windows write a backslash in a .zip."""
    entry = cache_of_another_machine(roberta, tmp_path / "theirs" / "models--user--tiny")
    for path in sorted((entry / "snapshots" / COMMIT).iterdir()):
        blob = path.resolve()
        path.unlink()
        path.hardlink_to(blob)
    (entry / "refs" / "main").write_text(f"{COMMIT}\n")
    with tarfile.open(tmp_path / "theirs.tar.gz", "w:gz") as tar:
        tar.add(entry, arcname=entry.name)
        assert any(member.islnk() for member in tar)
    with zipfile.ZipFile(tmp_path / "windows.zip", "w") as archive:
        for name, data in repository_files(roberta).items():
            head = zipfile.ZipInfo()
            head.filename = f"tiny\\{name}"
            archive.writestr(head, data)
    for name in ("theirs.tar.gz", "windows.zip"):
        done = take(tmp_path / name, move_ref=True)
        assert (done.files, done.commit == COMMIT) == (4, name == "theirs.tar.gz")
        snapshot = find_snapshot(MODEL)
        assert snapshot is not None
        assert repository_files(snapshot) == repository_files(roberta)


@pytest.mark.parametrize("name", ["2" * 40, COMMIT[:7], COMMIT.upper()])
def test_archive_cannot_give_the_name_of_a_commit_to_another_one(
    name: str, roberta: Path, empty_cache: None, tmp_path: Path
) -> None:
    entry = cache_of_another_machine(roberta, tmp_path / "here" / MODEL.folder_name)
    (entry / "snapshots" / COMMIT).rename(entry / "snapshots" / ("3" * 40))
    for ref in ("main", name):
        (entry / "refs" / ref).write_text("3" * 40)
    archive = tarred(tmp_path / "here", tmp_path / "lab.tar")
    with pytest.raises(UserError, match=name):
        take(archive, revision=name)
    assert not MODEL.folder.exists()
    assert take(archive).commit == "3" * 40
    assert not (MODEL.folder / "refs" / name).exists()


DAMAGED = {
    "cut off": ('{"a": ', "is not JSON"),
    "a list": ("[1]", "holds a list"),
    "null": ("null", "holds null"),
    "zeros": ("\0" * 99, "is not JSON"),
    "deep": ("[" * 200_000, "is nested too deeply"),
    "empty": ("", "is empty"),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
def test_damaged_settings_in_an_archive_are_named_and_leave_nothing(
    name: str, damage: str, roberta: Path, empty_cache: None, tmp_path: Path
) -> None:
    content, words = DAMAGED[damage]
    shutil.copytree(roberta, tmp_path / "given")
    (tmp_path / "given" / name).write_text(content)
    with pytest.raises(UserError, match=rf"(?s)nothing was changed.*{name} {words}"):
        take(zipped(tmp_path / "given", tmp_path / "given.zip"))
    assert not MODEL.folder.exists()


def test_index_of_weights_with_other_values_than_names_is_refused(
    roberta: Path, empty_cache: None, tmp_path: Path
) -> None:
    for number, value in enumerate(({"a": [1]}, {"a": 3}, ["a"])):
        shutil.copytree(roberta, tmp_path / f"{number}")
        (tmp_path / f"{number}" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
        with pytest.raises(UserError, match="weight_map"):
            take(zipped(tmp_path / f"{number}", tmp_path / f"{number}.zip"))


@pytest.mark.parametrize("content", ["[" * 200_000, "\0" * 50, '{"files": [3]}'])
def test_damaged_list_of_files_in_an_archive_is_done_without(
    content: str, roberta: Path, empty_cache: None, tmp_path: Path
) -> None:
    entry = cache_of_another_machine(roberta, tmp_path / "here" / MODEL.folder_name)
    (entry / "trees").mkdir(exist_ok=True)
    (entry / "trees" / f"{COMMIT}.json").write_text(content)
    assert take(tarred(tmp_path / "here", tmp_path / "lab.tar")).commit == COMMIT
