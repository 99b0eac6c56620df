"""The first signal asks the run to stop, the second ends it, and signals of other processes do nothing."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lib.runtime import signals
from lib.runtime.signals import Stopped, check_stop, deferring_signals
from tests.conftest import ROOT


def start(code: str) -> subprocess.Popen:
    """A process that handles signals and runs `code`, whose first line of output is "ready"."""
    program = "import os, signal, sys, time\nfrom lib.runtime import signals\nfrom lib.runtime.signals import *\n"
    program += "watch_signals()\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", program + textwrap.dedent(code)],
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
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
