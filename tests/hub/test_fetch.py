"""Whether the Hub answers is decided in seconds, each fault has its own words, and nothing bad stays in the cache."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants, errors, get_session

from lib.config.eval import EvalModel
from lib.config.predict import PredictModel
from lib.config.sections import DataConfig, HubConfig, ModelConfig, ModelSource
from lib.data.catalog import data_needs
from lib.errors import UserError
from lib.hub import download as hub_download
from lib.hub import fetch as hub_fetch
from lib.hub.cache import publish as hub_publish
from lib.hub.cache.layout import Repo, find_snapshot, snapshot_files, verify_repo
from lib.hub.cache.publish import locks_folder
from lib.hub.client import Fault, ask, at_once, bounded
from lib.hub.endpoint import go_offline, settle_endpoint
from lib.hub.fetch import prepare
from lib.hub.needs import Need, check_names, config_patterns, is_lost_folder, model_needs
from lib.run.finished import find_model
from tests.conftest import ROOT
from tests.hub_layouts import COMMIT, cache_of_another_machine
from tests.loopback_hub import FAULTS, closed_endpoint, commit_of, loopback_hub, repository_files
from tests.predicting import answers

MODEL = Need("--model", Repo("user/tiny"))
DATA = Need("--dataset", Repo("SetFit/sst5", "dataset"))
TOKEN = "hf_" + "Secret" * 6
pytestmark = pytest.mark.usefixtures("empty_cache")


def left_behind(folder: Path) -> list[str]:
    """Files of a cache that a reader could meet."""
    return [path.name for path in folder.rglob("*") if path.is_file() and ".locks" not in path.parts]


# ---------------------------------------------------------------------------------------------------- real commands

TOLD = {
    "refuse": "refuses the connection",
    "hang": "did not answer within 1.5 seconds (--hub_timeout)",
    "slow": "did not answer within 1.5 seconds (--hub_timeout)",
    "401": "answered 401: user/tiny does not exist there, or is private and needs a token",
    "403": "answered 403: access to user/tiny is forbidden",
    "429": "answered 429: too many requests for now",
    "503": "answered 503: it is out of order for now",
    "html": "answered with something else, such as the page of a login portal",
    "portal": "answered with something else, such as the page of a login portal",
    "gated": "gives user/tiny only to users who accepted its terms",
    "broken_off": "broke off in the middle of a file",
    "short": "model.safetensors is cut off or altered: it has",
    "flipped": "model.safetensors is not the file that its source names",
    "pointer": "model.safetensors is a git-LFS pointer",
}


def command(script: str, endpoint: str, folder: Path, *flags: str, **environment: str) -> tuple[str, float]:
    """(what a script says on stderr, seconds) of a run that must end with code 2 and no trace."""
    settings = {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"} | environment
    started = time.monotonic()
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
    return done.stderr, time.monotonic() - started


def test_every_fault_of_the_loopback_hub_has_its_words() -> None:
    assert {*FAULTS, "refuse"} == set(TOLD)
    # To a waiting reader hanging and slow are the same, and so are a page and the way to it.
    assert len(set(TOLD.values())) == len(TOLD) - 2


@pytest.mark.parametrize("fault", [fault for fault in TOLD if fault != "broken_off"])
def test_a_fault_of_the_hub_ends_train_in_seconds_with_its_own_message(
    fault: str, served: Path, tmp_path: Path
) -> None:
    with loopback_hub(served, None if fault == "refuse" else fault) as hub:
        endpoint = closed_endpoint() if fault == "refuse" else hub.endpoint
        told, seconds = command("train.py", endpoint, tmp_path, "--hub_timeout", "1.5", HF_TOKEN=TOKEN)
    assert TOLD[fault] in told
    assert endpoint in told
    assert "python hub.py doctor --model user/tiny" in told
    assert "user/tiny" in told.splitlines()[0] or "fetching" in told.splitlines()[0]
    assert left_behind(tmp_path / "hf") == []
    assert hub.tokens == []
    assert TOKEN not in told
    assert seconds < 8


def test_eval_ends_in_the_same_way(served: Path, tmp_path: Path) -> None:
    with loopback_hub(served, "503") as hub:
        told, _ = command("eval.py", hub.endpoint, tmp_path, "--dataset", "sst5")
    assert "answered 503" in told
    assert "python hub.py import FOLDER --repo_id user/tiny" in told


def test_predict_ends_in_the_same_way(served: Path, tmp_path: Path) -> None:
    with loopback_hub(served, "gated") as hub:
        told, seconds = command("predict.py", hub.endpoint, tmp_path, "a text")
        assert "only to users who accepted its terms" in told
        assert "hf auth login" in told
        assert "--send_token_to_mirror True" in told
        assert "python hub.py doctor --model user/tiny" in told
    assert seconds < 5


def test_the_hub_is_not_asked_about_a_folder_that_is_lost(tmp_path: Path) -> None:
    lost = ModelSource(str(tmp_path / "lost"))
    assert is_lost_folder(lost.model)
    with pytest.raises(UserError, match="lost: no such folder"):
        find_model(lost, "no")


def test_predict_asks_for_a_model_with_the_same_trust_as_train() -> None:
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
    with pytest.raises(UserError, match=r"has pickled weights only .*--allow_pickle"):
        answers(*flags)
    assert len(answers(*flags, "--allow_pickle", "True")) == 1


def test_offline_and_empty_is_told_at_once_with_what_is_missing_and_where_it_was_looked_for(tmp_path: Path) -> None:
    told, seconds = command("train.py", "http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE=1 forbids to ask the Hub" in told
    assert "missing:    all of it" in told
    assert "looked in:  hf/hub/models--user--tiny/snapshots (revision main)" in told
    assert seconds < 5


def test_a_token_among_the_flags_is_refused_and_not_repeated(tmp_path: Path) -> None:
    told, _ = command("train.py", "http://127.0.0.1:9", tmp_path, "--notes", f"with {TOKEN}")
    assert "a secret does not belong on the command line" in told
    assert TOKEN not in told
    address = "http://me:password@127.0.0.1:9"
    assert "password@" not in command("train.py", "", tmp_path, "--hub_endpoint", address)[0]
    told, _ = command("train.py", address, tmp_path)
    assert "refuses the connection" in told
    assert "password@" not in told


# ---------------------------------------------------------------------------------------------------- decisions


def test_what_a_run_needs() -> None:
    assert model_needs(ModelConfig()) + data_needs(DataConfig()) == []
    (model,), (data,) = model_needs(ModelConfig("user/tiny", "v1")), data_needs(DataConfig(dataset="mrpc"))
    assert (str(model.repo), model.revision) == ("user/tiny", "v1")
    assert (str(data.repo), data.dataset_config) == ("datasets/nyu-mll/glue", "mrpc")
    assert model_needs(ModelConfig(str(ROOT))) + data_needs(DataConfig(train_file="x.csv")) == []
    with pytest.raises(UserError, match=r"--model \./nowhere: no such folder"):
        check_names(model_needs(ModelConfig("./nowhere")))


def test_what_is_needed_is_fetched_once_and_then_only_asked_about(served: Path) -> None:
    with loopback_hub(served) as hub:
        prepare([MODEL, DATA], HubConfig(), hub.endpoint)
        assert hub.downloads
        before = len(hub.requests)
        prepare([MODEL, DATA], HubConfig(), hub.endpoint)
        asked = hub.requests[before:]
    assert sorted(asked) == ["/api/datasets/SetFit/sst5/revision/main", "/api/models/user/tiny/revision/main"]
    for need in (MODEL, DATA):
        snapshot = find_snapshot(need.repo)
        assert snapshot is not None
        assert repository_files(snapshot) == repository_files(served / f"{need.repo.repo_type}s" / need.repo.repo_id)
        assert list(verify_repo(need.repo)) == []


def test_a_branch_that_moved_on_is_followed_and_its_old_commit_kept(served: Path) -> None:
    repository = served / "models" / "user" / "tiny"
    with loopback_hub(served) as hub:
        prepare([MODEL], HubConfig(), hub.endpoint)
        first = commit_of(repository)
        (repository / "vocab.txt").write_text("new")
        prepare([MODEL], HubConfig(), hub.endpoint)
    snapshot = find_snapshot(MODEL.repo)
    assert snapshot is not None
    assert snapshot.name == commit_of(repository) != first
    assert find_snapshot(MODEL.repo, first) is not None


def test_a_pinned_commit_that_is_whole_is_not_asked_for(served: Path, sockets: list) -> None:
    cache_of_another_machine(served / "models" / "user" / "tiny", MODEL.repo.folder)
    pinned = Need("--model", MODEL.repo, COMMIT)
    prepare([pinned], HubConfig(), "http://127.0.0.1:9")
    assert sockets == []


@pytest.mark.parametrize("fault", ["hang", "401", "503", "html", "gated"])
def test_with_a_full_cache_a_fault_costs_a_warning_and_seconds(
    fault: str, served: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with loopback_hub(served) as hub:
        prepare([MODEL, DATA], HubConfig(), hub.endpoint)
        hub.fault = fault
        capsys.readouterr()
        started = time.monotonic()
        prepare([MODEL, DATA], HubConfig(hub_timeout=0.7), hub.endpoint)
        assert time.monotonic() - started < 1.5  # both are asked at once
    told = capsys.readouterr().err
    assert told.count("is read from the cache (commit ") == 2
    assert told.startswith("warning: the Hub at ")


def test_what_neither_has_is_told_of_all_at_once_and_nothing_is_downloaded_before(served: Path) -> None:
    nowhere = Need("--dataset", Repo("nobody/nothing", "dataset"))
    with loopback_hub(served) as hub:
        with pytest.raises(UserError, match="has no datasets/nobody/nothing"):
            prepare([MODEL, nowhere], HubConfig(), hub.endpoint)
        assert hub.downloads == []
        hub.fault = "503"
        with pytest.raises(UserError, match=r"(?s)--model user/tiny could .*--dataset SetFit/sst5 could "):
            prepare([MODEL, DATA], HubConfig(), hub.endpoint)


def test_offline_asked_for_opens_no_socket_and_needs_no_answer(
    served: Path, sockets: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE=1 forbids to ask the Hub"):
        prepare([MODEL], HubConfig(), "http://127.0.0.1:9")
    cache_of_another_machine(served / "models" / "user" / "tiny", MODEL.repo.folder)
    prepare([MODEL], HubConfig(), "http://127.0.0.1:9")
    assert sockets == []


def test_after_the_decision_nobody_can_ask_the_hub(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with loopback_hub(served) as hub:
        go_offline()
        with pytest.raises(errors.OfflineModeIsEnabled):
            get_session().get(f"{hub.endpoint}/api/models/user/tiny")
        assert hub.requests == []
    assert datasets.config.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_only_the_first_process_of_a_machine_asks(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with loopback_hub(served) as hub:
        hub_fetch.fetch([MODEL], HubConfig(hub_endpoint=hub.endpoint))
        assert hub.requests == []


def test_a_download_that_stalls_is_given_up(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_download, "STALL_SECONDS", 0.7)
    with loopback_hub(served, "hang", on_files=True) as hub:
        started = time.monotonic()
        with pytest.raises(UserError, match=r"sent nothing for 0\.7 seconds"):
            prepare([MODEL], HubConfig(), hub.endpoint)
        assert time.monotonic() - started < 3
    assert find_snapshot(MODEL.repo) is None


def test_a_line_that_is_slow_but_alive_is_not_taken_for_a_dead_one(
    served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library reports, and writes, pieces of 10 MiB: on a line of 300 KB/s one takes longer than our patience."""
    monkeypatch.setattr(hub_download, "STALL_SECONDS", 0.6)
    monkeypatch.setattr(hub_download, "PIECE", 2**10)
    with loopback_hub(served) as hub:
        hub.rate = 25_000
        prepare([MODEL], HubConfig(), hub.endpoint)
    assert find_snapshot(MODEL.repo) is not None


