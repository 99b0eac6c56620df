"""Several machines train one model as one process does, and the end of one of them is no end of the run."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT, WORKER_ENV, Command, read_lines, sentences, write_csv
from tests.machines import IMPATIENT, TRAIN, Machine, accelerate_launch, torchrun, two_machines, wait_for
from tests.resuming import differences, run_flags

WORKER = ROOT / "tests" / "workers" / "faulty.py"
NUMBERS = ("train/loss", "train/grad_norm", "eval/loss", "train/learning_rate")


@pytest.fixture
def flags(tmp_path: Path, roberta_without_dropout: Path) -> list[Any]:
    files = [write_csv(tmp_path / f"{name}.csv", sentences(count)) for name, count in (("train", 84), ("dev", 12))]
    given = ["--model", roberta_without_dropout, "--train_file", files[0], "--validation_file", files[1], "--bs", 7]
    given += ["--epochs", 1, "--lr", "1e-3", "--logging_steps", 1, "--eval_steps", 3, "--mixed_precision", "no"]
    return [*given, "--report_to", "none", "--output_dir"]


def check_equal(run: Path, alone: Path, steps: int = 12) -> None:
    """Every step is logged once, with the numbers of an undisturbed run of one process."""
    lines, expected = read_lines(run / "metrics.jsonl"), read_lines(alone / "metrics.jsonl")
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == list(range(1, steps + 1))
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() == other.keys()
        assert {name: line[name] for name in NUMBERS if name in line} == pytest.approx(
            {name: other[name] for name in NUMBERS if name in other}, rel=1e-6, abs=1e-6
        )


def end_of(processes: list[subprocess.Popen], *logs: Path, seconds: float = 100) -> list[int]:
    try:
        return [process.wait(seconds) for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail("\n".join(log.read_text() for log in logs))


@pytest.mark.parametrize("each", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_machines_are_one_process_and_use_the_network_between_them(
    each: int, call: Command, flags: list[Any], tmp_path: Path
) -> None:
    """The name of each machine leads to its own loopback, which the other one cannot reach."""
    logs = tmp_path / "first.log", tmp_path / "second.log"
    with two_machines() as machines:
        running = [
            machine.start(accelerate_launch(machine.number, TRAIN, *flags, tmp_path / "both", each=each), log)
            for machine, log in zip(machines, logs, strict=True)
        ]
        call("train.py", *flags, tmp_path / "alone")
        assert end_of(running, *logs) == [0, 0], logs[0].read_text() + logs[1].read_text()
        networks = ", ".join(f"{machine.interface} of {machine.name}" for machine in machines)
    assert f"{2 * each} (gloo, CPU) on 2 machines, over {networks}" in logs[0].read_text()
    check_equal(tmp_path / "both", tmp_path / "alone")


def kill_one_in_the_middle(machines: tuple[Machine, Machine], line: Any, folder: Path, logs: tuple[Path, Path]) -> Any:
    """Start a slow run on both machines, and end the second one at step 5, after a checkpoint; the first one's launcher."""
    running = [machine.start(line(machine), log, folder) for machine, log in zip(machines, logs, strict=True)]
    wait_for("step 5/", logs[0], *running)
    machines[1].kill()
    running[1].wait(20)
    return running[0]


@pytest.mark.slow
def test_machine_that_is_killed_ends_the_run_on_the_other_which_then_goes_on_alone(
    call: Command, flags: list[Any], tmp_path: Path
) -> None:
    logs = tmp_path / "first.log", tmp_path / "second.log"
    slow = [WORKER, json.dumps({"sleep": 0.4}), *flags, tmp_path / "both"]
    with two_machines() as machines:
        left = kill_one_in_the_middle(
            machines, lambda machine: accelerate_launch(machine.number, *slow), tmp_path, logs
        )
        assert end_of([left], logs[0], seconds=60) == [1]
        text = logs[0].read_text()
        assert text.count("lost its connection to another process") == 1
        assert "step 12/" not in text
        again = machines[0].start(
            accelerate_launch(0, TRAIN, *flags, tmp_path / "both", machines=1, address="127.0.0.1"), logs[0]
        )
        assert end_of([again], logs[0]) == [0]
    call("train.py", *flags, tmp_path / "alone")
    assert "num_processes 4 -> 2" in logs[0].read_text()
    check_equal(tmp_path / "both", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["machine", "process"])
def test_torchrun_goes_on_with_the_machines_that_are_left(
    killed: str, call: Command, flags: list[Any], tmp_path: Path
) -> None:
    """Where only a process died, its machine comes back: then one launcher has counted a restart, and the other has not."""
    logs = tmp_path / "first.log", tmp_path / "second.log"
    once = {"do": "kill", "rank": 3, "step": 5, "once": str(tmp_path / "once")} if killed == "process" else {}
    slow = [WORKER, json.dumps({"sleep": 0.4} | once), *flags, tmp_path / "both"]

    def line(machine: Machine) -> list[Any]:
        return torchrun(machine.number, "--max-restarts", 3, *slow, nodes="1:2")

    with two_machines() as machines:
        if killed == "machine":
            left = [kill_one_in_the_middle(machines, line, tmp_path, logs)]
        else:
            left = [machine.start(line(machine), log) for machine, log in zip(machines, logs, strict=True)]
        assert end_of(left, *logs, seconds=150) == [0] * len(left)
    call("train.py", *flags, tmp_path / "alone")
    check_equal(tmp_path / "both", tmp_path / "alone")


