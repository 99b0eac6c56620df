"""What the processes of a run do together."""

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lib.errors import UserError
from lib.runtime import background, processes, signals
from lib.runtime.memory import StartAgain
from lib.runtime.network import Member, interface_of
from lib.runtime.processes import buckets, check_shared, check_time
from lib.runtime.signals import Stopped
from tests.conftest import ROOT
from tests.machines import IMPATIENT
from tests.resuming import run_flags


def test_gradients_are_summed_in_buckets_of_one_dtype_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.runtime.processes.BUCKET_BYTES", 40)
    tensors = [torch.zeros(n, dtype=kind) for n, kind in ((4, torch.float32), (6, torch.float32), (1, torch.float32))]
    tensors += [torch.zeros(30), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)]
    sizes = [[len(tensor) for tensor in bucket] for bucket in buckets(tensors)]
    assert sizes == [[4, 6], [1], [30], [2, 2]]
    assert sum(map(sum, sizes)) == sum(map(len, tensors))


@pytest.fixture
def restarting(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`restarting(60)`: an attempt of a launcher that restarts the run, started 60 seconds ago; all share one store."""
    store = torch.distributed.HashStore()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setattr(processes, "is_alone", lambda: False)
    monkeypatch.setattr(processes, "any_process", lambda _, flag: flag)

    def start(seconds_ago: float) -> signals.Request:
        request = signals.Request()
        request.started = time.monotonic() - seconds_ago
        monkeypatch.setattr(processes, "REQUEST", request)
        attempt = torch.distributed.PrefixStore(f"attempt/{seconds_ago}", store)
        monkeypatch.setattr(processes, "_get_default_store", lambda: attempt)
        return request

    return start


def test_time_limit_counts_from_the_first_start_under_a_launcher_that_restarts(restarting: Any) -> None:
    first = restarting(300)
    check_time(None, 6)
    second = restarting(5)
    check_time(None, 6)
    assert abs(second.started - first.started) < 1
    restarting(5)
    with pytest.raises(Stopped, match="--max_minutes 4 "):
        check_time(None, 4)
    check_time(None, None)


def test_time_limit_counts_from_the_start_of_the_process_without_restarts(
    restarting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    restarting(300)
    check_time(None, 6)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    request = restarting(5)
    started = request.started
    check_time(None, 1)
    assert request.started == started


def test_folder_that_a_machine_does_not_see_is_refused_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two machines with one process, with a folder of its own or with the same one."""
    token = "0123456789abcdef"
    monkeypatch.setattr(processes, "NFS_SECONDS", 0.2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    (tmp_path / "first" / ".lock").write_text(json.dumps({"token": token}))
    said: list[Any] = []

    def check(first: str, second: str) -> None:
        said.clear()
        for rank, name in enumerate((first, second)):
            check_shared(SimpleNamespace(num_processes=2, is_main_process=rank == 0), tmp_path / name, token)

    def gather(seen: list[Any], own: Any) -> None:
        said.append(own)
        seen[:] = [said[0], said[-1]]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    check("first", "first")
    with pytest.raises(UserError, match=rf"--output_dir .*{socket.gethostname()}:{tmp_path}/second.*disk"):
        check("first", "second")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check("first", "second")  # one machine: not looked at


def test_trial_connection_ends_when_all_have_used_it_and_each_machine_names_its_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Machines of one and two processes; the second process has summed, but not said so."""
    store = torch.distributed.HashStore()
    members = [Member(key, f"node{machine}", "127.0.0.1", machine) for key, machine in (("a", 0), ("b", 1), ("c", 1))]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface_of("127.0.0.1"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "NETWORKS", [])
    rank = threading.local()
    monkeypatch.setattr(processes, "rank_and_size", lambda: (rank.own, 3))

    def connect(number: int) -> Any:
        rank.own = number
        return processes.connect(store, members, 60.0)

    def silent() -> Any:
        group = torch.distributed.ProcessGroupGloo(
            torch.distributed.PrefixStore("trial", store), 1, 3, timedelta(seconds=60)
        )
        group.allreduce([torch.zeros(1)]).wait()
        return group

    with ThreadPoolExecutor(3) as pool:
        first, second, third = pool.submit(connect, 0), pool.submit(silent), pool.submit(connect, 2)
        second.result(60)
        time.sleep(0.3)
        early = first.done() or third.done()
        store.set("network/1", "eth0 of node1")
        first.result(60), third.result(60)
    assert not early
    assert [text.partition(" of ")[2] for text in processes.NETWORKS] == ["node0", "node1"]


def test_store_that_is_gone_before_all_have_met_is_the_end_of_the_first_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Gone:
        def set(self, *_: Any) -> None:
            raise torch.distributed.DistNetworkError("failed to recv")

    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "open_store", lambda *_, **__: Gone())
    with pytest.raises(UserError, match=r"first process, .*ended before all .*127\.0\.0\.1:29500"):
        processes.join("gloo", 1.0)


def launch_nodes(folder: Path, command: list[Any], places: list[Path]) -> tuple[list[int], str]:
    """Exit codes and output of torchrun on one "machine" for each of `places`, all of them this one: working folders differ."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    nodes = []
    with (folder / "log").open("wb") as log:
        for rank, place in enumerate(places):
            place.mkdir(exist_ok=True)
            words = ["--nnodes", len(places), "--node-rank", rank, "--nproc-per-node", 1]
            words += ["--master-addr", "127.0.0.1", "--master-port", port, *command]
            start = [sys.executable, "-m", "torch.distributed.run", *map(str, words)]
            nodes.append(subprocess.Popen(start, cwd=place, env=environment, stdout=log, stderr=log))
    try:
        codes = [node.wait(150) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return codes, (folder / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "not shared"])
def test_two_machines_need_one_folder(roberta: Path, tmp_path: Path, shared: bool) -> None:
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    flags = [*run_flags(tmp_path, roberta), "--max_steps", 2, "--output_dir", "run"]
    places = [tmp_path / "one", tmp_path / ("one" if shared else "two")]
    codes, log = launch_nodes(tmp_path, [tmp_path / "impatient.py", ROOT / "train.py", *flags], places)
    if shared:
        assert codes == [0, 0], log
        assert json.loads((tmp_path / "one" / "run" / "results.json").read_text())["run/num_processes"] == 2
    else:
        assert 0 not in codes
        assert "--output_dir run is not one folder" in log
        assert f":{tmp_path / 'two' / 'run'}" in log
        assert "step 1/" not in log


RESTARTED = """
import os
from lib.runtime.accelerator import build_accelerator
from lib.runtime.device_options import DeviceOptions
from lib.runtime.processes import check_time
from lib.runtime.signals import REQUEST, Stopped
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
REQUEST.started -= [120, 0][attempt]
try:
    check_time(build_accelerator(DeviceOptions("no")), [3, 1][attempt])
except Stopped as stopped:
    print("attempt", attempt, stopped, flush=True)
    os._exit(0)
os._exit(1)
"""


@pytest.mark.slow
def test_launcher_that_restarts_keeps_the_first_start(tmp_path: Path) -> None:
    """The first attempt says that it started two minutes ago."""
    (tmp_path / "restarted.py").write_text(RESTARTED)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--max-restarts",
        "1",
        "--nproc-per-node",
        "1",
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(tmp_path / "restarted.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "attempt 1 --max_minutes 1 " in done.stdout


def test_error_of_any_process_is_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(processes, "tell_all", lambda value: told.append(value) or [None, OSError(28, "full")])
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.raises(OSError, match="full"):
        processes.together(lambda: "done")
    assert told == [None]
    monkeypatch.setattr(processes, "tell_all", lambda value: [value, None])
    assert processes.together(lambda: "done") == "done"
    with pytest.raises(KeyError, match="mine"):
        processes.together(lambda: {}["mine"])


@pytest.mark.parametrize("rank", [0, 1])
def test_what_the_first_process_finds_or_raises_is_that_of_all(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    outcome: Any = "found"
    done: list[int] = []
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(processes, "tell_all", lambda value: [outcome, None])
    assert processes.on_first(lambda: done.append(rank)) == "found"
    assert done == [0] * (rank == 0)
    outcome = OSError(28, "full")
    with pytest.raises(OSError, match="full"):
        processes.on_first(lambda: None)


def test_error_that_no_other_process_could_read_is_sent_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(processes, "tell_all", lambda value: told.append(value) or [value])

    def fail() -> None:
        raise StartAgain("micro_batch_positions", 4, "--per_device_train_batch_size")

    with pytest.raises(RuntimeError, match="StartAgain: out of memory; with a model in shards"):
        processes.together(fail)
    assert str(pickle.loads(pickle.dumps(told[0]))) == str(told[0])


@pytest.mark.parametrize("failed", [False, True])
def test_work_of_all_is_waited_for_until_it_fails_on_one(monkeypatch: pytest.MonkeyPatch, failed: bool) -> None:
    """The other process is busy in the first two rounds; it fails in the second one."""
    rounds: list[Any] = []

    def lowest(_: Any, values: list[int]) -> list[int]:
        rounds.append(values)
        return [int(len(rounds) > 2), int(not (failed and len(rounds) == 2))]

    monkeypatch.setattr(background, "lowest_of_each", lowest)
    background.wait_everywhere(None, background.Background(), "waiting")  # type: ignore[arg-type]
    assert rounds == [[1, 1]] * (2 if failed else 3)