def test_a_download_that_broke_off_goes_on_where_it_was(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_download, "PIECE", 2**10)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the library waits between its attempts
    size = (served / "models" / "user" / "tiny" / "model.safetensors").stat().st_size
    with loopback_hub(served, "broken_off") as hub:
        with pytest.raises(UserError, match=f"{TOLD['broken_off']}.*what came is kept"):
            prepare([MODEL], HubConfig(), hub.endpoint)
        assert find_snapshot(MODEL.repo) is None
        hub.fault, before = None, len(hub.downloads)
        hub.ranges.clear()
        prepare([MODEL], HubConfig(), hub.endpoint)
        assert hub.ranges == [f"bytes={size // 2 // 2**10 * 2**10}-"]
        assert len(hub.downloads) - before <= 4
    snapshot = find_snapshot(MODEL.repo)
    assert snapshot is not None
    assert repository_files(snapshot) == repository_files(served / "models" / "user" / "tiny")
    assert not list((snapshot.parents[2] / ".locks").rglob("fetch-*/*"))


def test_what_is_left_of_another_commit_is_removed(served: Path) -> None:
    old = locks_folder(MODEL.repo) / f"fetch-{COMMIT}"
    old.mkdir(parents=True)
    (old / "model.safetensors.incomplete").write_bytes(b"half")
    with loopback_hub(served) as hub:
        prepare([MODEL], HubConfig(), hub.endpoint)
    assert not old.exists()


