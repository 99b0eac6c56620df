"""Models and data sets by their Hub names, against a Hub on the loopback interface."""

import json

from tests.conftest import results_of, tiny_roberta
from tests.hub_layouts import SST5_NAMES, environment, write_sst5
from tests.loopback_hub import loopback_hub


def test_hub_model_and_data_set_train_online_and_then_offline_with_equal_results(run, tmp_path):
    tiny_roberta(tmp_path / "hub" / "models" / "roberta-base")
    write_sst5(tmp_path / "hub" / "datasets" / "SetFit" / "sst5")
    with loopback_hub(tmp_path / "hub") as (endpoint, requests):
        flags = ["--model", "roberta-base", "--dataset", "sst5", "--epochs", 1, "--report_to", "none"]
        done = run("train.py", *flags, processes=1, env=environment(endpoint, tmp_path))
    assert any("SetFit/sst5" in path for path in requests)
    assert any("model.safetensors" in path for path in requests)
    online = results_of(done)
    assert online["samples_seen"] == 40
    folder = tmp_path / "outputs" / "roberta-base-sst5-lr5e-05-bs32-ep1-s42"
    names = json.loads((folder / "model" / "config.json").read_text())["id2label"]
    assert tuple(names.values()) == SST5_NAMES
    assert "fetching --model roberta-base" in done.stderr

    # Again from the cache, in processes that cannot open a connection and log every attempt.
    settings = environment(endpoint, tmp_path) | {"HF_HUB_OFFLINE": "1"} | without_network(tmp_path)
    offline = results_of(run("train.py", *flags, "--run_name", "offline", processes=1, env=settings))
    assert (tmp_path / "sockets.log").read_text().splitlines() == []
    for name in (
        "eval/loss",
        "test/loss",
        "test/accuracy",
        "run/model_commit",
        "run/model_sha256",
        "run/data_fingerprint",
    ):
        assert offline[name] == online[name], name


def without_network(folder):
    """Variables under which every Python process refuses to connect or to look up a name, and logs the attempt."""
    (folder / "sockets.log").write_text("")
    (folder / "guard").mkdir()
    (folder / "guard" / "sitecustomize.py").write_text(GUARD.format(log=str(folder / "sockets.log")))
    return {"PYTHONPATH": str(folder / "guard")}


GUARD = """
import socket

def refuse(*arguments, **_):
    if not (isinstance(arguments[0], socket.socket) and arguments[0].family == socket.AF_UNIX):
        with open({log!r}, "a") as file:
            file.write(repr(arguments) + chr(10))
        raise OSError("no network in this test")

for name in ("connect", "connect_ex"):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
"""


def test_guard_of_the_test_above_logs_an_attempt(run, tmp_path):
    (tmp_path / "hub").mkdir()
    with loopback_hub(tmp_path / "hub") as (endpoint, requests):
        settings = environment(endpoint, tmp_path) | without_network(tmp_path)
        done = run("eval.py", "--model", "user/tiny", "--dataset", "sst5", code=2, env=settings)
    assert requests == []
    assert "127.0.0.1" in (tmp_path / "sockets.log").read_text()
    assert "Traceback" not in done.stderr


def test_unknown_data_set_ends_with_the_known_names(run, tmp_path):
    (tmp_path / "hub").mkdir()
    with loopback_hub(tmp_path / "hub") as (endpoint, _):
        done = run("train.py", "--dataset", "nobody/nothing", code=2, env=environment(endpoint, tmp_path))
    assert "--dataset nobody/nothing" in done.stderr
    assert "movie_reviews" in done.stderr
    assert "Traceback" not in done.stderr
