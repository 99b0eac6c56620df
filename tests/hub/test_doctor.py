"""hub.py doctor: what prevents a run is reported, with the commands that fix it."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from lib.config.hub import DoctorConfig, ImportConfig
from lib.config.sections import DataConfig, HubConfig, ModelSource
from lib.data.catalog import data_needs
from lib.hub import advice, doctor
from lib.hub.cache.layout import Repo, find_snapshot
from lib.hub.doctor import diagnose
from lib.hub.importing.folder import import_source
from lib.hub.needs import model_needs
from tests.conftest import Command
from tests.loopback_hub import Hub, closed_endpoint, loopback_hub

MODEL = Repo("user/tiny")
TOKEN = "hf_" + "Secret" * 6
pytestmark = pytest.mark.usefixtures("empty_cache")


def ask(endpoint: str | None, dataset: str | None = "sst5") -> tuple[str, bool]:
    """The doctor's text, and whether a run can start; the Hub has 0.7 seconds to answer."""
    needs = model_needs(ModelSource("user/tiny")) + data_needs(DataConfig(dataset))
    return diagnose(DoctorConfig("user/tiny", dataset=dataset, hub=HubConfig(endpoint, 0.7)), needs)


def fixes(page: str, topic: str) -> list[str]:
    """The commands below `To fix TOPIC`."""
    lines = page.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"To fix `{topic}`"))
    rest = lines[start + 1 :]
    return [line.strip() for line in rest[: next((i for i, line in enumerate(rest) if line[:1] != " "), len(rest))]]


def test_healthy_page_says_what_a_run_would_download(served: Path) -> None:
    with loopback_hub(served) as hub:
        page, healthy = ask(hub.endpoint)
        assert healthy
        assert "--model user/tiny: at most 4 files" in page
        assert "--dataset SetFit/sst5: at most 3 files" in page
        assert hub.downloads == []
        assert not list(Path(constants.HF_HUB_CACHE).glob("*--*"))
        import_tiny(served)
        page, healthy = ask(hub.endpoint)
    assert healthy
    assert "A run can start." in page
    assert "--model user/tiny: complete, commit 00000000" in page


def import_tiny(served: Path) -> None:
    import_source(ImportConfig(str(served / "models" / "user" / "tiny"), "user/tiny", load_check=False))


def faulty(fault: str, served: Path) -> tuple[str, Hub]:
    with loopback_hub(served, fault) as hub:
        return ask(hub.endpoint, None)[0], hub


@pytest.mark.parametrize(
    ("fault", "told", "command"),
    [
        ("hang", "did not answer within 0.7 seconds", "hf download user/tiny --local-dir FOLDER"),
        ("html", "the page of a login portal", "export https_proxy=http://HOST:PORT"),
        ("gated", "only to users who accepted its terms", "hf auth login"),
        ("503", "answered 503", "python hub.py import FOLDER --repo_id user/tiny"),
    ],
)
def test_failing_hub_prevents_a_run_with_an_empty_cache(fault: str, told: str, command: str, served: Path) -> None:
    page, _ = faulty(fault, served)
    assert "A run cannot start: model." in page
    assert told in page
    assert any(line.startswith(command) for line in fixes(page, "model"))


def test_silent_hub_is_a_note_when_the_cache_is_complete(served: Path) -> None:
    import_tiny(served)
    page, _ = faulty("hang", served)
    assert "A run can start." in page
    assert "--model user/tiny would be read from the cache" in page


def test_misspelt_variable_is_reported_with_its_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF-ENDPOINT", "https://hf-mirror.com")
    monkeypatch.setenv("HF_ENDPIONT", "https://hf-mirror.com")
    page, healthy = ask(closed_endpoint())
    assert not healthy
    assert "HF-ENDPOINT is set, but no program reads it; meant is HF_ENDPOINT" in page
    assert "HF_ENDPIONT is set, but no program reads it; meant is HF_ENDPOINT" in page
    assert "export HF_ENDPOINT=...   # instead of HF-ENDPOINT" in fixes(page, "variables")


def test_variable_set_after_the_import_of_the_library_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "/somewhere/else")
    page, _ = ask(closed_endpoint())
    assert "HF_HUB_CACHE was set after huggingface_hub had been imported, too late to have an effect" in page


def test_damaged_file_prevents_a_run_even_where_the_hub_answers(served: Path) -> None:
    import_tiny(served)
    snapshot = find_snapshot(MODEL)
    assert snapshot is not None
    blob = (snapshot / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-64])
    with loopback_hub(served) as hub:
        page, healthy = ask(hub.endpoint, None)
    assert not healthy
    assert "model.safetensors is cut off" in page
    assert fixes(page, "cache")[0] == "hf cache rm model/user/tiny --yes"


def test_offline_variable_with_an_empty_cache_prevents_a_run(monkeypatch: pytest.MonkeyPatch, sockets: list) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    page, healthy = ask(None)
    assert not healthy
    assert "HF_HUB_OFFLINE=1 forbids every request" in page
    assert fixes(page, "model")[0].startswith("export HF_HUB_OFFLINE=0")
    assert sockets == []


def test_cache_that_cannot_be_written_prevents_a_run(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with loopback_hub(served) as hub:
        page, healthy = ask(hub.endpoint, None)
    assert not healthy
    assert "cannot be written" in page
    assert fixes(page, "Hub cache")[0].startswith("export HF_HUB_CACHE=FOLDER")


def test_token_is_never_shown_and_not_sent_to_a_mirror(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with loopback_hub(served) as hub:
        page, _ = ask(hub.endpoint)
    assert "in HF_TOKEN; is not sent to the mirror" in page
    assert TOKEN not in page
    assert hub.tokens == []


@pytest.mark.parametrize("answers", [True, False])
def test_mirror_is_advised_only_if_it_answers(answers: bool, served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    down = closed_endpoint()
    with loopback_hub(served) as hub:
        mirror = hub.endpoint if answers else closed_endpoint()
        monkeypatch.setattr(doctor, "MIRRORS", (mirror,))
        for module in (doctor, advice):
            monkeypatch.setattr(module, "is_official", lambda endpoint: endpoint == down)
        page, healthy = ask(down)
    assert not healthy
    assert (f"export HF_ENDPOINT={mirror}   # this mirror answers and has all of it" in page) is answers
    assert answers or "--hub_endpoint" not in page


def test_command_exits_with_1_when_a_run_cannot_start(run: Command, served: Path, tmp_path: Path) -> None:
    place = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    with loopback_hub(served) as hub:
        flags = ["doctor", "--model", "user/tiny", "--dataset", "sst5", "--hub_timeout", 2, "--hub_endpoint"]
        run("hub.py", *flags, hub.endpoint, env=place)
        done = run("hub.py", *flags, closed_endpoint(), env=place, code=1)
        assert hub.tokens == []
    assert done.stdout.startswith("doctor for --model user/tiny --dataset sst5\n")
    assert "A run cannot start: model, dataset." in done.stdout
    assert TOKEN not in done.stdout + done.stderr
