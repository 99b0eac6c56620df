"""Files and folders are written whole or not at all, what was changed in them is named, and what is not ours stays."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib.errors import UserError
from lib.runtime import atomic
from lib.runtime.atomic import (
    MANIFEST,
    MARK,
    NotOurs,
    copy_files,
    explain,
    explaining,
    file_names,
    find_damage,
    finite,
    is_ours,
    make_folder,
    publish_folder,
    remove_drafts,
    remove_folder,
    remove_unused,
    replacing,
    write_atomically,
    write_manifest,
)
from tests.conftest import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "step-1"
    (folder / "best").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "best" / "config.json").write_text("{}")
    write_manifest(folder, {"step": 1})
    return folder


def test_untouched_folder_has_no_damage(folder):
    assert find_damage(folder) is None


def test_every_flipped_bit_is_noticed(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for bit in range(0, len(content) * 8, 37):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        weights.write_bytes(changed)
        assert "model.safetensors was changed" in find_damage(folder)


def test_missing_and_short_files_are_named(folder):
    os.truncate(folder / "model.safetensors", 100)
    assert find_damage(folder) == "model.safetensors has 100 bytes instead of 256"
    (folder / "best" / "config.json").unlink()
    assert find_damage(folder) == "best/config.json is missing"
    for text, words in (("{", "cannot be read"), ("[]", "cannot be read"), ('{"files": {"a": 1}}', "is missing")):
        (folder / "manifest.json").write_text(text)
        assert words in find_damage(folder)
    (folder / "manifest.json").unlink()
    assert find_damage(folder) == "manifest.json is missing"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_publishing_replaces_the_folder_of_that_name(folder, tmp_path, monkeypatch, can_exchange):
    if not can_exchange:  # NFS
        monkeypatch.setattr(atomic, "exchange", lambda *_: False)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "new.txt").write_text("new")
    publish_folder(fresh, folder)
    assert [path.name for path in folder.iterdir()] == ["new.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_folder_of_somebody_else_is_neither_replaced_nor_removed(folder, tmp_path):
    foreign = tmp_path / "model"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("ten years")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "file").write_text("a file")
    manifest = tmp_path / "app"
    manifest.mkdir()
    (manifest / MANIFEST).write_text('{"name": "app", "files": ["index.html"]}')
    for target in (foreign, tmp_path / "link", tmp_path / "file", manifest):
        with pytest.raises(NotOurs, match=target.name):
            make_folder(target, lambda draft: (draft / "a").write_text("a"))
        assert not remove_folder(target)
    remove_unused(tmp_path, 0, keep=folder)
    assert (foreign / "thesis.txt").read_text() == "ten years"
    assert (manifest / MANIFEST).exists()
    assert find_damage(tmp_path / "link") is None
    assert (tmp_path / "file").read_text() == "a file"
    assert not list(tmp_path.glob(".tmp-*"))


def test_folder_stays_ours_when_its_manifest_is_damaged_and_until_its_last_file_is_removed(folder, monkeypatch):
    whole = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(whole[: len(whole) * 2 // 3])
    assert is_ours(folder)
    for number in range(20):  # in any order
        (folder / str(number)).write_text("a file")
    removed = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **given: (removed.append(is_ours(folder)), unlink(path, **given)))
    assert remove_folder(folder)
    assert removed
    assert all(removed)
    assert not folder.exists()


@pytest.mark.parametrize(("written", "others", "ours"), [(0, (), True), (9, (), True), (0, ("thesis.txt",), False)])
def test_draft_killed_while_it_was_marked_is_ours_and_a_foreign_folder_with_an_empty_manifest_is_not(
    tmp_path, written, others, ours
):
    (tmp_path / MANIFEST).write_text(MARK[:written])
    for name in others:
        (tmp_path / name).write_text("ten years")
    assert is_ours(tmp_path) == ours


def test_drafts_of_a_killed_process_are_removed_and_those_of_others_stay(tmp_path):
    child = "import os; from pathlib import Path; from lib.runtime.atomic import *\n"
    child += "with drafting(Path('model')) as draft, replacing(Path('record.json')) as file:\n"
    child += "    (draft / 'weights').write_text('half'); file.write(b'half'); file.flush(); os._exit(9)"
    done = subprocess.run(
        [sys.executable, "-c", child], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert done.returncode == 9
    assert len(list(tmp_path.glob(".tmp-*"))) == 2
    (tmp_path / ".tmp-mine").mkdir()
    (tmp_path / ".tmp-mine" / "notes").write_text("notes")
    (tmp_path / ".tmp-notes.txt-abcdefgh").write_text("notes")
    remove_drafts(tmp_path, ["record.json"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-mine", ".tmp-notes.txt-abcdefgh"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_file_is_written_whole_or_stays_as_it_was(tmp_path, error):
    path = tmp_path / "config.yaml"
    write_atomically(path, "before")

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "before"
    assert file_names(tmp_path) == ["config.yaml"]
    write_atomically(path, "after \udcff")
    assert path.read_text() == "after \\udcff"


def test_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *a: (calls.append("fsync"), fsync(*a)))
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("replace"), replace(*a)))
    write_atomically(tmp_path / "a", "content")
    assert calls == ["fsync", "replace", "fsync"]


def test_file_with_the_same_content_is_not_written_again(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    write_atomically(path, "content")
    before = path.stat()
    with replacing(path) as file:
        file.write(b"content")
    monkeypatch.setattr(atomic.tempfile, "mkstemp", lambda **_: pytest.fail("written again"))
    write_atomically(path, "content")
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_weights_are_linked_on_request_and_other_files_copied(folder, tmp_path):
    copy_files(folder, tmp_path / "linked", file_names(folder), link=True)
    copy_files(folder, tmp_path / "copy", file_names(folder))
    assert (tmp_path / "linked" / "model.safetensors").samefile(folder / "model.safetensors")
    assert not (tmp_path / "linked" / "best" / "config.json").samefile(folder / "best" / "config.json")
    assert not (tmp_path / "copy" / "model.safetensors").samefile(folder / "model.safetensors")


def test_hard_linked_file_keeps_the_hash_it_was_written_with(folder, tmp_path):
    """A bit that flips on the disk after that is noticed in the new folder as well."""
    copy_files(folder, tmp_path / "next", file_names(folder), link=True)
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\xff")
    write_manifest(tmp_path / "next", {}, before=folder)
    assert "model.safetensors was changed" in find_damage(tmp_path / "next")


def test_file_that_another_machine_has_written_is_waited_for_and_missed(folder, monkeypatch):
    monkeypatch.setattr(atomic, "NFS_SECONDS", 0.0)
    file, hidden = folder / "model.safetensors", folder.parent / "hidden"
    known = {file.name: atomic.describe_file(file)}
    file.rename(hidden)
    with pytest.raises(UserError, match=r"model\.safetensors was written and is not seen 0 s later: .* same command"):
        write_manifest(folder, {}, known=known)
    monkeypatch.setattr(atomic, "NFS_SECONDS", 60.0)
    monkeypatch.setattr(atomic.time, "sleep", lambda _: hidden.rename(file))
    write_manifest(folder, {}, known=known)
    assert find_damage(folder) is None
    assert set(atomic.listed_files(folder)) == {"best/config.json", "model.safetensors"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(), RuntimeError("a\nb")])
def test_failed_write_is_explained_by_the_free_space(error, tmp_path):
    assert "MiB are free at" in explain(error, tmp_path)
    assert explain(UserError("as it is"), tmp_path) == "as it is"


def test_quota_limit_of_file_size_and_deleted_folder_are_named(tmp_path, monkeypatch):
    assert "quota" in explain(OSError(errno.EDQUOT, "Disk quota exceeded"), tmp_path)
    assert "quota" in explain(RuntimeError("I/O error: Disk quota exceeded (os error 122)"), tmp_path)
    assert "is gone" in explain(FileNotFoundError(2, "No such file"), tmp_path / "run")
    monkeypatch.setattr(atomic.resource, "getrlimit", lambda _: (4096, 4096))
    with (
        pytest.raises(UserError, match=r"4 KiB.*ulimit -f unlimited.*; .*once more"),
        explaining(tmp_path, "once more"),
    ):
        raise OSError(errno.EFBIG, "File too large")


def test_each_file_and_each_part_of_one_is_progress(folder, tmp_path, monkeypatch):
    beats = []
    monkeypatch.setattr(atomic, "beat", lambda: beats.append(1))
    monkeypatch.setattr(atomic, "CHUNK", 2)
    names, size = file_names(folder), sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    copy_files(folder, tmp_path / "copy", names)
    assert len(beats) == len(names)
    beats.clear()
    assert find_damage(folder) is None
    assert len(beats) > size / 8
    beats.clear()
    atomic.sync(folder)
    assert beats


def test_numbers_that_are_not_finite_become_text_for_json():
    value = {"a": [float("nan"), 1.5], "b": (float("inf"), -float("inf")), "c": None}
    assert finite(value) == {"a": ["NaN", 1.5], "b": ["Infinity", "-Infinity"], "c": None}
