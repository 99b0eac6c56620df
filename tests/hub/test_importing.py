"""An import makes a cache entry that every library reads, from every layout, or changes nothing."""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants, scan_cache_dir, snapshot_download
from transformers import AutoModel, AutoTokenizer

from lib.config.hub import ImportConfig
from lib.config.sections import DataConfig
from lib.data.sources import load_raw
from lib.errors import UserError
from lib.hub.cache.layout import Repo, find_snapshot, parse_repo, snapshot_files
from lib.hub.cache.publish import staging_folder
from lib.hub.cache.verify import verify_repo
from lib.hub.importing import load_check
from lib.hub.importing.folder import UNKNOWN, Imported, import_source
from tests.conftest import ROOT
from tests.hub_layouts import (
    COMMIT,
    LAYOUTS,
    browser,
    cache_of_another_machine,
    git,
    git_clone,
    local_dir,
    tree_entry,
    write_sst5,
)
from tests.loopback_hub import loopback_hub, pointer_of, repository_files

REPO = Repo("user/tiny")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, the only one of this process, which may use no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def take(source: Path, repo: Repo = REPO, **settings: object) -> Imported:
    """Import, without loading in a fresh process unless asked for."""
    options = {"repo_id": repo.repo_id, "repo_type": repo.repo_type, "load_check": False, **settings}
    return import_source(ImportConfig(str(source), **options))  # type: ignore[arg-type]