SLURM = {
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for node in 0 1; do SLURM_NODEID=$node "$@" & tasks+=($!); done
        code=0; for task in "${tasks[@]}"; do wait "$task" || code=$?; done; exit $code""",
    "scontrol": """
        case $1 in show) echo 127.0.0.1; echo 127.0.0.1 ;; requeue) touch "$QUEUED" ;; esac""",
}
"""Slurm's commands for a job on two machines, both of them this one."""


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture
def job(tmp_path: Path) -> Any:
    """`job(flag, ...)` starts the recipe for Slurm as its batch job, with a train.py whose steps take long."""
    place = tmp_path / "project"
    (place / "bin").mkdir(parents=True)
    for name, lines in SLURM.items():
        (place / "bin" / name).write_text(f"#!/bin/bash{lines}\n")
        (place / "bin" / name).chmod(0o755)
    (place / "accelerate_configs").symlink_to(ROOT / "accelerate_configs")
    slow = f"import runpy, sys\nsys.argv.insert(1, '{{\"sleep\": 0.4}}')\nrunpy.run_path({str(WORKER)!r}, run_name='__main__')\n"
    (place / "train.py").write_text(slow)
    number = next(number for number in range(os.getpid() % 5000, 10000) if is_free(20000 + number))
    path = f"{place / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_NODELIST": "both", "SLURM_JOB_ID": str(number), "SLURM_NNODES": "2", "PATH": path}
    environment = os.environ | WORKER_ENV | slurm | {"ACCELERATE_USE_CPU": "true", "QUEUED": str(tmp_path / "queued")}

    def start(*flags: Any) -> subprocess.Popen:
        with (tmp_path / "job.log").open("ab") as log:
            command = ["bash", ROOT / "recipes" / "slurm.sbatch", *flags]
            return subprocess.Popen(list(map(str, command)), cwd=place, env=environment, stdout=log, stderr=log)

    return start


def test_recipe_for_slurm_asks_for_the_folder_that_it_looks_into(job: Any, tmp_path: Path) -> None:
    assert job("--lr", "1e-5", "--output_dir=run").wait(20) == 2
    assert "--output_dir FOLDER here, as two words" in (tmp_path / "job.log").read_text()


@pytest.mark.slow
def test_job_of_slurm_saves_before_its_limit_is_queued_again_and_equals_an_undisturbed_run(
    job: Any, run: Command, roberta: Path, tmp_path: Path
) -> None:
    log, queued, flags = (
        tmp_path / "job.log",
        tmp_path / "queued",
        [*run_flags(tmp_path, roberta), "--logging_steps", 1],
    )
    first = job(*flags, "--output_dir", tmp_path / "job")
    wait_for("step 4/", log, first)
    for process in psutil.Process(first.pid).children(recursive=True):  # as Slurm does before the time limit
        if process.name() != "srun":
            process.send_signal(signal.SIGUSR1)
    assert first.wait(60) == 0, log.read_text()
    assert log.read_text().count("SIGUSR1: saved") == 1
    assert queued.exists()
    queued.unlink()
    assert job(*flags, "--output_dir", tmp_path / "job").wait(120) == 0, log.read_text()
    assert "resumed from" in log.read_text()
    assert not queued.exists()
    run("train.py", *flags, "--output_dir", tmp_path / "alone", processes=2)
    assert differences(tmp_path / "alone", tmp_path / "job") == []


@pytest.mark.parametrize("before", [[], ["step-000002"]], ids=["new", "resumed"])
@pytest.mark.parametrize("saves", [True, False])
def test_job_of_slurm_is_queued_again_if_it_has_a_new_checkpoint_whatever_the_clocks_say(
    saves: bool, before: list[str], job: Any, tmp_path: Path
) -> None:
    """The file server's clock is far behind: its files seem older than the job."""
    checkpoints = tmp_path / "job" / "checkpoints"
    for name in before:
        (checkpoints / name).mkdir(parents=True)
    saved = checkpoints / "step-000004"
    lines = [f"mkdir -p {saved}", f"touch -d 2001-01-01 {saved}"] if saves else []
    (tmp_path / "project" / "bin" / "srun").write_text("\n".join(["#!/bin/bash", *lines, "exit 1"]))
    assert job("--output_dir", tmp_path / "job").wait(20) == (0 if saves else 1)
    assert (tmp_path / "queued").exists() == saves


@pytest.mark.slow
def test_job_of_slurm_that_saves_nothing_is_not_queued_again(job: Any, tmp_path: Path) -> None:
    assert job("--model", tmp_path / "gone", "--output_dir", tmp_path / "job").wait(60) == 1
    assert "no such folder" in (tmp_path / "job.log").read_text()
    assert not (tmp_path / "queued").exists()


