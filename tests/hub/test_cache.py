"""Caches built by hand: what verify reports, and whether a run can start from them, without network."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import AutoConfig, dynamic_module_utils

from lib.config.sections import HubConfig, ModelConfig
from lib.errors import UserError
from lib.hub.cache.layout import Repo, find_snapshot
from lib.hub.cache.verify import verify_repo
from lib.hub.fetch import ensure_cached
from lib.hub.needs import Need, damaged_files, missing_from_cache
from lib.model.load import build_model, load_tokenizer
from lib.model.source import load_hf_config, resolve_model, use_own_modules
from tests.hub_layouts import COMMIT, cache_of_another_machine, tree_entry
from tests.loopback_hub import pointer_of, repository_files

REPO = Repo("user/tiny")


@pytest.fixture
def entry(roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sound entry as huggingface_hub would have made it, the only one in the cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache_of_another_machine(roberta, tmp_path / "hub" / "models--user--tiny")


def snapshot(entry: Path) -> Path:
    return next((entry / "snapshots").iterdir())


def weights(entry: Path) -> Path:
    return next(path for path in (entry / "blobs").iterdir() if len(path.name) == 64)


def canonical(entry: Path) -> None:
    pass


def hard_links(entry: Path) -> None:
    for path in snapshot(entry).iterdir():
        blob = path.resolve()
        path.unlink()
        os.link(blob, path)


def plain_files(entry: Path) -> None:
    hard_links(entry)
    shutil.rmtree(entry / "blobs")


def wrong_blob_names(entry: Path) -> None:
    for number, path in enumerate(sorted(snapshot(entry).iterdir())):
        blob = path.resolve()
        blob.rename(entry / "blobs" / f"file{number}")
        path.unlink()
        path.symlink_to(f"../../blobs/file{number}")


def newline(entry: Path) -> None:
    (entry / "refs" / "main").write_text(COMMIT + "\n")


def no_refs(entry: Path) -> None:
    shutil.rmtree(entry / "refs")


def invented_commit(entry: Path) -> None:
    snapshot(entry).rename(entry / "snapshots" / "manual-import")
    (entry / "refs" / "main").write_text("manual-import")


def weights_missing(entry: Path) -> None:
    weights(entry).unlink()


def bit_flip(entry: Path) -> None:
    data = weights(entry).read_bytes()
    weights(entry).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def truncated(entry: Path) -> None:
    weights(entry).write_bytes(weights(entry).read_bytes()[:-64])


def pointer(entry: Path) -> None:
    weights(entry).write_bytes(pointer_of(weights(entry).read_bytes()))


def ref_to_nowhere(entry: Path) -> None:
    (entry / "refs" / "main").write_text("2" * 40)


def stray_refs(entry: Path) -> None:
    """As editors and `cp` leave them."""
    for name, text in {"main_cp": COMMIT + "\n", "old": "2" * 40, "main~": "", "note": "x" * 5000}.items():
        (entry / "refs" / name).write_text(text)


def newline_of_a_tag(entry: Path) -> None:
    (entry / "refs" / "main").rename(entry / "refs" / "v1")
    (entry / "refs" / "v1").write_text(COMMIT + "\n")


def incomplete_left(entry: Path) -> None:
    (entry / "blobs" / "abc.incomplete").write_bytes(b"half")


VARIANTS: dict[Callable[[Path], None], tuple[str | None, bool]] = {
    canonical: (None, True),
    hard_links: (None, True),
    plain_files: (None, True),
    wrong_blob_names: (None, True),
    newline: ("refs/main ends with a newline, which hides the entry; run: printf", True),
    no_refs: (None, False),
    invented_commit: (None, True),
    weights_missing: ("model.safetensors is a symlink to a missing file", False),
    bit_flip: ("model.safetensors is damaged: its content does not match blobs/", True),
    truncated: ("model.safetensors is cut off", False),
    pointer: ("model.safetensors is a git-LFS pointer", False),
    ref_to_nowhere: ("refs/main names the commit 222222222222, which has no snapshot", False),
    stray_refs: (None, True),
    newline_of_a_tag: ("refs/v1 ends with a newline, which hides the entry; run: printf", False),
    incomplete_left: (None, True),
}
"""How each variant is built, what verify says about it, and whether a run can start from it."""


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.__name__)
def test_hand_built_entry_is_verified_and_used_where_it_is_complete(
    variant: Callable[[Path], None], entry: Path, sockets: list
) -> None:
    told, usable = VARIANTS[variant]
    variant(entry)
    faults = list(verify_repo(REPO))
    assert (faults == []) if told is None else any(told in fault for fault in faults), faults

    need = Need("--model", REPO)
    assert usable is (not missing_from_cache(need) and not damaged_files(need))
    config = ModelConfig("user/tiny")
    if usable:
        model, _ = build_model(config, ["a", "b"], load_tokenizer(config))
        assert model.config.num_labels == 2
    else:
        with pytest.raises(UserError, match="--model user/tiny could not be loaded") as refused:
            build_model(config, ["a", "b"], load_tokenizer(config))
        assert "python hub.py import FOLDER --repo_id user/tiny" in str(refused.value)
    assert sockets == []


def test_verify_names_a_missing_shard_and_its_model(entry: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (snapshot(entry) / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot(entry) / "model.safetensors").rename(snapshot(entry) / "model-00001-of-00002.safetensors")
    assert list(verify_repo(REPO)) == [f"user/tiny@{COMMIT[:12]}: model-00002-of-00002.safetensors is missing"]


def test_plain_files_are_compared_with_the_list_of_all_files(entry: Path, roberta: Path) -> None:
    tree = {name: tree_entry(name, data) for name, data in repository_files(roberta).items()}
    (entry / "trees").mkdir()
    (entry / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": tree}))
    plain_files(entry)
    assert list(verify_repo(REPO)) == []
    path = snapshot(entry) / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert list(verify_repo(REPO)) == [
        f"user/tiny@{COMMIT[:12]}: model.safetensors is damaged: its content does not match the repository's list of files"
    ]


def test_list_of_all_files_tells_what_a_partial_snapshot_lacks(entry: Path, roberta: Path) -> None:
    tree = {name: tree_entry(name, data) for name, data in repository_files(roberta).items()}
    tree |= {name: tree_entry(name, b"{}") for name in ("vocab.json", "merges.txt", "README.md", "flax_model.msgpack")}
    (entry / "trees").mkdir()
    (entry / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": tree}))
    assert missing_from_cache(Need("--model", REPO)) == ["merges.txt", "vocab.json"]


def test_snapshot_is_found_by_branch_and_by_commit(entry: Path) -> None:
    (entry / "refs" / "pr").mkdir()
    (entry / "refs" / "pr" / "1").write_text(COMMIT)
    for revision in (None, "main", "pr/1", COMMIT):
        assert find_snapshot(REPO, revision) == entry / "snapshots" / COMMIT
    for revision in ("other", "2" * 40, "../../x", COMMIT[:12]):
        assert find_snapshot(REPO, revision) is None


def test_pickled_weights_are_loaded_only_when_allowed(entry: Path, tmp_path: Path, roberta: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    shutil.copytree(roberta, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    tokenizer = load_tokenizer(ModelConfig(str(folder)))
    with pytest.raises(UserError, match="--allow_pickle"):
        build_model(ModelConfig(str(folder)), ["a", "b"], tokenizer)
    model, _ = build_model(ModelConfig(str(folder), allow_pickle=True), ["a", "b"], tokenizer)
    assert model.config.num_labels == 2


def test_remote_code_is_run_only_when_asked_for(tmp_path: Path, roberta: Path) -> None:
    folder = tmp_path / "coded"
    shutil.copytree(roberta, folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names, "model_type": "novel"}))
    marker = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise RuntimeError('ran')\n")
    with pytest.raises(UserError, match="--trust_remote_code"):
        build_model(ModelConfig(str(folder)), ["a", "b"], load_tokenizer(ModelConfig(str(roberta))))
    assert not marker.exists()
    with pytest.raises((RuntimeError, UserError)):
        build_model(ModelConfig(str(folder), trust_remote_code=True), ["a"], load_tokenizer(ModelConfig(str(roberta))))
    assert marker.exists()


def test_remote_code_of_a_hub_model_needs_a_pinned_commit() -> None:
    with pytest.raises(UserError, match="--trust_remote_code needs --model_revision COMMIT"):
        ModelConfig("user/tiny", trust_remote_code=True)
    with pytest.raises(UserError, match="the code on a branch can change"):
        ModelConfig("user/tiny", "main", trust_remote_code=True)
    assert ModelConfig("user/tiny", COMMIT, trust_remote_code=True).trust_remote_code


def shadow(entry: Path, name: str) -> str:
    """A stranger's snapshot beside the entry's, and a ref of a given name to it; returns the stranger's commit."""
    other = "3" * 40
    shutil.copytree(snapshot(entry), entry / "snapshots" / other, symlinks=True)
    (entry / "refs" / name).write_text(other)
    return other