def everything(folder: Path) -> dict[str, bytes | str]:
    """All files and links below a folder, locks left out."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        if ".locks" not in path.parts and (path.is_symlink() or path.is_file()):
            name = path.relative_to(folder).as_posix()
            found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_an_entry_that_loads_and_that_scan_cache_accepts(
    layout: str, roberta: Path, tmp_path: Path, cache: Path
) -> None:
    make, verified = LAYOUTS[layout]
    done = take(make(roberta, tmp_path / "given"))
    assert (done.unproven == ()) is verified
    assert (done.commit == COMMIT) is (layout in ("hf download", "cache entry", "snapshot"))
    assert done.commit.startswith(UNKNOWN) is (not verified)

    snapshot = find_snapshot(REPO)
    assert snapshot is not None
    wanted = repository_files(roberta)
    assert {name: path.read_bytes() for name, path in snapshot_files(snapshot).items() if name in wanted} == wanted
    assert not {".DS_Store", ".msc", "notes.txt"} & set(snapshot_files(snapshot))
    assert list(verify_repo(REPO)) == []

    model = AutoModel.from_pretrained("user/tiny", add_pooling_layer=False)
    tokenizer = AutoTokenizer.from_pretrained("user/tiny")
    given = AutoModel.from_pretrained(roberta, add_pooling_layer=False).state_dict()
    assert all((value == given[name]).all() for name, value in model.state_dict().items())
    assert len(tokenizer("a film").input_ids) == 4

    report = scan_cache_dir(cache)
    assert report.warnings == []
    (repo,) = report.repos
    assert (repo.repo_id, [sorted(revision.refs) for revision in repo.revisions]) == ("user/tiny", [["main"]])


def test_blobs_have_the_names_that_the_hub_gives_them(roberta: Path, tmp_path: Path, cache: Path) -> None:
    take(browser(roberta, tmp_path / "given"))
    blobs = {path.name for path in (REPO.folder / "blobs").iterdir()}
    for name, data in repository_files(roberta).items():
        digest = git(tmp_path, "hash-object", str(roberta / name))
        assert (hashlib.sha256(data).hexdigest() if name == "model.safetensors" else digest) in blobs
    assert not (REPO.folder / "refs" / "main").read_bytes().endswith(b"\n")
    for path in (REPO.folder / "snapshots").rglob("*"):
        assert path.is_dir() or not os.path.isabs(os.readlink(path))


def test_gitattributes_decide_what_is_in_lfs(roberta: Path, tmp_path: Path, cache: Path) -> None:
    given = browser(roberta, tmp_path / "given")
    (given / ".gitattributes").write_text("tokenizer.json filter=lfs diff=lfs merge=lfs -text\n")
    take(given)
    digest = hashlib.sha256((roberta / "tokenizer.json").read_bytes()).hexdigest()
    assert (REPO.folder / "blobs" / digest).is_file()
    assert (REPO.folder / "blobs" / git(tmp_path, "hash-object", str(roberta / "model.safetensors"))).is_file()


def test_snapshot_download_after_an_import_downloads_no_file(
    roberta: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(roberta, tmp_path / "served" / "models" / "user" / "tiny")
    take(browser(roberta, tmp_path / "given"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with loopback_hub(tmp_path / "served") as hub:
        where = snapshot_download("user/tiny", endpoint=hub.endpoint, token=False)
        assert hub.requests
        assert repository_files(Path(where)) == repository_files(roberta)
        # Every file is asked for by HEAD, and none by GET: the names of the imported contents are right.
        assert len(hub.downloads) == len(repository_files(roberta))


def test_imported_data_set_loads_offline(tmp_path: Path, cache: Path) -> None:
    write_sst5(tmp_path / "data")
    take(tmp_path / "data", Repo("SetFit/sst5", "dataset"))
    splits = load_raw(DataConfig(dataset="sst5"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 40, "validation": 20, "test": 20}
    assert scan_cache_dir(cache).warnings == []


def test_import_command_loads_in_a_fresh_process_and_hf_cache_keeps_the_entry(roberta: Path, tmp_path: Path) -> None:
    given = browser(roberta, tmp_path / "given")
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}

    def call(*command: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            list(map(str, command)), env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )

    hub = [sys.executable, ROOT / "hub.py"]
    done = call(*hub, "import", given, "--repo_id", "user/tiny")
    assert done.returncode == 0, done.stderr
    assert "loaded once offline" in done.stdout
    assert "unverified" in done.stdout
    hf = Path(sys.executable).parent / "hf"
    assert "model/user/tiny" in call(hf, "cache", "ls").stdout
    assert "Nothing to prune" in call(hf, "cache", "prune", "--yes").stdout + call(hf, "cache", "prune", "--yes").stderr
    done = call(*hub, "verify")
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["user/tiny: sound", "1 checked, 0 damaged or missing"]

    blob = next(path for path in (tmp_path / "hf/hub/models--user--tiny/blobs").iterdir() if len(path.name) == 64)
    data = blob.read_bytes()
    blob.unlink()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = call(*hub, "verify")
    assert done.returncode == 1
    assert "user/tiny: model.safetensors is damaged" in done.stdout


def test_model_that_does_not_load_is_not_added(
    roberta: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_this_process(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess:
        """Run the code of the fresh process here: faster."""
        assert (command[1], env["HF_HUB_OFFLINE"]) == ("-c", "1")
        with monkeypatch.context() as patch:
            patch.setattr(constants, "HF_HUB_CACHE", env["HF_HUB_CACHE"])
            patch.setattr(sys, "argv", command[2:])
            try:
                exec(command[2], {})
            except Exception as error:
                return subprocess.CompletedProcess(command, 1, "", str(error))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(load_check.subprocess, "run", in_this_process)
    given = browser(roberta, tmp_path / "given")
    config = json.loads((given / "config.json").read_text())
    (given / "config.json").write_text(json.dumps(config | {"hidden_size": 24}))
    with pytest.raises(UserError, match=r"user/tiny does not load from these files, nothing was changed: "):
        take(given, load_check=True)
    assert everything(cache) == {}
    (given / "config.json").write_text(json.dumps(config))
    take(given, load_check=True)
    assert find_snapshot(REPO) is not None


def break_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pointer_of(b"weights"))


def break_html(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("\n<!DOCTYPE html><html>404</html>")


def break_html_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_text("<html>Please log in</html>")


def break_cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def break_cut_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:20])


def break_dtype(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data.replace(b'"F32"', b'"F99"'))


def break_cut_json(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text()[:-30])


def break_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weights = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def break_shard_without_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")


def break_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def break_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def break_link(folder: Path) -> None:
    (folder.parent / "secret").write_text("secret")
    (folder / "vocab.txt").symlink_to("../secret")


def break_folder_link(folder: Path) -> None:
    (folder / "more").symlink_to("/etc")


def break_unfinished(folder: Path) -> None:
    (folder / "model.safetensors.aria2").write_bytes(b"")


def break_renamed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model (1).safetensors")


def break_saved_answer(folder: Path) -> None:
    (folder / "vocab.txt").write_text("Entry not found")


def break_browser_folder(folder: Path) -> None:
    (folder / "model.safetensors.download").mkdir()


def break_odd_name(folder: Path) -> None:
    (folder / os.fsdecode(b"\xff.txt")).write_text("")


def break_empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


BREAKS = {
    break_pointer: "model.safetensors is a git-LFS pointer",
    break_html: "tokenizer.json is a web page",
    break_html_weights: "model.safetensors is a web page",
    break_cut: r"model.safetensors is cut off, or not a safetensors file \([\d,]+ bytes",
    break_cut_header: "model.safetensors is cut off, or not a safetensors file",
    break_dtype: "model.safetensors is cut off, or not a safetensors file",
    break_cut_json: "config.json is not JSON",
    break_shard: "model-00002-of-00002.safetensors is missing",
    break_shard_without_index: "model-00001-of-00002.safetensors is missing",
    break_config: "it lacks config.json to be a model",
    break_tokenizer: "it lacks a tokenizer",
    break_pickle: r"it lacks weights \(model.safetensors\).*--allow_pickle",
    break_link: "vocab.txt is a link that leaves the folder",
    break_folder_link: "more is a link that leaves the folder",
    break_unfinished: "model.safetensors.aria2: a download is not finished",
    break_renamed: r"'model \(1\).safetensors' looks like model.safetensors under another name; rename it",
    break_saved_answer: "vocab.txt is an error message of the server, not the file itself: 'Entry not found'",
    break_browser_folder: "model.safetensors.download: a download is not finished",
    break_odd_name: "no file of the Hub has such a name",
    break_empty: r"it lacks config.json, .* \(found: nothing\)",
}


@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
def test_damaged_folder_is_refused_by_file_name_and_leaves_nothing(
    damage: object, roberta: Path, tmp_path: Path, cache: Path
) -> None:
    given = browser(roberta, tmp_path / "given")
    damage(given)  # type: ignore[operator]
    with pytest.raises(UserError, match=BREAKS[damage]):  # type: ignore[index]
        take(given)
    assert everything(cache) == {}


def test_content_that_does_not_match_the_hash_of_its_source_is_refused(
    roberta: Path, tmp_path: Path, cache: Path
) -> None:
    for number, make in enumerate((git_clone, local_dir)):
        given = make(roberta, tmp_path / f"given{number}")
        data = (given / "model.safetensors").read_bytes()
        (given / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(UserError, match=r"model\.safetensors is not the file that its source names"):
            take(given)
    assert everything(cache) == {}


def test_hostile_notes_of_a_folder_neither_leave_the_entry_nor_prove_a_file(
    roberta: Path, tmp_path: Path, cache: Path
) -> None:
    for number, name in enumerate(("../../../../../evil", "abc")):
        given = local_dir(roberta, tmp_path / f"given{number}")
        (given / ".cache/huggingface/trees" / f"{COMMIT}.json").write_text('{"files": {"../x": {"size": "no"}}}')
        note = given / ".cache/huggingface/download/config.json.metadata"
        note.write_text(f"{COMMIT}\n{name}\n1700000000.0\n")
        done = take(given, move_ref=True)
        assert done.unproven == ("config.json",)
        assert "unverified: there is no hash for config.json; the others are verified" in str(done)
    assert list(verify_repo(REPO)) == []
    assert not list(tmp_path.rglob("evil"))


def test_clone_of_another_owner_with_lfs_pointers_is_verified(
    roberta: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = git_clone(roberta, tmp_path / "given")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    data = (roberta / "model.safetensors").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    fetched = given / ".git" / "lfs" / "objects" / digest[:2] / digest[2:4] / digest
    fetched.parent.mkdir(parents=True)
    fetched.write_bytes(data)
    (given / "model.safetensors").write_bytes(pointer_of(data))
    done = take(given)
    assert (done.layout, done.unproven) == ("git clone", ())
    (given / "config.json").write_bytes((given / "config.json").read_bytes().replace(b"\n", b"\r\n"))
    with pytest.raises(UserError, match=r"config\.json has Windows line ends: .*git clone -c core\.autocrlf=false"):
        take(given)


def test_link_that_leaves_the_entry_is_refused(roberta: Path, tmp_path: Path, cache: Path) -> None:
    entry = cache_of_another_machine(roberta, tmp_path / "theirs" / "models--user--tiny")
    (tmp_path / "theirs" / "secret").write_text("secret")
    (entry / "snapshots" / COMMIT / "vocab.txt").symlink_to("../../../secret")
    with pytest.raises(UserError, match=r"vocab\.txt is a link that leaves the folder"):
        take(entry)


def test_nested_folder_is_found_and_the_data_folder_of_a_data_set_kept(
    roberta: Path, tmp_path: Path, cache: Path
) -> None:
    browser(roberta, tmp_path / "a" / "b" / "c")
    assert take(tmp_path / "a").files == 4
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "data" / "train.csv").write_text("text,label\na,0\n")
    data = Repo("user/set", "dataset")
    take(tmp_path / "set", data)
    snapshot = find_snapshot(data)
    assert snapshot is not None
    assert set(snapshot_files(snapshot)) == {"data/train.csv"}
    cache_of_another_machine(roberta, tmp_path / "theirs" / "models--other--tiny")
    cache_of_another_machine(roberta, tmp_path / "theirs" / "models--third--tiny")
    with pytest.raises(
        UserError, match=r"a cache that holds models--other--tiny, models--third--tiny, but not models--"
    ):
        take(tmp_path / "theirs")


def test_adapter_is_checked_by_its_own_files_and_names_its_base(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy
    from safetensors.numpy import save_file

    given = tmp_path / "given"
    given.mkdir()
    (given / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "roberta-base"}')
    save_file({"a": numpy.zeros(3, numpy.float32)}, given / "adapter_model.safetensors")
    done = take(given, load_check=True)
    assert "base       roberta-base, which this adapter needs as well" in str(done)
    (given / "pytorch_model_head.bin").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="does not load from these files"):
        take(given, load_check=True, move_ref=True)


def test_list_of_sha256_verifies_loose_files(roberta: Path, tmp_path: Path, cache: Path) -> None:
    given = browser(roberta, tmp_path / "given")
    names = repository_files(roberta)
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}" for name, data in names.items()]
    (tmp_path / "list").write_text("\n".join(lines))
    assert not take(given, sha256=str(tmp_path / "list")).unproven
    (tmp_path / "list").write_text("\n".join(lines).replace(lines[0][:8], "00000000"))
    with pytest.raises(UserError, match="is not the file that its source names"):
        take(given, sha256=str(tmp_path / "list"))
    (tmp_path / "list").write_text("not a list")
    with pytest.raises(UserError, match=r"--sha256 .*list, line 1"):
        take(given, sha256=str(tmp_path / "list"))
    # As PowerShell and the programs of Windows write it.
    (tmp_path / "list").write_bytes("\r\n".join(line.replace("  ", " *.\\") for line in lines).encode("utf-16"))
    assert not take(given, sha256=str(tmp_path / "list")).unproven
    (tmp_path / "list").write_text(f"{lines[0]}\n{'0' * 64}  of-another-folder.bin")
    assert take(given, sha256=str(tmp_path / "list")).unproven == tuple(sorted(names)[1:])
    (tmp_path / "list").write_text(lines[0].replace("  ", "  folder/"))
    with pytest.raises(UserError, match="names no file of"):
        take(given, sha256=str(tmp_path / "list"))


@pytest.mark.parametrize("name", ["../evil", "user/../evil", "/etc", "a/b/c", "user--name", "", ".hidden", "a b"])
def test_invalid_repository_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is not a repository"):
        parse_repo(name)


def test_revision_that_leaves_the_entry_and_short_commit_are_refused(
    roberta: Path, tmp_path: Path, cache: Path
) -> None:
    for revision in ("../../x", "/tmp/x", ""):
        with pytest.raises(UserError, match="--revision"):
            take(browser(roberta, tmp_path / f"given{len(revision)}"), revision=revision)
    with pytest.raises(UserError, match="--commit abc: expected the full commit"):
        take(roberta, commit="abc")


def test_importing_again_changes_nothing(roberta: Path, tmp_path: Path, cache: Path) -> None:
    given = browser(roberta, tmp_path / "given")
    first, before = take(given), everything(cache)
    assert take(given) == first
    assert everything(cache) == before


def test_files_are_hard_linked_and_copied_where_links_are_not_possible(
    roberta: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = browser(roberta, tmp_path / "given")
    take(given)
    snapshot = find_snapshot(REPO)
    assert snapshot is not None
    assert (snapshot / "model.safetensors").samefile(given / "model.safetensors")

    def no_link(*_: object, **__: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", no_link)
    take(given, Repo("user/other"))
    copy = find_snapshot(Repo("user/other"))
    assert copy is not None
    assert not (copy / "model.safetensors").samefile(given / "model.safetensors")
    assert repository_files(copy) == repository_files(roberta)


def test_private_file_is_copied_so_that_others_can_read_the_cache(roberta: Path, tmp_path: Path, cache: Path) -> None:
    given = browser(roberta, tmp_path / "given")
    (given / "config.json").chmod(0o600)
    take(given)
    snapshot = find_snapshot(REPO)
    assert snapshot is not None
    assert (snapshot / "config.json").stat().st_mode & 0o044
    assert (given / "config.json").stat().st_mode & 0o777 == 0o600


def test_other_content_for_a_commit_or_ref_in_the_cache_is_refused(roberta: Path, tmp_path: Path, cache: Path) -> None:
    take(local_dir(roberta, tmp_path / "given"))
    before = everything(cache)
    other = browser(roberta, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    with pytest.raises(UserError, match=r"main is commit c0ffee000000 in the cache, and 00000000.*--move_ref"):
        take(other)
    with pytest.raises(UserError, match=r"another config\.json for commit c0ffee000000"):
        take(other, commit=COMMIT)
    assert everything(cache) == before
    take(other, revision="mine")
    take(other, move_ref=True)
    assert {path.name for path in (REPO.folder / "snapshots").iterdir()} > {COMMIT}
    assert (REPO.folder / "refs" / "main").read_text().startswith(UNKNOWN)


def test_import_completes_a_partial_snapshot_and_repairs_a_damaged_one(
    roberta: Path, tmp_path: Path, cache: Path
) -> None:
    given = local_dir(roberta, tmp_path / "given")
    take(given)
    snapshot = find_snapshot(REPO)
    assert snapshot is not None
    (snapshot / "tokenizer.json").unlink()
    blob = (snapshot / "model.safetensors").resolve()
    blob.unlink()
    blob.write_bytes(b"damaged")
    assert list(verify_repo(REPO))
    take(given)
    assert list(verify_repo(REPO)) == []
    assert repository_files(snapshot) == repository_files(roberta)


def take_in_process(given: Path, cache: str, results: "multiprocessing.Queue[str]") -> None:
    constants.HF_HUB_CACHE = cache
    try:
        results.put(take(given).commit)
    except BaseException as error:
        results.put(repr(error))


def test_imports_at_the_same_time_all_succeed(roberta: Path, tmp_path: Path, cache: Path) -> None:
    given = browser(roberta, tmp_path / "given")
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=take_in_process, args=(given, str(cache), results)) for _ in range(4)]
    for process in processes:
        process.start()
    told = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(timeout=60)
    assert len(told) == 1, told
    assert re.fullmatch(r"0{8}[0-9a-f]{32}", told.pop())
    assert list(verify_repo(REPO)) == []


def test_draft_of_a_killed_import_is_removed_and_that_of_a_running_one_kept(
    roberta: Path, tmp_path: Path, cache: Path
) -> None:
    with staging_folder(REPO) as living:
        left = living.with_name("staging-left")
        left.mkdir()
        left.with_suffix(".lock").touch()
        take(browser(roberta, tmp_path / "given"))
        assert living.is_dir()
        assert not left.exists()
    assert not list((cache / ".locks").rglob("staging-*"))


def test_import_killed_at_any_step_leaves_a_complete_model_or_none(
    roberta: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is killed after each step of publishing in turn."""
    given = browser(roberta, tmp_path / "given")
    replace, rename = os.replace, os.rename
    for last in range(1, 30):
        steps = [0]

        def counted(call: object, *arguments: object) -> None:
            steps[0] += 1  # noqa: B023
            if steps[0] > last:  # noqa: B023
                raise KeyboardInterrupt
            call(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(os, "replace", lambda *given: counted(replace, *given))
        monkeypatch.setattr(os, "rename", lambda *given: counted(rename, *given))
        try:
            take(given)
            finished = True
        except KeyboardInterrupt:
            finished = False
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(os, "rename", rename)
        snapshot = find_snapshot(REPO)
        assert snapshot is None or repository_files(snapshot) == repository_files(roberta)
        if finished:
            break
        shutil.rmtree(cache)
    assert finished
    assert last > 8


def test_absent_files_are_recorded_only_where_the_list_of_all_files_is_known(
    roberta: Path, tmp_path: Path, cache: Path
) -> None:
    take(browser(roberta, tmp_path / "loose"))
    assert not (REPO.folder / ".no_exist").exists()
    listed = Repo("user/listed")
    done = take(local_dir(roberta, tmp_path / "listed"), listed)
    assert done.missing == ("README.md",)
    absent = {path.name for path in (listed.folder / ".no_exist" / COMMIT).iterdir()}
    assert "added_tokens.json" in absent
    assert not absent & set(repository_files(roberta))


def test_file_of_another_size_than_listed_is_refused(roberta: Path, tmp_path: Path, cache: Path) -> None:
    given = local_dir(roberta, tmp_path / "given")
    path = given / ".cache" / "huggingface" / "trees" / f"{COMMIT}.json"
    data = b"x" * 10
    tree = json.loads(path.read_text())
    tree["files"]["config.json"] = tree_entry("config.json", data)
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"config\.json is not the listed file: [\d,]+ of 10 bytes"):
        take(given)