@pytest.mark.slow
def test_machines_without_a_shared_folder_are_refused_before_the_first_step(flags: list[Any], tmp_path: Path) -> None:
    logs = tmp_path / "first.log", tmp_path / "second.log"
    places = tmp_path / "one", tmp_path / "two"
    impatient = tmp_path / "impatient.py"
    impatient.write_text(IMPATIENT)
    with two_machines() as machines:
        running = []
        for machine, log, place in zip(machines, logs, places, strict=True):
            place.mkdir()
            line = accelerate_launch(machine.number, impatient, TRAIN, *flags, "run", each=1)
            running.append(machine.start(line, log, place))
        assert end_of(running, *logs) == [1, 1]
        names = [machine.name for machine in machines]
    text = logs[0].read_text() + logs[1].read_text()
    assert f"{names[0]}:{places[0] / 'run'} is not in {names[1]}:{places[1] / 'run'}" in text
    assert "step 1/" not in text


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False], ids=["shared cache", "own caches"])
def test_one_process_of_each_machine_prepares_the_data_where_no_cache_is_shared(
    shared: bool, flags: list[Any], tmp_path: Path
) -> None:
    counting = tmp_path / "counting.py"
    counting.write_text(COUNTING)
    logs = tmp_path / "first.log", tmp_path / "second.log"
    with two_machines() as machines:
        running = []
        for machine, log in zip(machines, logs, strict=True):
            line = accelerate_launch(machine.number, counting, TRAIN, *flags, tmp_path / "run", "--max_steps", 1)
            cache = str(tmp_path / "cache" / ("both" if shared else str(machine.number)))
            running.append(machine.start(line, log, HF_DATASETS_CACHE=cache))
        assert end_of(running, *logs) == [0, 0]
    prepared = re.findall(r"prepares: (\d)", logs[0].read_text() + logs[1].read_text())
    assert prepared == (["0"] if shared else ["0", "2"])


COUNTING = """
import os, runpy, sys
from lib.data import load
from lib.runtime.signals import say
prepare = load.prepare_data
def counted(*arguments):
    say(f"prepares: {os.environ['RANK']}")
    prepare(*arguments)
load.prepare_data = counted
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_what_cannot_be_reached_is_named_and_ends_in_bounded_time(flags: list[Any], tmp_path: Path) -> None:
    """Processes started without a launcher, one after another: a machine that is not there, a name, a port of another program."""
    silent = "import socket, time; s = socket.create_server(('', 29501)); time.sleep(300)"
    cases = {
        "10.77.0.9": (29500, "does not reach the first machine at 10.77.0.9:29500"),
        "10.77.0.1": (29500, "does not reach the first machine at 10.77.0.1:29500"),
        "10.99.0.9": (29500, "no network leads"),
        "no-such-machine": (29500, "no-such-machine is not known"),
        "10.77.0.2": (29501, "what listens there does not answer for 2 s"),
    }
    with two_machines() as (_, machine):
        machine.start([sys.executable, "-c", silent], tmp_path / "silent.log")
        for number, (address, (port, words)) in enumerate(cases.items()):
            log = tmp_path / f"{number}.log"
            place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            place |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
            line = [sys.executable, "-c", HASTY, TRAIN, *flags, tmp_path / "run", "--join_timeout", 2]
            assert end_of([machine.start(line, log, **place)], log, seconds=60) == [2]
            assert words in log.read_text()


HASTY = """
import runpy, sys
from lib.runtime import network
network.SILENT_SECONDS = network.RESOLVE_SECONDS = 2.0
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_process_that_does_not_come_is_named_on_the_other_machine(flags: list[Any], tmp_path: Path) -> None:
    logs = tmp_path / "first.log", tmp_path / "second.log"
    with two_machines() as machines:
        broken = [*flags, tmp_path / "run", "--join_timeout", 5]
        lines = [
            accelerate_launch(0, TRAIN, *broken),
            accelerate_launch(1, TRAIN, *broken, "--model", tmp_path / "gone"),
        ]
        running = [machine.start(line, log) for machine, line, log in zip(machines, lines, logs, strict=True)]
        assert end_of(running, *logs) == [1, 1]
    assert re.search(r"processes 2, 3; here are 2 of machine 0 \(machine", logs[0].read_text())
    assert logs[0].read_text().count("error: ") == 1
    assert "no such folder" in logs[1].read_text()


@pytest.mark.slow
@pytest.mark.parametrize("blocking", [0, 1])
def test_network_that_lets_only_the_named_port_pass_is_an_error_within_the_time_limit(
    blocking: int, flags: list[Any], tmp_path: Path
) -> None:
    logs = tmp_path / "first.log", tmp_path / "second.log"
    with two_machines() as machines:
        machines[blocking].block()
        running = [
            machine.start(
                accelerate_launch(machine.number, TRAIN, *flags, tmp_path / "run", "--join_timeout", 10, each=1), log
            )
            for machine, log in zip(machines, logs, strict=True)
        ]
        assert end_of(running, *logs) == [1, 1]
    for log in logs:
        assert "cannot connect with all of them over the network interface net-" in log.read_text()
