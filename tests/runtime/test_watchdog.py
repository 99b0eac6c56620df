"""A process that hangs ends with a report; one that was only paused does not."""

import json
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from lib.runtime import processes, watchdog
from lib.runtime.watchdog import Heartbeat, beat, report, watching, watching_thread, write_phase
from tests.conftest import ROOT


def run(code: str, folder: Path) -> subprocess.CompletedProcess:
    program = (
        f"import time\nfrom pathlib import Path\nfrom lib.runtime.watchdog import *\nfolder = Path({str(folder)!r})\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=ROOT,
        check=False,
    )


def test_hanging_process_ends_with_its_phase_and_its_stack(tmp_path):
    code = """
        def stuck():
            time.sleep(20)
        with watching(folder / "beats", 0, 0.8):
            beat("step 7")
            stuck()
        """
    started = time.monotonic()
    done = run(code, tmp_path)
    assert done.returncode == 1
    assert time.monotonic() - started < 8
    assert "made no progress for 0.8 s (--ddp_timeout)" in done.stderr
    assert "process 0" in done.stderr
    assert "step 7" in done.stderr
    assert "in stuck" in done.stderr


def test_thread_that_is_watched_and_hangs_ends_the_process_though_its_main_thread_goes_on(tmp_path):
    code = """
        from lib.runtime.background import Background
        def write():
            beat("checkpoint of step 6, weights")
            time.sleep(20)
        background = Background()
        with watching(folder / "beats", 0, 0.8):
            background.start(write, "checkpoint of step 6")
            while True:
                beat("step 7")
                time.sleep(0.1)
        """
    done = run(code, tmp_path)
    assert done.returncode == 1
    assert "made no progress for 0.8 s" in done.stderr
    assert "step 7, 0 s ago; beside it checkpoint of step 6, weights, 1 s ago" in done.stderr
    assert "in write" in done.stderr


def test_thread_that_is_watched_says_nothing_of_the_main_thread(tmp_path):
    code = """
        from lib.runtime.background import Background
        def write():
            while True:
                beat("checkpoint of step 6, weights")
                time.sleep(0.1)
        background = Background()
        with watching(folder / "beats", 0, 0.8):
            beat("step 7")
            background.start(write, "checkpoint of step 6")
            time.sleep(20)
        """
    done = run(code, tmp_path)
    assert done.returncode == 1
    assert "step 7, 1 s ago" in done.stderr


def test_long_write_that_makes_progress_is_waited_for(tmp_path):
    code = """
        from lib.runtime.background import Background
        def write():
            for part in range(15):
                beat(f"part {part}")
                time.sleep(0.1)
        background = Background()
        with watching(folder / "beats", 0, 0.8):
            background.start(write, "checkpoint of step 6")
            while background.is_busy(0.1):
                beat("waiting")
        """
    done = run(code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_progress_prints_nothing_and_leaves_no_file(tmp_path):
    code = """
        with watching(folder / "beats", 0, 0.5):
            for step in range(12):
                beat(f"step {step}")
                time.sleep(0.1)
        """
    done = run(code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(tmp_path.iterdir())


def test_report_tells_the_frozen_process_from_the_waiting_one(tmp_path, capfd):
    beat("step 9")
    write_phase(tmp_path, 0)
    entry = json.loads((tmp_path / "0").read_text())
    (tmp_path / "1").write_text(
        json.dumps(entry | {"phase": "step 8", "seen": time.time() - 60, "since": time.time() - 61})
    )
    report(tmp_path, 0, 8)
    lines = capfd.readouterr().err.splitlines()
    assert "process 0 (" in lines[1]
    assert lines[1].endswith("alive")
    assert "step 8, 61 s ago, frozen or dead" in lines[2]


def test_pause_of_the_whole_process_does_not_count(tmp_path):
    """Ctrl-Z for longer than the timeout, then fg."""
    code = """
        import os, signal, subprocess
        subprocess.Popen(["sh", "-c", f"sleep 2; kill -CONT {os.getpid()}"])
        with watching(folder / "beats", 0, 1.0):
            beat("step 1")
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.3)
        """
    assert run(code, tmp_path).returncode == 0


def test_missing_folder_does_not_stop_the_run(tmp_path):
    with watching(tmp_path / "beats", 0, 0.4):
        shutil.rmtree(tmp_path / "beats", ignore_errors=True)
        for _ in range(5):
            beat("step")
            time.sleep(0.1)
    assert watchdog.HEARTBEAT.phase == "step"


def test_thread_that_waits_for_other_processes_may_wait_longer_and_a_main_thread_may_not(tmp_path):
    code = """
        from lib.runtime.background import Background
        def write():
            with waiting_for_others():
                time.sleep(1.6)
        background = Background()
        with watching(folder / "beats", 0, 0.8):
            background.start(write, "checkpoint of step 6")
            while background.is_busy(0.1):
                beat("waiting")
            print("written")
            with waiting_for_others():
                time.sleep(20)
        """
    done = run(code, tmp_path)
    assert done.returncode == 1
    assert done.stdout == "written\n"


def test_what_processes_tell_each_other_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(found: list, value: str, group: None) -> None:
        (heart,) = watchdog.BESIDE.values()
        found[:] = [value, heart.phase, heart.waits]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(processes, "side_group", lambda: None)
    with watching_thread("a write"):
        assert processes.tell_all("done") == ["done", "a write, waiting for other processes", True]
        (heart,) = watchdog.BESIDE.values()
        assert (heart.phase, heart.waits) == ("a write", False)


def test_watchdog_writes_no_heartbeat_unless_the_process_paused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A beat of another thread between its read and its write would be lost."""
    writers = set()

    class Recording(Heartbeat):
        def __setattr__(self, name: str, value: object) -> None:
            writers.add(threading.current_thread().name)
            super().__setattr__(name, value)

    monkeypatch.setitem(watchdog.BESIDE, -1, Recording("a write"))
    with watching(tmp_path / "beats", 0, 8.0):
        time.sleep(2.5)
    assert writers == {threading.current_thread().name}
