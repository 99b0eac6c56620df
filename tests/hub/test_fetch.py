"""Fetching: requests end within their limit, each fault has its own message, and no damaged file enters the cache."""

import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants, errors, get_session

from lib.config.eval import EvalModel
from lib.config.predict import PredictModel
from lib.config.sections import DataConfig, HubConfig, ModelConfig, ModelSource
from lib.data.catalog import data_needs
from lib.errors import UserError
from lib.hub import client
from lib.hub import download as hub_download
from lib.hub import fetch as hub_fetch
from lib.hub.cache.layout import Repo, find_snapshot, snapshot_files
from lib.hub.cache.publish import locks_folder
from lib.hub.cache.verify import verify_repo
from lib.hub.client import Fault, call_with_timeout, map_in_threads, request_listing, request_listings
from lib.hub.endpoint import configure_endpoint, go_offline
from lib.hub.fetch import ensure_cached
from lib.hub.needs import Need, check_names, config_patterns, is_lost_folder, model_needs
from lib.run.finished import find_model
from tests.conftest import ROOT
from tests.hub_layouts import COMMIT, cache_of_another_machine, share_blobs
from tests.loopback_hub import FAULTS, closed_endpoint, commit_of, loopback_hub, repository_files
from tests.predicting import answers

MODEL = Need("--model", Repo("user/tiny"))
DATA = Need("--dataset", Repo("SetFit/sst5", "dataset"))
TOKEN = "hf_" + "Secret" * 6
pytestmark = pytest.mark.usefixtures("empty_cache")


def left_behind(folder: Path) -> list[str]:
    """Files of a cache, without locks and drafts."""
    return [path.name for path in folder.rglob("*") if path.is_file() and ".locks" not in path.parts]


TOLD = {
    "refuse": "refuses the connection",
    "hang": "did not answer within 1.5 seconds (--hub_timeout)",
    "slow": "did not answer within 1.5 seconds (--hub_timeout)",
    "401": "answered 401: user/tiny does not exist there, or is private and needs a token",
    "403": "answered 403: access to user/tiny is forbidden",
    "429": "answered 429: too many requests for now",
    "503": "answered 503: it is out of service for now",
    "html": "did not answer as a Hub does; the answer may be the page of a login portal",
    "portal": "did not answer as a Hub does; the answer may be the page of a login portal",
    "gated": "gives user/tiny only to users who accepted its terms",
    "broken_off": "broke off in the middle of a file",
    "short": "model.safetensors is cut off, or not a safetensors file",
    "flipped": "model.safetensors is not the file that its source names",
    "pointer": "model.safetensors is a git-LFS pointer",
}


