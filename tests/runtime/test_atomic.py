"""Folders are written whole or not at all, and what was changed in them is named."""

import os
from pathlib import Path

import pytest

from lib.errors import UserError
from lib.runtime import atomic
from lib.runtime.atomic import explain, find_damage, finite, link_tree, publish_folder, write_manifest


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


def test_weights_are_linked_and_other_files_copied(folder, tmp_path):
    link_tree(folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").samefile(folder / "model.safetensors")
    assert not (tmp_path / "copy" / "best" / "config.json").samefile(folder / "best" / "config.json")
    assert find_damage(tmp_path / "copy") is None


def test_hard_linked_file_keeps_the_hash_it_was_written_with(folder, tmp_path):
    """A bit that flips on the disk after that is noticed in the new folder as well."""
    link_tree(folder, tmp_path / "next")
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\xff")
    write_manifest(tmp_path / "next", {}, before=folder)
    assert "model.safetensors was changed" in find_damage(tmp_path / "next")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(), RuntimeError("a\nb")])
def test_failed_write_is_explained_by_the_free_space(error, tmp_path):
    assert "MiB are free at" in explain(error, tmp_path)
    assert explain(UserError("as it is"), tmp_path) == "as it is"


def test_numbers_that_are_not_finite_become_text_for_json():
    value = {"a": [float("nan"), 1.5], "b": (float("inf"), -float("inf")), "c": None}
    assert finite(value) == {"a": ["NaN", 1.5], "b": ["Infinity", "-Infinity"], "c": None}
