"""Models and data sets on their way between machines: what comes out is what went in, and no archive is trusted."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import constants

from lib.config.sections import DataConfig, ModelConfig
from lib.data.sources import load_raw
from lib.errors import UserError
from lib.hub.cache.layout import Repo, find_snapshot, snapshot_files, verify_repo
from lib.hub.importing.archives import opened, pack, unpack
from lib.hub.importing.folder import import_folder
from lib.model.load import load_tokenizer
from tests.conftest import Command
from tests.hub_layouts import COMMIT, cache_of_another_machine, tarred, write_sst5, zipped
from tests.loopback_hub import repository_files

MODEL, DATA = Repo("user/tiny"), Repo("SetFit/sst5", "dataset")


@pytest.fixture
def packed(roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive of a model and a data set; the cache they came from is out of sight, the new one is empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "here"))
    write_sst5(tmp_path / "sst5")
    import_folder(roberta, MODEL, load_check=False)
    import_folder(tmp_path / "sst5", DATA, load_check=False)
    pack((str(MODEL), str(DATA)), tmp_path / "lab.tar")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "there"))
    return tmp_path / "lab.tar"


def repositories(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*--*"))


def rewrite(archive: Path, change: dict[str, bytes]) -> None:
    """Give members of an archive other contents."""
    with tarfile.open(archive) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
    with tarfile.open(archive, "w") as tar:
        for name, data in (members | change).items():
            head = tarfile.TarInfo(name)
            head.size = len(data)
            tar.addfile(head, io.BytesIO(data))


def member(archive: Path, end: str) -> tuple[str, bytes]:
    with tarfile.open(archive) as tar:
        name = next(name for name in tar.getnames() if name.endswith(end))
        return name, tar.extractfile(name).read()  # type: ignore[union-attr]


def test_what_is_unpacked_is_what_was_packed_and_loads_offline(
    packed: Path, roberta: Path, tmp_path: Path, sockets: list
) -> None:
    unpack(packed)
    for repo, source in ((MODEL, roberta), (DATA, tmp_path / "sst5")):
        snapshot = find_snapshot(repo)
        assert snapshot is not None
        assert repository_files(snapshot) == repository_files(source)
        assert all(path.is_symlink() for path in snapshot_files(snapshot).values())
        assert list(verify_repo(repo)) == []
    assert load_tokenizer(ModelConfig("user/tiny"))("film").input_ids
    assert {name: len(split) for name, split in load_raw(DataConfig("sst5")).items()}["train"] == 40
    assert sockets == []


def test_unpacking_again_changes_nothing(packed: Path, tmp_path: Path) -> None:
    def state() -> dict:
        files = (tmp_path / "there").rglob("*")
        return {path: path.stat().st_mtime_ns for path in files if path.is_file() and ".locks" not in path.parts}

    unpack(packed)
    before = state()
    unpack(packed)
    assert set(state()) == set(before)
    assert list(verify_repo(MODEL)) == []


def test_a_flipped_bit_on_the_way_is_named_and_nothing_is_unpacked(packed: Path, tmp_path: Path) -> None:
    name, data = member(packed, "model.safetensors")
    rewrite(packed, {name: data[:-1] + bytes([data[-1] ^ 1])})
    with pytest.raises(UserError, match=r"model\.safetensors of user/tiny is not what the manifest says"):
        unpack(packed)
    assert repositories(tmp_path / "there") == []


def test_a_manifest_changed_along_with_a_file_does_not_help(packed: Path, tmp_path: Path) -> None:
    """The name of a content in the cache is its hash, whatever the manifest says of it."""
    import hashlib

    name, data = member(packed, "model.safetensors")
    data = data[:-1] + bytes([data[-1] ^ 1])
    manifest = json.loads(member(packed, "manifest.json")[1])
    manifest["repositories"][0]["files"]["model.safetensors"]["sha256"] = hashlib.sha256(data).hexdigest()
    rewrite(packed, {name: data, "manifest.json": json.dumps(manifest).encode()})
    with pytest.raises(UserError, match="has a wrong name in the manifest"):
        unpack(packed)
    assert repositories(tmp_path / "there") == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("revision", "../../../../etc"), ("commit", "../x"), ("files", {"../../evil": {}}), ("repo_id", "../evil")],
)
def test_a_manifest_that_leaves_the_cache_is_refused(packed: Path, tmp_path: Path, field: str, value: object) -> None:
    manifest = json.loads(member(packed, "manifest.json")[1])
    manifest["repositories"][0][field] = value
    rewrite(packed, {"manifest.json": json.dumps(manifest).encode()})
    with pytest.raises(UserError, match=r"outside of the cache|is not a repository"):
        unpack(packed)
    assert repositories(tmp_path / "there") == []


def test_what_is_damaged_or_absent_is_not_packed(packed: Path, tmp_path: Path) -> None:
    unpack(packed)
    with pytest.raises(UserError, match="nobody/nothing at main is not in the cache"):
        pack(("nobody/nothing",), tmp_path / "new.tar")
    snapshot = find_snapshot(MODEL)
    assert snapshot is not None
    blob = (snapshot / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x07")
    with pytest.raises(UserError, match=r"not packed:\n.*model\.safetensors"):
        pack((str(MODEL),), tmp_path / "new.tar")
    assert sorted(path.name for path in tmp_path.glob("new*")) == []


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


def test_archives_that_would_leave_their_folder_or_fill_the_disk_are_refused(empty_cache: None, tmp_path: Path) -> None:
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
        for number in range(50):  # each below the size from which a single one is looked at
            archive.writestr(str(number), bytes(2**17))
    for path in [*wicked, tmp_path / "10.tar.gz", tmp_path / "11.zip"]:
        with pytest.raises(UserError, match=f"{path.name}.*(not to be trusted|link or device)"), opened(path):
            pass
    assert not list((tmp_path / "hub").rglob("staging-*"))
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "password"])
@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_broken_archive_is_a_message_and_no_trace(
    damage: str, kind: str, roberta: Path, empty_cache: None, tmp_path: Path
) -> None:
    path = (zipped if kind == "zip" else tarred)(roberta, tmp_path / "given")
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 255
    elif kind == "zip":  # the bit of encryption, in the directory and before the file
        for start, mark in ((8, b"PK\1\2"), (6, b"PK\3\4")):
            data[data.find(mark) + start] |= 1
    else:
        return
    path.write_bytes(data)
    told = r"given\.(zip|tar\.gz) (cannot be unpacked|is neither|needs a password)"
    with pytest.raises(UserError, match=told), opened(path):
        pass


def test_what_does_not_fit_on_the_disk_is_not_unpacked(
    roberta: Path, empty_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))  # type: ignore[attr-defined]
    for path in (zipped(roberta, tmp_path / "given"), tarred(roberta, tmp_path / "given")):
        with pytest.raises(UserError, match="GB are free beside the cache"), opened(path):
            pass


def test_hard_links_of_a_hand_built_cache_and_names_of_windows_are_unpacked(
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
        with opened(tmp_path / name) as folder:
            done = import_folder(folder, MODEL, move_ref=True, load_check=False)
        assert (done.files, done.commit == COMMIT) == (4, name == "theirs.tar.gz")
        snapshot = find_snapshot(MODEL)
        assert snapshot is not None
        assert repository_files(snapshot) == repository_files(roberta)


def test_the_command_lines_carry_a_model_to_another_cache(run: Command, packed: Path, tmp_path: Path) -> None:
    there = {"HF_HUB_CACHE": str(tmp_path / "there")}
    told = run("hub.py", "unpack", packed, env=there).stdout
    assert told.splitlines()[0].startswith("unpacked   user/tiny at main (")
    told = run("hub.py", "verify", env=there).stdout
    assert told.splitlines() == ["user/tiny: sound", "datasets/SetFit/sst5: sound", "2 in the cache, 0 damaged"]
    told = run("hub.py", "pack", "user/tiny", "--output", "again.tar.gz", env=there).stdout
    assert told.splitlines()[-1] == "written    again.tar.gz; on the other machine: python hub.py unpack again.tar.gz"
    told = run("hub.py", "unpack", "again.tar.gz", env={"HF_HUB_CACHE": str(tmp_path / "third")}).stdout
    assert "unpacked   user/tiny" in told
    told = run("hub.py", "unpack", tmp_path / "sst5" / "train.jsonl", env=there, code=2).stderr
    assert told.startswith("error: ")