def test_ref_with_the_name_of_a_commit_does_not_shadow_it(entry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shadow(entry, COMMIT)
    assert find_snapshot(REPO, COMMIT) == entry / "snapshots" / COMMIT
    assert resolve_model(ModelConfig("user/tiny", COMMIT)) == str(entry / "snapshots" / COMMIT)
    assert [fault for fault in verify_repo(REPO) if f"refs/{COMMIT}" in fault]
    ensure_cached([Need("--model", REPO, COMMIT)], HubConfig(), "http://127.0.0.1:9")
    assert COMMIT in capsys.readouterr().err


def test_missing_commit_is_not_replaced_by_what_a_ref_of_its_name_names(entry: Path) -> None:
    missing = "4" * 40
    shadow(entry, missing)
    with pytest.raises(UserError, match=r"not in the cache|neither"):
        load_tokenizer(ModelConfig("user/tiny", missing))
    with pytest.raises(UserError, match=r"not in the cache|neither"):
        build_model(ModelConfig("user/tiny", missing), ["a", "b"], None)


@pytest.mark.parametrize("name", [COMMIT[:7], COMMIT[:12], COMMIT.upper(), "4" * 39])
def test_ref_that_reads_as_another_commit_is_ignored(entry: Path, name: str) -> None:
    shadow(entry, name)
    assert find_snapshot(REPO, name) is None


def test_short_commit_and_date_are_refs(entry: Path) -> None:
    for name in (COMMIT[:7], "20240131"):
        (entry / "refs" / name).write_text(COMMIT)
        assert find_snapshot(REPO, name) == entry / "snapshots" / COMMIT


def test_branch_of_forty_letters_is_no_pinned_commit() -> None:
    with pytest.raises(UserError, match="--model_revision COMMIT"):
        ModelConfig("user/tiny", "x" * 40, trust_remote_code=True)


def coded(roberta: Path, folder: Path, *programs: str, prefix: str = "") -> Path:
    """A model whose configuration is made by code.py, which writes `program`."""
    shutil.copytree(roberta, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": f"{prefix}code_of_it.Config"}, "model_type": "novel"}
    (folder / "config.json").write_text(json.dumps(config))
    head = "from transformers import RobertaConfig\n"
    (folder / "code_of_it.py").write_text(
        "".join([head, *programs, "\nclass Config(RobertaConfig):\n    model_type = 'novel'\n"])
    )
    return folder


def test_code_of_another_repository_is_refused(roberta: Path, tmp_path: Path) -> None:
    folder = coded(roberta, tmp_path / "coded", prefix="user/other--")
    with pytest.raises(UserError, match="user/other"):
        load_hf_config(ModelConfig(str(folder), trust_remote_code=True))


def test_code_in_a_shared_folder_of_modules_is_not_run(
    roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, shared = coded(roberta, tmp_path / "coded", "WHO = 'mine'\n"), tmp_path / "shared"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(shared))
    monkeypatch.setattr(sys, "path", [*sys.path])
    AutoConfig.from_pretrained(folder, trust_remote_code=True)  # another program, which uses the shared folder
    (copy,) = shared.rglob("code_of_it.py")
    times = (folder / "code_of_it.py").stat()
    copy.write_text(copy.read_text().replace("'mine'", "'evil'"))
    os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))
    for name in [name for name in sys.modules if "code_of_it" in name]:
        del sys.modules[name]
    use_own_modules.cache_clear()
    hf_config = load_hf_config(ModelConfig(str(folder), trust_remote_code=True))
    assert sys.modules[type(hf_config).__module__].WHO == "mine"
