"""Models of ModelScope: downloaded once, recorded with their hashes, and a time limit for the server.

The package itself is not installed here: a function that downloads in the same way stands for it.
"""

import json
import sys
import types
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

import pytest

from lib.config.sections import HubConfig, ModelConfig
from lib.errors import UserError
from lib.hub.cache.layout import Repo
from lib.hub.fetch import ensure_cached
from lib.hub.needs import Need
from lib.model.load import load_tokenizer
from lib.model.source import model_origin, resolve_model
from tests.loopback_hub import closed_endpoint, loopback_hub, repository_files

NEED = Need("--model", Repo("user/tiny"), "master", "modelscope")
MODEL = ModelConfig("user/tiny", source="modelscope")
pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`modelscope.hub.snapshot_download.snapshot_download`, downloading to a cache below `tmp_path`."""
    import os

    def snapshot_download(model_id: str, revision: str, allow_patterns: list[str]) -> str:
        folder = tmp_path / "modelscope" / "models" / model_id.replace("/", "--") / "snapshots" / revision
        folder.mkdir(parents=True)
        for name in allow_patterns:
            place = f"{os.environ['MODELSCOPE_ENDPOINT']}/api/v1/models/{model_id}/repo?FilePath={quote(name)}"
            with urlopen(place) as answer:
                (folder / name).write_bytes(answer.read())
        return str(folder)

    for name in ("modelscope", "modelscope.hub", "modelscope.hub.snapshot_download"):
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))


def test_model_is_downloaded_once_and_recorded_with_revision_and_hashes(
    served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (served / "models" / "user" / "tiny" / "code.py").write_text("raise SystemExit")
    with loopback_hub(served) as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.endpoint)
        ensure_cached([NEED], HubConfig(), "http://127.0.0.1:9")
        asked = len(hub.requests)
        ensure_cached([NEED], HubConfig(verify_hashes=True), "http://127.0.0.1:9")
        assert len(hub.requests) == asked
        assert hub.tokens == []
    folder = Path(resolve_model(MODEL))
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(repository_files(folder)) == names
    origin = model_origin(MODEL)
    assert (origin["model_source"], origin["model_commit"]) == (hub.endpoint, "master")
    assert len(origin["model_sha256"]) == 64
    assert load_tokenizer(MODEL)("film").input_ids

    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    with pytest.raises(UserError, match=r"altered since the download: model\.safetensors"):
        ensure_cached([NEED], HubConfig(verify_hashes=True), "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("hang", "did not answer within 0.7 seconds"),
        ("html", "the page of a login portal"),
        ("503", "answered 503"),
        (None, "answered 404: no such model or revision"),
    ],
)
def test_missing_model_is_reported_with_the_way_to_carry_it(
    fault: str | None, told: str, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = Need("--model", Repo("user/nothing"), "master", "modelscope")
    with loopback_hub(served, fault) as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.endpoint)
        with pytest.raises(UserError, match=f"(?s){told}.*python hub.py import FOLDER --repo_id user/nothing"):
            ensure_cached([lost], HubConfig(hub_timeout=0.7), hub.endpoint)


def test_damaged_files_are_reported_and_not_recorded(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = served / "models" / "user" / "tiny" / "config.json"
    path.write_text(json.dumps({"cut": "off"})[:-4])
    with loopback_hub(served) as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.endpoint)
        with pytest.raises(UserError, match=r"config\.json is not JSON"):
            ensure_cached([NEED], HubConfig(), hub.endpoint)
    with pytest.raises(UserError, match="not on this machine yet"):
        resolve_model(MODEL)


def test_offline_variable_holds_for_modelscope_too(sockets: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE=1 forbids to request it"):
        ensure_cached([NEED], HubConfig(), closed_endpoint())
    assert sockets == []


def test_missing_package_is_reported_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "modelscope")
    with pytest.raises(UserError, match=r'pip install -e "\.\[modelscope\]"'):
        ensure_cached([NEED], HubConfig(), closed_endpoint())
