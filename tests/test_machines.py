"""Several machines train one model as one process does, and the end of one of them is no end of the run."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Command, read_lines, sentences, write_csv
from tests.machines import TRAIN, Machine, accelerate_launch, torchrun, two_machines, wait_for

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


def test_two_machines_of_two_processes_are_one_process_and_use_the_network_between_them(
    run: Command, flags: list[Any], tmp_path: Path
) -> None:
    """The name of each machine leads to its own loopback, which the other one cannot reach."""
    logs = tmp_path / "first.log", tmp_path / "second.log"
    with two_machines() as machines:
        running = [
            machine.start(accelerate_launch(machine.number, TRAIN, *flags, tmp_path / "both"), log)
            for machine, log in zip(machines, logs, strict=True)
        ]
        run("train.py", *flags, tmp_path / "alone")
        assert end_of(running, *logs) == [0, 0], logs[0].read_text() + logs[1].read_text()
        shown = (
            " of ".join((machines[0].interface, machines[0].name)),
            " of ".join((machines[1].interface, machines[1].name)),
        )
    assert f"4 (gloo, CPU) on 2 machines, over {', '.join(shown)}" in logs[0].read_text()
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
    run: Command, flags: list[Any], tmp_path: Path
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
    run("train.py", *flags, tmp_path / "alone")
    assert "num_processes 4 -> 2" in logs[0].read_text()
    check_equal(tmp_path / "both", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["machine", "process"])
def test_torchrun_goes_on_with_the_machines_that_are_left(
    killed: str, run: Command, flags: list[Any], tmp_path: Path
) -> None:
    """Where only a process died, its machine comes back: then one launcher has counted a restart, and the other has not."""
    logs = tmp_path / "first.log", tmp_path / "second.log"
    once = {"do": "kill", "rank": 3, "step": 5, "once": str(tmp_path / "once")} if killed == "process" else {}
    slow = [WORKER, json.dumps({"sleep": 0.4} | once), *flags, tmp_path / "both"]
    elastic = ["--max-restarts", "3", "--rdzv-conf", "last_call_timeout=5"]

    def line(machine: Machine) -> list[Any]:
        return torchrun(machine.number, *elastic, *slow, nodes="1:2")

    with two_machines() as machines:
        if killed == "machine":
            left = [kill_one_in_the_middle(machines, line, tmp_path, logs)]
        else:
            left = [machine.start(line(machine), log) for machine, log in zip(machines, logs, strict=True)]
        assert end_of(left, *logs, seconds=150) == [0] * len(left)
    run("train.py", *flags, tmp_path / "alone")
    check_equal(tmp_path / "both", tmp_path / "alone")
