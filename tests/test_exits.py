"""Every end that is not planned is quick, takes all processes with it, and names the one that failed."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT, WORKER_ENV, Command, read_lines, results_of, sentences, write_csv

ENVIRONMENT = os.environ | WORKER_ENV | {"ACCELERATE_USE_CPU": "true"}


@pytest.fixture
def flags(tmp_path: Path, roberta: Path) -> list[Any]:
    """A run of 40 steps whose loader workers are busy to the end, since they are ahead by two batches only."""
    train, validation = (write_csv(tmp_path / f"{n}.csv", sentences(k)) for n, k in (("train", 160), ("dev", 12)))
    files = ["--model", roberta, "--train_file", train, "--validation_file", validation]
    steps = ["--bs", 4, "--epochs", 1, "--logging_steps", 1, "--report_to", "none", "--dataloader_num_workers", 2]
    return [*files, *steps, "--output_dir", tmp_path / "run"]


@pytest.fixture(autouse=True)
def no_process_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    end = time.monotonic() + 15
    while left := [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path / "run") in (p.info["cmdline"] or [])]:
        assert time.monotonic() < end, left
        time.sleep(0.1)


def command(script: str, *flags: Any) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, flags)]


def fault(**what: Any) -> str:
    return json.dumps(what)


def test_error_on_one_of_two_processes_ends_all_and_names_that_one(run: Command, flags: list[Any]) -> None:
    raised = fault(step=3, do="raise", rank=1)
    done = run("tests/workers/faulty.py", raised, *flags, processes=2, code=1, env=WORKER_ENV)
    assert "2 (gloo, CPU)" in done.stdout
    own = done.stderr.split("ChildFailedError")[0]
    assert own.count("RuntimeError: a fault") == 1
    assert "process 1 of 2" in own
    assert "process 0 of 2" not in own
    assert "gloo" not in own
    assert "rank      : 1" in done.stderr


MISTAKE = """
import multiprocessing, signal, sys, time
from lib.runtime.signals import quiet_worker, watch_signals
watch_signals()
from lib.runtime.startup import run_script
from lib.runtime.accelerator import build_accelerator
from lib.errors import UserError
from lib.runtime.device_options import DeviceOptions

def work():
    quiet_worker(0)
    time.sleep(600)

def main(ranks):
    accelerator = build_accelerator(DeviceOptions("no"))
    assert accelerator.num_processes == 2
    multiprocessing.get_context("fork").Process(target=work).start()
    if accelerator.process_index in ranks:
        raise UserError("no such thing")
    accelerator.wait_for_everyone()
    time.sleep(60)

run_script(main, json.loads(sys.argv[2]))
"""


@pytest.mark.parametrize("ranks", [[1], pytest.param([0, 1], marks=pytest.mark.slow)])
def test_mistake_is_printed_once_whichever_process_makes_it(ranks: list[int], run: Command, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import json" + MISTAKE)
    done = run(script, tmp_path / "run", json.dumps(ranks), processes=2, code=1, env=WORKER_ENV)
    assert done.stderr.count("no such thing") == 1
    assert ("process 1 of 2" in done.stderr) == (ranks == [1])


@pytest.mark.slow
def test_killed_process_is_named_by_the_launcher_and_not_the_one_that_missed_it(run: Command, flags: list[Any]) -> None:
    killed = fault(step=3, do="kill", rank=1)
    done = run("tests/workers/faulty.py", killed, *flags, processes=2, code=1, env=WORKER_ENV)
    assert "rank      : 1" in done.stderr
    assert "process 0 of 2" not in done.stderr


@pytest.mark.slow
def test_error_in_the_final_report_ends_all(run: Command, flags: list[Any], tmp_path: Path) -> None:
    """A file stands where the report of the validation split belongs: it is named, before or after training, on all processes."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "eval-validation").write_text("")
    done = run("train.py", *flags, "--max_steps", 2, processes=2, code=1)
    assert "eval-validation" in done.stderr
    assert 'train.py", line' not in done.stderr