def test_a_repository_that_has_moved_is_found_under_its_old_name(served: Path) -> None:
    """The Hub sends roberta-base on to FacebookAI/roberta-base."""
    old = Need("--model", Repo("tiny-old"))
    with loopback_hub(served) as hub:
        hub.moved = {"tiny-old": "user/tiny"}
        prepare([old], HubConfig(), hub.endpoint)
    assert find_snapshot(old.repo) is not None


def test_two_runs_at_once_download_once(served: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from lib.config.sections import *; from lib.hub.cache.layout import Repo; from lib.hub.needs import Need\n"
        "from lib.hub.fetch import prepare; prepare([Need('--model', Repo('user/tiny'))], HubConfig(), sys.argv[1])"
    )
    with loopback_hub(served) as hub:
        environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "both"), "HF_ENDPOINT": hub.endpoint}
        runs = [
            subprocess.Popen([sys.executable, "-c", program, hub.endpoint], cwd=ROOT, env=environment) for _ in range(3)
        ]
        assert [run.wait(timeout=60) for run in runs] == [0, 0, 0]
        gets = [path for path in hub.downloads if path.endswith("model.safetensors")]
    assert len(gets) == 1


# ---------------------------------------------------------------------------------------------------- tokens, hashes


@pytest.mark.parametrize("send", [False, True])
def test_a_mirror_gets_the_token_only_when_asked(send: bool, served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with loopback_hub(served) as hub:
        prepare([MODEL], HubConfig(send_token_to_mirror=send), hub.endpoint)
        assert hub.downloads
        assert (f"Bearer {TOKEN}" in hub.tokens) is send
        assert bool(hub.tokens) is send


def test_the_token_does_not_follow_a_file_to_another_server(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with loopback_hub(served) as hub, loopback_hub(served) as store:
        hub.elsewhere = store.endpoint.replace("127.0.0.1", "localhost")
        prepare([MODEL], HubConfig(send_token_to_mirror=True), hub.endpoint)
        assert hub.tokens
        assert store.downloads
        assert store.tokens == []


@pytest.mark.parametrize("commit", ["../../../../evil", "main", "x" * 40])
def test_a_mirror_cannot_choose_where_files_go(commit: str, served: Path) -> None:
    with loopback_hub(served) as hub:
        hub.commit = commit
        with pytest.raises(UserError, match="answered with something else"):
            prepare([MODEL], HubConfig(), hub.endpoint)
        assert hub.downloads == []


@pytest.mark.parametrize("send", [False, True])
def test_the_libraries_send_a_mirror_no_token_of_their_own(
    send: bool, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with loopback_hub(served) as hub:
        settle_endpoint(hub.endpoint, send)
        HfApi(endpoint=hub.endpoint).model_info("user/tiny")
        assert hub.requests
        assert bool(hub.tokens) is send


def test_verify_hashes_finds_a_flipped_bit_in_a_full_cache(served: Path) -> None:
    with loopback_hub(served) as hub:
        prepare([MODEL], HubConfig(), hub.endpoint)
        snapshot = find_snapshot(MODEL.repo)
        assert snapshot is not None
        blob = (snapshot / "model.safetensors").resolve()
        data = blob.read_bytes()
        blob.unlink()
        blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        prepare([MODEL], HubConfig(), hub.endpoint)
        with pytest.raises(UserError, match=r"model\.safetensors is not what its hash .* says"):
            prepare([MODEL], HubConfig(verify_hashes=True), hub.endpoint)


def test_a_mirror_with_other_contents_than_the_hub_is_not_used(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(served, tmp_path / "mirrored")
    weights = tmp_path / "mirrored" / "models" / "user" / "tiny" / "model.safetensors"
    commit = commit_of(served / "models" / "user" / "tiny")
    with loopback_hub(served) as hub, loopback_hub(tmp_path / "mirrored") as mirror:
        monkeypatch.setattr(hub_fetch, "OFFICIAL", hub.endpoint)
        prepare([MODEL], HubConfig(verify_hashes=True), mirror.endpoint)  # an honest mirror

        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
        mirror.commit = commit
        with pytest.raises(UserError, match=r"the mirror lists other contents than the Hub for model\.safetensors"):
            prepare([MODEL], HubConfig(verify_hashes=True), mirror.endpoint)
        mirror.commit = "2" * 40
        with pytest.raises(UserError, match="the mirror names the commit 222222222222, which the Hub does not have"):
            prepare([MODEL], HubConfig(verify_hashes=True), mirror.endpoint)
        monkeypatch.setattr(hub_fetch, "OFFICIAL", closed_endpoint())
        mirror.commit = None
        prepare([MODEL], HubConfig(verify_hashes=True), mirror.endpoint)
    assert "hashes are compared with those of the mirror alone" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- what is fetched


def test_weights_come_once_and_programs_and_pickles_not_at_all(served: Path) -> None:
    repository = served / "models" / "user" / "tiny"
    for name in ("pytorch_model.bin", "flax_model.msgpack", "model.fp16.safetensors", "code.py", "onnx/model.onnx"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(b"not wanted")
    with loopback_hub(served) as hub:
        prepare([MODEL], HubConfig(), hub.endpoint)
    snapshot = find_snapshot(MODEL.repo)
    assert snapshot is not None
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(snapshot_files(snapshot)) == names


def test_a_model_with_pickled_weights_only_is_refused_before_the_download(served: Path) -> None:
    repository = served / "models" / "user" / "tiny"
    (repository / "model.safetensors").rename(repository / "pytorch_model.bin")
    with loopback_hub(served) as hub:
        with pytest.raises(UserError, match=r"has pickled weights only .*--allow_pickle"):
            prepare([MODEL], HubConfig(), hub.endpoint)
        assert hub.downloads == []


def test_of_a_data_set_with_configurations_only_the_chosen_one_is_fetched(served: Path) -> None:
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
                prepare([Need("--dataset", need.repo, dataset_config=chosen)], HubConfig(), hub.endpoint)
        prepare([need], HubConfig(), hub.endpoint)
        prepare([need], HubConfig(), hub.endpoint)
    snapshot = find_snapshot(need.repo)
    assert snapshot is not None
    assert set(snapshot_files(snapshot)) == {"README.md", "mrpc/train.csv", "mrpc/test.csv"}

    from lib.data.sources import load_raw

    splits = load_raw(DataConfig(dataset="user/many", dataset_config="mrpc"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 2, "test": 2}


def test_a_data_set_made_by_a_program_is_refused(served: Path) -> None:
    repository = served / "datasets" / "user" / "script"
    repository.mkdir(parents=True)
    (repository / "script.py").write_text("raise SystemExit('a program')")
    with loopback_hub(served) as hub, pytest.raises(UserError, match="made by a program, which is not run"):
        prepare([Need("--dataset", Repo("user/script", "dataset"))], HubConfig(), hub.endpoint)


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
def test_the_head_of_a_readme_says_where_a_configuration_lies(card: dict | None, patterns: list[str] | None) -> None:
    assert config_patterns(DATA, card) == patterns


# ---------------------------------------------------------------------------------------------------- limits


def test_a_call_that_never_ends_is_left_after_the_limit() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        bounded(lambda: time.sleep(5), lambda: time.monotonic() - started > 0.3)
    assert time.monotonic() - started < 1
    assert bounded(lambda: 7, lambda: False) == 7
    with pytest.raises(KeyError):
        bounded(lambda: {}["x"], lambda: False)


def test_a_name_server_that_does_not_answer_is_covered_by_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(4))
    started = time.monotonic()
    answer = ask(MODEL.repo, "main", "http://hub.invalid", 0.5)
    assert isinstance(answer, Fault)
    assert answer.kind == "silent"
    assert time.monotonic() - started < 1.5


def test_a_name_that_nobody_knows_has_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    answer = ask(MODEL.repo, "main", "http://hub.invalid", 3)
    assert isinstance(answer, Fault)
    assert (answer.kind, "is not known to the name server" in answer.text) == ("dns", True)


def test_a_cache_that_cannot_be_written_is_named(served: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with loopback_hub(served) as hub, pytest.raises(UserError, match=r"cannot be written.*set HF_HUB_CACHE to another"):
        prepare([MODEL], HubConfig(), hub.endpoint)


def test_a_cache_that_may_only_be_read_serves_all_who_find_their_model_there(
    served: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache for the group, which one person fills: also on the day after the Hub got a new commit."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with loopback_hub(served) as hub:
        prepare([MODEL], HubConfig(), hub.endpoint)
        monkeypatch.setattr(hub_publish, "FileLock", refuse)
        monkeypatch.setattr(hub_fetch, "write_atomically", refuse)
        capsys.readouterr()
        prepare([MODEL], HubConfig(), hub.endpoint)
        assert capsys.readouterr().err == ""
        (served / "models" / "user" / "tiny" / "vocab.txt").write_text("new")
        prepare([MODEL], HubConfig(), hub.endpoint)
        told = capsys.readouterr().err
        assert "cannot be written" in told
        assert "--model user/tiny is read from the cache (commit " in told
        with pytest.raises(UserError, match=r"(?s)cannot be written: .*Permission denied.*export HF_HUB_CACHE=FOLDER"):
            prepare([DATA], HubConfig(), hub.endpoint)


def test_a_full_disk_is_told_before_the_download_and_during_it(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from huggingface_hub import file_download

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with loopback_hub(served) as hub:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))  # type: ignore[attr-defined]
            with pytest.raises(UserError, match=r"0\.0 GB are to be fetched, 0\.0 GB are free"):
                prepare([MODEL], HubConfig(), hub.endpoint)
        assert hub.downloads == []
        monkeypatch.setattr(file_download, "http_get", full)
        with pytest.raises(UserError, match=r"(?s)No space left on device.*export HF_HUB_CACHE=FOLDER"):
            prepare([MODEL], HubConfig(), hub.endpoint)


def test_a_dead_proxy_is_not_blamed_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", closed_endpoint().replace("http://", "http://me:password@"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    answer = ask(MODEL.repo, "main", "http://hub.invalid", 3)
    assert isinstance(answer, Fault)
    assert answer.kind == "proxy"
    assert "the proxy http://***@127.0.0.1" in answer.text
    direct = ask(MODEL.repo, "main", closed_endpoint(), 3)
    assert isinstance(direct, Fault)
    assert direct.kind == "refused"


def test_a_model_of_the_same_name_in_the_cache_is_mentioned(served: Path) -> None:
    cache_of_another_machine(served / "models" / "user" / "tiny", Repo("FacebookAI/Tiny").folder)
    with pytest.raises(UserError, match=r"there is:   FacebookAI/Tiny, which may be the same"):
        prepare([Need("--model", Repo("tiny"))], HubConfig(), closed_endpoint())


def test_work_that_is_shared_gives_all_results_in_order_or_the_first_error() -> None:
    assert at_once(lambda number: number * 2, range(20), 3) == list(range(0, 40, 2))
    assert at_once(str, [], 3) == []
    with pytest.raises(ZeroDivisionError):
        at_once(lambda number: 1 // number, [1, 0, 2], 2)