def command(script: str, endpoint: str, folder: Path, *flags: str, **environment: str) -> str:
    """stderr of a script that must end with code 2, without a traceback, long before a hanging server answers."""
    settings = {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"} | environment
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--model", "user/tiny", *flags],
        env=os.environ | settings,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_every_fault_of_the_loopback_hub_has_its_message() -> None:
    assert {*FAULTS, "refuse"} == set(TOLD)
    # "hang" and "slow" have the same message, and so have "html" and "portal".
    assert len(set(TOLD.values())) == len(TOLD) - 2


@pytest.mark.parametrize("fault", [fault for fault in TOLD if fault != "broken_off"])
def test_fault_of_the_hub_ends_train_with_its_own_message(fault: str, served: Path, tmp_path: Path) -> None:
    with loopback_hub(served, None if fault == "refuse" else fault) as hub:
        endpoint = closed_endpoint() if fault == "refuse" else hub.endpoint
        told = command("train.py", endpoint, tmp_path, "--hub_timeout", "1.5", HF_TOKEN=TOKEN)
    assert TOLD[fault] in told
    assert endpoint in told
    assert "python hub.py doctor --model user/tiny" in told
    assert "user/tiny" in told.splitlines()[0] or "fetching" in told.splitlines()[0]
    assert left_behind(tmp_path / "hf") == []
    assert hub.tokens == []
    assert TOKEN not in told


def test_fault_of_the_hub_ends_eval_with_its_own_message(served: Path, tmp_path: Path) -> None:
    with loopback_hub(served, "503") as hub:
        told = command("eval.py", hub.endpoint, tmp_path, "--dataset", "sst5")
    assert "answered 503" in told
    assert "python hub.py import FOLDER --repo_id user/tiny" in told


def test_fault_of_the_hub_ends_predict_with_its_own_message(served: Path, tmp_path: Path) -> None:
    with loopback_hub(served, "gated") as hub:
        told = command("predict.py", hub.endpoint, tmp_path, "a text")
        assert "only to users who accepted its terms" in told
        assert "hf auth login" in told
        assert "--send_token_to_mirror True" in told
        assert "python hub.py doctor --model user/tiny" in told


def test_missing_folder_is_not_requested_from_the_hub(tmp_path: Path) -> None:
    lost = ModelSource(str(tmp_path / "lost"))
    assert is_lost_folder(lost.model)
    with pytest.raises(UserError, match="lost: no such folder"):
        find_model(lost, "no")


def test_predict_needs_a_model_under_the_same_conditions_as_train() -> None:
    (need,) = model_needs(PredictModel("user/tiny", COMMIT, trust_remote_code=True))
    assert (need.repo, need.revision, need.code, need.allow_pickle) == (MODEL.repo, COMMIT, True, False)
    assert model_needs(PredictModel("minilm")) == []
    for kind in (PredictModel, EvalModel, ModelConfig):
        with pytest.raises(UserError, match="--trust_remote_code needs --model_revision COMMIT"):
            kind("user/tiny", "main", trust_remote_code=True)


def test_predict_loads_pickled_weights_only_when_allowed(served: Path) -> None:
    from transformers import AutoModel

    repository = served / "models" / "user" / "tiny"
    torch.save(AutoModel.from_pretrained(repository).state_dict(), repository / "pytorch_model.bin")
    (repository / "model.safetensors").unlink()
    flags = ["a film", "--model", repository, "--task", "feature-extraction"]
    with pytest.raises(UserError, match="--allow_pickle"):
        answers(*flags)
    assert len(answers(*flags, "--allow_pickle", "True")) == 1


def test_offline_with_an_empty_cache_reports_what_is_missing_and_where_it_was_looked_for(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    told = command("train.py", "http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    cpu_seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before  # the same on a busy machine
    assert cpu_seconds < 5
    assert "HF_HUB_OFFLINE=1 forbids requests to the Hub" in told
    assert "missing:    all of it" in told
    assert "looked in:  hf/hub/models--user--tiny/snapshots (revision main)" in told


def test_secret_among_the_flags_is_refused_and_not_printed(tmp_path: Path) -> None:
    told = command("train.py", "http://127.0.0.1:9", tmp_path, "--notes", f"with {TOKEN}")
    assert "a secret does not belong on the command line" in told
    assert TOKEN not in told
    address = "http://me:password@127.0.0.1:9"
    assert "password@" not in command("train.py", "", tmp_path, "--hub_endpoint", address)
    told = command("train.py", address, tmp_path)
    assert "refuses the connection" in told
    assert "password@" not in told


def test_needs_are_the_repositories_of_model_and_data_set() -> None:
    assert model_needs(ModelConfig()) + data_needs(DataConfig()) == []
    (model,), (data,) = model_needs(ModelConfig("user/tiny", "v1")), data_needs(DataConfig(dataset="mrpc"))
    assert (str(model.repo), model.revision) == ("user/tiny", "v1")
    assert (str(data.repo), data.dataset_config) == ("datasets/nyu-mll/glue", "mrpc")
    assert model_needs(ModelConfig(str(ROOT))) + data_needs(DataConfig(train_file="x.csv")) == []
    with pytest.raises(UserError, match=r"--model \./nowhere: no such folder"):
        check_names(model_needs(ModelConfig("./nowhere")))


def test_second_run_sends_one_request_for_each_repository_and_downloads_nothing(served: Path) -> None:
    with loopback_hub(served) as hub:
        ensure_cached([MODEL, DATA], HubConfig(), hub.endpoint)
        assert hub.downloads
        before = len(hub.requests)
        ensure_cached([MODEL, DATA], HubConfig(), hub.endpoint)
        asked = hub.requests[before:]
    assert sorted(asked) == ["/api/datasets/SetFit/sst5/revision/main", "/api/models/user/tiny/revision/main"]
    for need in (MODEL, DATA):
        snapshot = find_snapshot(need.repo)
        assert snapshot is not None
        assert repository_files(snapshot) == repository_files(served / f"{need.repo.repo_type}s" / need.repo.repo_id)
        assert list(verify_repo(need.repo)) == []


def test_new_commit_of_a_branch_is_fetched_and_the_old_one_kept(served: Path) -> None:
    repository = served / "models" / "user" / "tiny"
    with loopback_hub(served) as hub:
        ensure_cached([MODEL], HubConfig(), hub.endpoint)
        first = commit_of(repository)
        (repository / "vocab.txt").write_text("new")
        ensure_cached([MODEL], HubConfig(), hub.endpoint)
    snapshot = find_snapshot(MODEL.repo)
    assert snapshot is not None
    assert snapshot.name == commit_of(repository) != first
    assert find_snapshot(MODEL.repo, first) is not None


def test_complete_pinned_commit_needs_no_request(served: Path, sockets: list) -> None:
    cache_of_another_machine(served / "models" / "user" / "tiny", MODEL.repo.folder)
    pinned = Need("--model", MODEL.repo, COMMIT)
    ensure_cached([pinned], HubConfig(), "http://127.0.0.1:9")
    assert sockets == []


@pytest.mark.parametrize("fault", ["hang", "401", "503", "html", "gated"])
def test_fault_with_a_complete_cache_costs_a_warning(
    fault: str, served: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with loopback_hub(served) as hub:
        ensure_cached([MODEL, DATA], HubConfig(), hub.endpoint)
        hub.fault = fault
        capsys.readouterr()
        ensure_cached([MODEL, DATA], HubConfig(hub_timeout=0.7), hub.endpoint)
    told = capsys.readouterr().err
    assert told.count("is read from the cache (commit ") == 2
    assert told.startswith("warning: the Hub at ")


def test_all_missing_repositories_are_reported_before_any_download(served: Path) -> None:
    nowhere = Need("--dataset", Repo("nobody/nothing", "dataset"))
    with loopback_hub(served) as hub:
        with pytest.raises(UserError, match="has no datasets/nobody/nothing"):
            ensure_cached([MODEL, nowhere], HubConfig(), hub.endpoint)
        assert hub.downloads == []
        hub.fault = "503"
        with pytest.raises(UserError, match=r"(?s)--model user/tiny could .*--dataset SetFit/sst5 could "):
            ensure_cached([MODEL, DATA], HubConfig(), hub.endpoint)


def test_offline_variable_opens_no_socket(served: Path, sockets: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE=1 forbids requests to the Hub"):
        ensure_cached([MODEL], HubConfig(), "http://127.0.0.1:9")
    cache_of_another_machine(served / "models" / "user" / "tiny", MODEL.repo.folder)
    ensure_cached([MODEL], HubConfig(), "http://127.0.0.1:9")
    assert sockets == []


def test_go_offline_stops_every_library_from_asking_the_hub(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with loopback_hub(served) as hub:
        go_offline()
        with pytest.raises(errors.OfflineModeIsEnabled):
            get_session().get(f"{hub.endpoint}/api/models/user/tiny")
        assert hub.requests == []
    assert datasets.config.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_only_the_first_process_of_a_machine_asks_the_hub(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with loopback_hub(served) as hub:
        hub_fetch.fetch([MODEL], HubConfig(hub_endpoint=hub.endpoint))
        assert hub.requests == []


def test_stalled_download_is_given_up(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_download, "STALL_SECONDS", 0.7)
    with (
        loopback_hub(served, "hang", on_files=True) as hub,
        pytest.raises(UserError, match=r"sent nothing for 0\.7 seconds"),
    ):
        ensure_cached([MODEL], HubConfig(), hub.endpoint)
    assert find_snapshot(MODEL.repo) is None


def test_slow_download_is_not_given_up(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library writes chunks of 10 MiB: on a line of 300 KB/s one of them takes longer than STALL_SECONDS."""
    monkeypatch.setattr(hub_download, "STALL_SECONDS", 0.6)
    monkeypatch.setattr(hub_download, "CHUNK_SIZE", 2**10)
    with loopback_hub(served) as hub:
        hub.rate = 25_000
        ensure_cached([MODEL], HubConfig(), hub.endpoint)
    assert find_snapshot(MODEL.repo) is not None


def test_broken_download_continues_where_it_stopped(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_download, "CHUNK_SIZE", 2**10)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the library waits between its attempts
    size = (served / "models" / "user" / "tiny" / "model.safetensors").stat().st_size
    with loopback_hub(served, "broken_off") as hub:
        with pytest.raises(UserError, match=f"{TOLD['broken_off']}.*what was downloaded is kept"):
            ensure_cached([MODEL], HubConfig(), hub.endpoint)
        assert find_snapshot(MODEL.repo) is None
        hub.fault, before = None, len(hub.downloads)
        hub.ranges.clear()
        ensure_cached([MODEL], HubConfig(), hub.endpoint)
        assert hub.ranges == [f"bytes={size // 2 // 2**10 * 2**10}-"]
        assert len(hub.downloads) - before <= 4
    snapshot = find_snapshot(MODEL.repo)
    assert snapshot is not None
    assert repository_files(snapshot) == repository_files(served / "models" / "user" / "tiny")
    assert not list((snapshot.parents[2] / ".locks").rglob("fetch-*/*"))


def test_partial_download_of_another_commit_is_removed(served: Path) -> None:
    old = locks_folder(MODEL.repo) / f"fetch-{COMMIT}"
    old.mkdir(parents=True)
    (old / "model.safetensors.incomplete").write_bytes(b"half")
    with loopback_hub(served) as hub:
        ensure_cached([MODEL], HubConfig(), hub.endpoint)
    assert not old.exists()


def test_renamed_repository_is_found_under_its_old_name(served: Path) -> None:
    """The Hub redirects roberta-base to FacebookAI/roberta-base."""
    old = Need("--model", Repo("tiny-old"))
    with loopback_hub(served) as hub:
        hub.moved = {"tiny-old": "user/tiny"}
        ensure_cached([old], HubConfig(), hub.endpoint)
    assert find_snapshot(old.repo) is not None


def test_runs_at_the_same_time_download_once(served: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from lib.config.sections import *; from lib.hub.cache.layout import Repo; from lib.hub.needs import Need\n"
        "from lib.hub.fetch import ensure_cached; ensure_cached([Need('--model', Repo('user/tiny'))], HubConfig(), sys.argv[1])"
    )
    with loopback_hub(served) as hub:
        environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "both"), "HF_ENDPOINT": hub.endpoint}
        runs = [
            subprocess.Popen([sys.executable, "-c", program, hub.endpoint], cwd=ROOT, env=environment) for _ in range(3)
        ]
        assert [run.wait(timeout=60) for run in runs] == [0, 0, 0]
        gets = [path for path in hub.downloads if path.endswith("model.safetensors")]
    assert len(gets) == 1


@pytest.mark.parametrize("send", [False, True])
def test_mirror_gets_the_token_only_when_asked(send: bool, served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with loopback_hub(served) as hub:
        ensure_cached([MODEL], HubConfig(send_token_to_mirror=send), hub.endpoint)
        assert hub.downloads
        assert (f"Bearer {TOKEN}" in hub.tokens) is send
        assert bool(hub.tokens) is send


def test_token_is_not_sent_to_the_server_of_a_redirect(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with loopback_hub(served) as hub, loopback_hub(served) as store:
        hub.elsewhere = store.endpoint.replace("127.0.0.1", "localhost")
        ensure_cached([MODEL], HubConfig(send_token_to_mirror=True), hub.endpoint)
        assert hub.tokens
        assert store.downloads
        assert store.tokens == []


@pytest.mark.parametrize("commit", ["../../../../evil", "main", "x" * 40])
def test_mirror_with_an_invalid_commit_is_refused(commit: str, served: Path) -> None:
    with loopback_hub(served) as hub:
        hub.commit = commit
        with pytest.raises(UserError, match="did not answer as a Hub does"):
            ensure_cached([MODEL], HubConfig(), hub.endpoint)
        assert hub.downloads == []


@pytest.mark.parametrize("send", [False, True])
def test_libraries_send_the_token_to_a_mirror_only_when_asked(
    send: bool, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with loopback_hub(served) as hub:
        configure_endpoint(hub.endpoint, send)
        HfApi(endpoint=hub.endpoint).model_info("user/tiny")
        assert hub.requests
        assert bool(hub.tokens) is send


def test_verify_hashes_finds_a_flipped_bit_in_a_complete_cache(served: Path) -> None:
    with loopback_hub(served) as hub:
        ensure_cached([MODEL], HubConfig(), hub.endpoint)
        snapshot = find_snapshot(MODEL.repo)
        assert snapshot is not None
        blob = (snapshot / "model.safetensors").resolve()
        data = blob.read_bytes()
        blob.unlink()
        blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        ensure_cached([MODEL], HubConfig(), hub.endpoint)
        with pytest.raises(UserError, match=r"model\.safetensors does not match its hash"):
            ensure_cached([MODEL], HubConfig(verify_hashes=True), hub.endpoint)


def test_verify_hashes_accepts_shared_blobs_and_finds_damage_in_them(served: Path) -> None:
    """huggingface_hub makes such a blob a link to a file of another name; a cache of its own need not list all files."""
    cache_of_another_machine(served / "models" / "user" / "tiny", MODEL.repo.folder)
    share_blobs(MODEL.repo.folder.parent)
    needs, checked = [Need("--model", MODEL.repo, COMMIT)], HubConfig(verify_hashes=True)
    ensure_cached(needs, checked, "http://127.0.0.1:9")
    blob = (MODEL.repo.folder / "snapshots" / COMMIT / "model.safetensors").resolve()
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=r"model\.safetensors"):
        ensure_cached(needs, checked, "http://127.0.0.1:9")


def test_mirror_with_other_contents_than_the_hub_is_refused(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(served, tmp_path / "mirrored")
    weights = tmp_path / "mirrored" / "models" / "user" / "tiny" / "model.safetensors"
    commit = commit_of(served / "models" / "user" / "tiny")
    with loopback_hub(served) as hub, loopback_hub(tmp_path / "mirrored") as mirror:
        monkeypatch.setattr(hub_fetch, "OFFICIAL", hub.endpoint)
        ensure_cached([MODEL], HubConfig(verify_hashes=True), mirror.endpoint)  # an honest mirror

        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
        mirror.commit = commit
        with pytest.raises(UserError, match=r"the mirror lists other contents than the Hub for model\.safetensors"):
            ensure_cached([MODEL], HubConfig(verify_hashes=True), mirror.endpoint)
        mirror.commit = "2" * 40
        with pytest.raises(UserError, match="the mirror names the commit 222222222222, which the Hub does not have"):
            ensure_cached([MODEL], HubConfig(verify_hashes=True), mirror.endpoint)
        monkeypatch.setattr(hub_fetch, "OFFICIAL", closed_endpoint())
        mirror.commit = None
        ensure_cached([MODEL], HubConfig(verify_hashes=True), mirror.endpoint)
    assert "hashes are compared with those of the mirror alone" in capsys.readouterr().err


def test_one_set_of_weights_is_downloaded_and_no_code_or_pickle(served: Path) -> None:
    repository = served / "models" / "user" / "tiny"
    for name in ("pytorch_model.bin", "flax_model.msgpack", "model.fp16.safetensors", "code.py", "onnx/model.onnx"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(b"not wanted")
    with loopback_hub(served) as hub:
        ensure_cached([MODEL], HubConfig(), hub.endpoint)
    snapshot = find_snapshot(MODEL.repo)
    assert snapshot is not None
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(snapshot_files(snapshot)) == names


def test_model_with_pickled_weights_only_is_refused_before_the_download(served: Path) -> None:
    repository = served / "models" / "user" / "tiny"
    (repository / "model.safetensors").rename(repository / "pytorch_model.bin")
    with loopback_hub(served) as hub:
        with pytest.raises(UserError, match=r"has pickled weights only .*--allow_pickle"):
            ensure_cached([MODEL], HubConfig(), hub.endpoint)
        assert hub.downloads == []


def test_only_the_chosen_configuration_of_a_data_set_is_downloaded(served: Path) -> None:
    repository = served / "datasets" / "user" / "many"
    for name in ("mrpc/train.csv", "mrpc/test.csv", "cola/train.csv"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text("text,label\na,0\nb,1\n")
    (repository / "many.py").write_text("raise SystemExit('a program')")
    configs = [
        {
            "config_name": "mrpc",
            "data_files": [{"split": "train", "path": "mrpc/train*"}, {"split": "test", "path": ["mrpc/test.csv"]}],
        },
        {"config_name": "cola", "data_dir": "cola"},
    ]
    (repository / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    need = Need("--dataset", Repo("user/many", "dataset"), dataset_config="mrpc")
    with loopback_hub(served) as hub:
        for chosen, told in ((None, "choose one with --dataset_config: mrpc, cola"), ("mnli", "has mrpc, cola")):
            with pytest.raises(UserError, match=told):
                ensure_cached([Need("--dataset", need.repo, dataset_config=chosen)], HubConfig(), hub.endpoint)
        ensure_cached([need], HubConfig(), hub.endpoint)
        ensure_cached([need], HubConfig(), hub.endpoint)
    snapshot = find_snapshot(need.repo)
    assert snapshot is not None
    assert set(snapshot_files(snapshot)) == {"README.md", "mrpc/train.csv", "mrpc/test.csv"}

    from lib.data.sources import load_raw

    splits = load_raw(DataConfig(dataset="user/many", dataset_config="mrpc"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 2, "test": 2}


def test_data_set_made_by_a_script_is_refused(served: Path) -> None:
    repository = served / "datasets" / "user" / "script"
    repository.mkdir(parents=True)
    (repository / "script.py").write_text("raise SystemExit('a program')")
    with loopback_hub(served) as hub, pytest.raises(UserError, match="made by a program, which is not run"):
        ensure_cached([Need("--dataset", Repo("user/script", "dataset"))], HubConfig(), hub.endpoint)


@pytest.mark.parametrize(
    ("card", "patterns"),
    [
        (None, None),
        ({"configs": []}, None),
        ({"configs": [{"config_name": "default", "data_files": "a/*.csv"}]}, ["a/*.csv"]),
        ({"configs": [{"config_name": "one", "data_dir": "./x/", "data_files": ["t.csv"]}]}, ["x/t.csv"]),
        ({"configs": [{"config_name": "a"}, {"config_name": "b", "default": True, "data_dir": "b"}]}, ["b/*"]),
    ],
)
def test_readme_metadata_gives_the_files_of_a_configuration(card: dict | None, patterns: list[str] | None) -> None:
    assert config_patterns(DATA, card) == patterns


def test_call_that_is_late_is_given_up_while_it_still_runs() -> None:
    ended = threading.Event()
    with pytest.raises(TimeoutError):
        call_with_timeout(lambda: ended.wait(60), is_late=lambda: True)
    ended.set()
    assert call_with_timeout(lambda: 7, is_late=lambda: False) == 7
    with pytest.raises(KeyError):
        call_with_timeout(lambda: {}["x"], is_late=lambda: False)


def test_repositories_are_asked_about_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = threading.Barrier(2)
    monkeypatch.setattr(client, "request_listing", lambda *_: meeting.wait(timeout=60))
    assert sorted(request_listings([(MODEL.repo, "main"), (DATA.repo, "main")], "http://hub.invalid", 5)) == [0, 1]


def test_time_limit_includes_the_name_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(60))
    answer = request_listing(MODEL.repo, "main", "http://hub.invalid", 0.5)
    answered.set()
    assert isinstance(answer, Fault)
    assert answer.kind == "silent"


def test_unknown_host_has_its_own_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    answer = request_listing(MODEL.repo, "main", "http://hub.invalid", 3)
    assert isinstance(answer, Fault)
    assert (answer.kind, "is not known to the name server" in answer.text) == ("dns", True)


def test_cache_that_cannot_be_written_is_reported(
    served: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with loopback_hub(served) as hub, pytest.raises(UserError, match=r"cannot be written.*set HF_HUB_CACHE to another"):
        ensure_cached([MODEL], HubConfig(), hub.endpoint)


def test_read_only_cache_serves_a_run_that_finds_its_model_there(
    served: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache of a group that one person fills, also after the Hub got a new commit."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with loopback_hub(served) as hub:
        ensure_cached([MODEL], HubConfig(), hub.endpoint)
        monkeypatch.setattr("huggingface_hub.utils.WeakFileLock", refuse)
        monkeypatch.setattr(hub_fetch, "write_atomically", refuse)
        capsys.readouterr()
        ensure_cached([MODEL], HubConfig(), hub.endpoint)
        assert capsys.readouterr().err == ""
        (served / "models" / "user" / "tiny" / "vocab.txt").write_text("new")
        ensure_cached([MODEL], HubConfig(), hub.endpoint)
        told = capsys.readouterr().err
        assert "cannot be written" in told
        assert "--model user/tiny is read from the cache (commit " in told
        with pytest.raises(UserError, match=r"(?s)cannot be written: .*Permission denied.*export HF_HUB_CACHE=FOLDER"):
            ensure_cached([DATA], HubConfig(), hub.endpoint)


def test_full_disk_is_reported_before_and_during_the_download(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from huggingface_hub import file_download

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with loopback_hub(served) as hub:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))  # type: ignore[attr-defined]
            with pytest.raises(UserError, match=r"0\.0 GB are to be downloaded, 0\.0 GB are free"):
                ensure_cached([MODEL], HubConfig(), hub.endpoint)
        assert hub.downloads == []
        monkeypatch.setattr(file_download, "http_get", full)
        with pytest.raises(UserError, match=r"(?s)No space left on device.*export HF_HUB_CACHE=FOLDER"):
            ensure_cached([MODEL], HubConfig(), hub.endpoint)


def test_dead_proxy_is_reported_as_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", closed_endpoint().replace("http://", "http://me:password@"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    answer = request_listing(MODEL.repo, "main", "http://hub.invalid", 3)
    assert isinstance(answer, Fault)
    assert answer.kind == "proxy"
    assert "the proxy http://***@127.0.0.1" in answer.text
    direct = request_listing(MODEL.repo, "main", closed_endpoint(), 3)
    assert isinstance(direct, Fault)
    assert direct.kind == "refused"


def test_model_of_the_same_name_in_the_cache_is_reported(served: Path) -> None:
    cache_of_another_machine(served / "models" / "user" / "tiny", Repo("FacebookAI/Tiny").folder)
    with pytest.raises(UserError, match=r"in cache:   FacebookAI/Tiny, which may be the same"):
        ensure_cached([Need("--model", Repo("tiny"))], HubConfig(), closed_endpoint())


def test_map_in_threads_returns_results_in_order_or_raises_the_first_error() -> None:
    assert map_in_threads(lambda number: number * 2, range(20), 3) == list(range(0, 40, 2))
    assert map_in_threads(str, [], 3) == []
    with pytest.raises(ZeroDivisionError):
        map_in_threads(lambda number: 1 // number, [1, 0, 2], 2)


def test_mirror_that_answers_a_pinned_commit_with_another_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = types.SimpleNamespace(sha="5" * 40, siblings=[])
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_, **__: answer)
    for revision, refused in ((COMMIT, True), (COMMIT[:7], True), ("5" * 40, False), ("v1", False)):
        found = request_listing(MODEL.repo, revision, "http://127.0.0.1:9", 1.0)
        assert isinstance(found, Fault) is refused


def test_verify_hashes_compares_a_pinned_commit_with_the_hub(served: Path) -> None:
    """A stranger's cache holds what its own hashes say."""
    repository = served / "models" / "user" / "tiny"
    commit, real = commit_of(repository), (repository / "config.json").read_text()
    (repository / "config.json").write_text(real.replace("{", '{"note": "other", ', 1))
    entry = cache_of_another_machine(repository, MODEL.repo.folder)
    (entry / "snapshots" / COMMIT).rename(entry / "snapshots" / commit)
    (repository / "config.json").write_text(real)
    pinned = Need("--model", MODEL.repo, commit)
    ensure_cached([pinned], HubConfig(), "http://127.0.0.1:9")
    with loopback_hub(served) as hub, pytest.raises(UserError, match=r"config\.json does not match its hash"):
        ensure_cached([pinned], HubConfig(verify_hashes=True), hub.endpoint)