@pytest.mark.slow
def test_lost_worker_of_the_loader_is_named_with_the_way_out(flags: list[Any]) -> None:
    slow = fault(sleep=0.5)
    with subprocess.Popen(
        command("tests/workers/faulty.py", slow, *flags),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        while b"step 2/" not in process.stderr.readline():
            assert process.poll() is None
        worker = psutil.Process(process.pid).children()[-1]
        worker.send_signal(signal.SIGKILL)
        _, printed = process.communicate(timeout=60)
    assert process.returncode == 2
    assert b"--dataloader_num_workers 0" in printed
    assert b"Traceback" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("place", ["shared memory", "TMPDIR", "open files"])
def test_batches_of_workers_need_no_shared_memory_no_sockets_and_few_files(
    place: str, flags: list[Any], tmp_path: Path
) -> None:
    """Else a worker that lacks them loses its batch, and the process that waits for it waits for ever."""
    flags += ["--bs", 160, "--epochs", 8, "--pad_to_max_length", True]  # 8 bytes x 64 tokens x 160 texts x 2 columns
    wrapped, environment = command("train.py", *flags), dict(ENVIRONMENT)
    if place == "shared memory":
        mounted = "mount -t tmpfs -o size=256k tmpfs /dev/shm"
        if subprocess.run(["unshare", "-m", "bash", "-c", mounted], check=False, capture_output=True).returncode:
            pytest.skip("this user may not mount a small /dev/shm")
        wrapped = ["unshare", "-m", "bash", "-c", f'{mounted} && exec "$@"', "bash", *wrapped]
    elif place == "TMPDIR":
        environment["TMPDIR"] = str(tmp_path / ("t" * 120))
        Path(environment["TMPDIR"]).mkdir()
    else:
        wrapped = ["bash", "-c", 'ulimit -n 80; exec "$@"', "bash", *wrapped]
    done = subprocess.run(wrapped, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results_of(done)


def test_run_goes_on_when_the_reader_of_its_pipe_has_left(flags: list[Any], tmp_path: Path) -> None:
    with subprocess.Popen(
        command("train.py", *flags, "--max_steps", 3), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        printed = process.stderr.read()
        assert process.wait(120) == 0
    assert printed.count(b"standard output cannot be written") == 1
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["terminal", "full disk", "closed", "gbk"])
def test_run_goes_on_when_nothing_can_be_printed(broken: str, flags: list[Any], tmp_path: Path) -> None:
    environment, streams, arguments = dict(ENVIRONMENT), "", command("train.py", *flags, "--max_steps", 3)
    files: dict[str, int] = {}
    if broken == "terminal":
        master, slave = pty.openpty()
        files = {"stdout": slave, "stderr": slave}
        os.close(master)
    elif broken == "gbk":
        environment["PYTHONIOENCODING"] = "gbk"
        rows = [(text, {"bad": "größer", "good": "ดี"}.get(label, label)) for text, label in sentences(60)]
        write_csv(tmp_path / "train.csv", rows)
        write_csv(tmp_path / "dev.csv", rows)
    else:
        streams = "</dev/null >/dev/full 2>/dev/full" if broken == "full disk" else "<&- >&- 2>&-"
    shell = ["bash", "-c", f'exec "$@" {streams}', "bash", *arguments]
    done = subprocess.run(shell, env=environment, timeout=120, check=False, **files)  # type: ignore[call-overload]
    assert done.returncode == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 3
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 3


def test_report_that_could_not_be_written_is_refused_before_anything_is_loaded(call: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    missing = ["--model", tmp_path / "no-model"]
    for script, flags in (
        ("eval.py", [*missing, "--output_dir", tmp_path / "file" / "report"]),
        ("predict.py", ["a text", *missing, "--output", tmp_path / "file" / "labels.csv"]),
    ):
        done = call(script, *flags, code=2)
        assert "is not a folder" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
