"""The first signal asks the run to stop, the second ends it, and signals and the end of other processes do nothing."""

import fcntl
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import termios
import textwrap
import time
from pathlib import Path

import pytest

from lib.run.checkpoint import list_checkpoints
from lib.runtime import signals
from lib.runtime.signals import SIGNALS, Stopped, check_stop, deferring_signals
from tests.conftest import ROOT
from tests.resuming import run_flags


def start(code: str, *before: str) -> subprocess.Popen:
    """A process that handles signals and runs `code`, whose first line of output is "ready"; `before`: such as nohup."""
    program = "import os, signal, sys, time\nfrom lib.runtime import signals\nfrom lib.runtime.signals import *\n"
    program += "watch_signals()\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*before, sys.executable, "-c", program + textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_signal_before_training_ends_the_process_at_once_even_in_a_blocking_call():
    process = start("print('ready', flush=True); signal.pthread_sigmask(signal.SIG_BLOCK, []); time.sleep(60)")
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 75


@pytest.mark.parametrize("number", SIGNALS)
def test_deferred_signal_is_raised_at_the_next_check(number):
    process = start(
        """
        with deferring_signals():
            print("ready", flush=True)
            while not signals.REQUEST.reason:
                time.sleep(0.01)
            try:
                check_stop(lambda flag: flag)
            except Stopped as stopped:
                print("stopped by", stopped, flush=True)
                signals.REQUEST.reason = ""
        """
    )
    process.send_signal(number)
    out, _ = process.communicate(timeout=5)
    assert out == f"stopped by {signal.Signals(number).name}\n"


def test_signal_that_a_launcher_forwards_again_is_not_a_second_one():
    process = start("with deferring_signals():\n    print('ready', flush=True)\n    time.sleep(60)")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(2) == 128 + signal.SIGTERM


WAITING = "with deferring_signals():\n    print('ready', flush=True)\n    time.sleep(60)"


def test_another_signal_is_no_second_one():
    """A terminal that is gone may be followed by the end of the session, the warning of a scheduler by its time limit."""
    process = start(WAITING)
    for number in (signal.SIGHUP, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 128 + signal.SIGTERM


def test_signal_that_the_system_repeats_does_not_end_the_process():
    """The kernel sends SIGXCPU every second once the limit of CPU time is reached."""
    process = start(WAITING)
    for _ in range(3):
        for number in (signal.SIGXCPU, signal.SIGHUP, signal.SIGUSR1):
            process.send_signal(number)
        time.sleep(0.6)
    assert process.poll() is None
    process.kill()
    process.wait(5)


def test_hang_up_that_is_ignored_at_the_start_stays_ignored_also_in_workers():
    code = """
        signal.signal(signal.SIGCHLD, lambda *_: None)
        workers = []
        for prepare in (signals.quiet_worker, int):
            workers.append(os.fork())
            if workers[-1] == 0:
                prepare(0)
                time.sleep(60)
        print("ready", flush=True)
        time.sleep(0.3)
        for worker in workers:
            os.kill(worker, signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.5)
        alive = [os.waitpid(worker, os.WNOHANG) == (0, 0) for worker in workers]
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        print(alive, signals.REQUEST.reason == "", flush=True)
        """
    out, _ = start(code, "nohup").communicate(timeout=10)
    assert out == "[True, True] True\n"


def test_ctrl_z_is_no_request_to_stop():
    process = start(WAITING)
    process.send_signal(signal.SIGTSTP)
    process.send_signal(signal.SIGSTOP)  # SIGTSTP does nothing to a process without a shell that could wake it
    time.sleep(0.2)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    assert process.poll() is None
    process.kill()
    assert process.communicate(timeout=5)[1] == ""


def test_end_of_a_loader_worker_does_not_stop_the_run():
    """PyTorch handles SIGCHLD in Python, and every handled signal reaches the pipe."""
    code = """
        signal.signal(signal.SIGCHLD, lambda *_: None)
        if os.fork() == 0:
            os._exit(0)
        os.wait()
        time.sleep(0.5)
        print("ready", flush=True)
        """
    assert start(code).wait(5) == 0


def test_signal_to_a_forked_process_does_not_stop_its_parent():
    """Pools end their workers with SIGTERM; the pipe is shared by the fork."""
    code = """
        child = os.fork()
        if child == 0:
            time.sleep(60)
        time.sleep(0.3)
        os.kill(child, signal.SIGTERM)
        _, status = os.wait()
        assert os.WTERMSIG(status) == signal.SIGTERM
        time.sleep(0.3)
        print("ready", flush=True)
        """
    assert start(code).wait(5) == 0


def test_ending_process_ends_the_ones_it_started():
    process = start(
        "import subprocess; c = subprocess.Popen(['sleep', '60']); print('ready', flush=True); time.sleep(60)"
    )
    (child,) = [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.terminate()
    assert process.wait(5) == 75
    end = time.monotonic() + 5
    while Path(f"/proc/{child}/status").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)


TOKENIZING = """
import os, time
from lib.data import tokenization
class Slow:
    is_fast = False
def encode(_):
    os.write(1, b"ready\\n")
    time.sleep(60)
tokenization.Encoder = lambda *_: encode
list(tokenization.tokenize(iter([[["a"]]] * 8), Slow(), 8, None, 2))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_processes_that_tokenize_end_with_their_script(number: signal.Signals) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", TOKENIZING], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    process.communicate(timeout=20)  # to the end of all that have its output


def test_time_limit_counts_from_the_start_of_the_process(monkeypatch):
    monkeypatch.setattr(signals, "REQUEST", signals.Request())
    with deferring_signals(max_minutes=5):
        check_stop(lambda flag: flag)
        signals.REQUEST.deadline -= 301
        with pytest.raises(Stopped, match="--max_minutes"):
            check_stop(lambda flag: flag)
        signals.REQUEST.reason = ""
    check_stop(lambda flag: flag)  # the limit ends with the block


def test_every_process_stops_if_one_was_asked_to(monkeypatch):
    monkeypatch.setattr(signals, "REQUEST", signals.Request())
    with pytest.raises(Stopped, match="another process"):
        check_stop(lambda _: True)


ACCELERATE = {"ACCELERATE_DYNAMO_USE_FULLGRAPH": "False", "ACCELERATE_MIXED_PRECISION": "no"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}
STARTER = """
import json, os, subprocess, sys
sets, command = json.loads(sys.argv[1]), sys.argv[2:]
subprocess.Popen(command, env=os.environ | sets, stdin=subprocess.DEVNULL)
sys.stdin.read()
os._exit(0)
"""
STARTED = """
import os, sys, time
from lib.runtime import signals
parent, late = os.getppid(), sys.argv[1:] == ["late"]
if not late:
    signals.watch_signals()
print("ready", flush=True)
deadline = time.monotonic() + 20
while os.getppid() == parent and time.monotonic() < deadline:
    time.sleep(0.01)
if late:
    signals.watch_signals()
time.sleep(0.4)
print("goes on", flush=True)
"""


def survives(folder: Path, sets: dict[str, str], has: dict[str, str], *between: str, late: bool = False) -> bool:
    """Whether a process goes on after the end of the one that started it.

    That one is a script in `folder`, has the variables `has`, and `sets` some for its child. `between`: such as a shell.
    `late`: it ends before its child handles signals.
    """
    folder.mkdir()
    (folder / "start").write_text(STARTER)
    command = [sys.executable, folder / "start", json.dumps(sets), *between, sys.executable, "-c", STARTED]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = plain | {"PYTHONPATH": str(ROOT)} | has
    process = subprocess.Popen([*command, *["late"] * late], env=environment, text=True, **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    out, err = process.communicate(timeout=30)  # the child has the same pipes: this waits for its end
    assert ("goes on" in out) != ("SIGUSR1: stopped" in err)
    return "goes on" in out


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
class TestEndOfTheParent:
    @pytest.mark.parametrize(
        "sets", [ACCELERATE, TORCHRUN, ACCELERATE | TORCHRUN], ids=["accelerate", "torchrun", "both"]
    )
    def test_process_ends_with_its_launcher_whatever_that_is_called(self, tmp_path: Path, sets: dict[str, str]) -> None:
        assert not survives(tmp_path / "notebook", sets, {})

    def test_launcher_that_dies_while_its_process_starts_is_noticed(self, tmp_path: Path) -> None:
        assert not survives(tmp_path / "a", ACCELERATE, {}, late=True)

    def test_launcher_below_another_one_is_noticed(self, tmp_path: Path) -> None:
        assert not survives(tmp_path / "a", {"TORCHELASTIC_RUN_ID": "second"}, {"TORCHELASTIC_RUN_ID": "first"})
        assert not survives(tmp_path / "b", TORCHRUN, ACCELERATE)

    @pytest.mark.parametrize(
        ("sets", "has", "between"),
        [
            ({}, {}, []),
            ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, []),
            ({}, {"ACCELERATE_MIXED_PRECISION": "bf16"}, []),
            ({}, ACCELERATE | TORCHRUN, []),
            (ACCELERATE, {}, ["env", "-i", f"PYTHONPATH={ROOT}"]),
        ],
        ids=["plain", "a variable of the script", "a variable of the user", "an agent that was launched", "env -i"],
    )
    def test_process_goes_on_after_a_starter_whatever_that_is_called(
        self, tmp_path: Path, sets: dict[str, str], has: dict[str, str], between: list[str]
    ) -> None:
        assert survives(tmp_path / "accelerate-torchrun", sets, has, *between)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_run_whose_terminal_hangs_up_saves_and_ends(roberta: Path, tmp_path: Path, processes: int) -> None:
    """As when ssh drops: a shell leads the session, the run is in its foreground, and the other end of the terminal closes."""
    folder = tmp_path / "run"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", processes]
    launcher += ["--multi_gpu", "--main_process_port", 0] if processes > 1 else []
    script = [ROOT / "tests" / "workers" / "faulty.py", json.dumps({"sleep": 0.5})]
    flags = [*run_flags(tmp_path, roberta), "--logging_steps", 1, "--dataloader_num_workers", 1]
    command = shlex.join(map(str, [*launcher, *script, *flags, "--output_dir", folder]))
    ours, theirs = pty.openpty()
    shell = subprocess.Popen(
        ["bash", "-c", f"{command} > {tmp_path}/log 2>&1; true"],
        stdin=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    os.close(theirs)
    deadline = time.monotonic() + 120
    while not ((folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text().count("\n") >= 2):
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    os.close(ours)
    shell.wait(30)
    while "saved" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    assert any(path.name.endswith("-pending") for path in list_checkpoints(folder / "checkpoints"))
    assert not (folder / "results.json").exists()


@pytest.mark.parametrize(
    ("command", "spared"),
    [
        ("/venv/lib/python3.11/site-packages/wandb/bin/wandb-core --port-filename /tmp/x", True),
        ("/venv/bin/python -m wandb.sync", True),
        ("/home/me/wandb/venv/bin/python /home/me/wandb/worker.py --report_to wandb", False),
        ("", False),
    ],
)
def test_only_programs_of_wandb_are_spared_by_the_end(command: str, spared: bool) -> None:
    assert signals.is_wandb(command.split()) is spared
