"""A folder has one owner at a time, named to others, and none once its process has ended, however it ended."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lib.errors import UserError
from lib.runtime import lock as locks
from lib.runtime.lock import FolderLock, check_free, is_locked_by
from tests.conftest import ROOT

HOLD = """
import sys
from pathlib import Path
from lib.errors import UserError
from lib.runtime.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
try:
    lock.take()
    print("taken", flush=True)
except UserError as error:
    print(error, flush=True)
sys.stdin.read()
lock.release()
"""


def start(folder: Path) -> subprocess.Popen:
    """A process that takes the lock of a folder, says so, and gives it back when its input ends."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, text=True, **pipes)


def said(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_second_process_is_refused_with_the_owner_and_a_killed_owner_frees_the_folder(tmp_path: Path) -> None:
    with start(tmp_path) as owner:
        assert said(owner) == "taken"
        for refused in (lambda: FolderLock(tmp_path).take(), lambda: check_free(tmp_path)):
            with pytest.raises(UserError, match=rf"--output_dir .*process {owner.pid} on {socket.gethostname()}"):
                refused()
        owner.kill()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == owner.pid
    check_free(tmp_path)
    lock, started = FolderLock(tmp_path), time.monotonic()
    lock.take()
    assert time.monotonic() - started < locks.PATIENCE_SECONDS / 2  # a dead process of this machine is not waited for
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_of_starts_at_the_same_moment_one_wins(tmp_path: Path) -> None:
    starts = [start(tmp_path / "new") for _ in range(4)]
    assert [said(process) for process in starts].count("taken") == 1
    for process in starts:
        process.communicate()


def test_owner_that_waits_gets_the_folder_of_one_that_removed_its_file(tmp_path: Path) -> None:
    with start(tmp_path) as owner:
        assert said(owner) == "taken"
        assert owner.stdin is not None
        threading.Timer(1.0, owner.stdin.close).start()
        lock = FolderLock(tmp_path)
        lock.take(wait=20)
    assert not lock.was_removed(lock.file or -1)
    lock.release()


@pytest.mark.parametrize("local", [True, False], ids=["locks of one machine", "no locks"])
def test_owner_on_another_machine_is_known_by_its_beat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", (lambda *_: None) if local else fail)
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 1.5)
    monkeypatch.setattr(locks, "SETTLE_SECONDS", 0.1)
    owner = {"pid": 7, "host": "elsewhere", "started": "today", "token": "x"}
    file, ended = tmp_path / ".lock", threading.Event()
    file.write_text(json.dumps(owner | {"beat": 1}))

    def beat() -> None:
        number = 1
        while not ended.wait(0.3):
            number += 1
            file.write_text(json.dumps(owner | {"beat": number}))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    with pytest.raises(UserError, match="process 7 on elsewhere"):
        FolderLock(tmp_path).take()
    ended.set()
    thread.join()
    lock = FolderLock(tmp_path)
    lock.take()
    assert json.loads(file.read_text())["pid"] == os.getpid()
    lock.release()


@pytest.mark.parametrize("name", ["file", "file/folder"])
def test_output_folder_that_is_a_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    for refused in (lambda: FolderLock(tmp_path / name).take(), lambda: check_free(tmp_path / name)):
        with pytest.raises(UserError, match=f"--output_dir .*{name} cannot"):
            refused()


def test_of_starts_at_the_same_moment_one_wins_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", fail)
    monkeypatch.setattr(locks, "SETTLE_SECONDS", 0.5)
    starts = [FolderLock(tmp_path), FolderLock(tmp_path)]

    def take(lock: FolderLock) -> bool:
        try:
            lock.take()
        except UserError:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(take, starts)) == [False, True]
    for lock in starts:
        lock.release()


def test_owner_that_reads_its_own_folder_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system drops the lock of a process that opens and closes the file, wherever in it; the beat goes on."""
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    lock = FolderLock(tmp_path)
    lock.take()
    (tmp_path / ".lock").read_bytes()
    with start(tmp_path) as other:
        assert f"process {os.getpid()}" in said(other)
    lock.release()


def test_folder_is_told_from_another_one_with_the_same_name(tmp_path: Path) -> None:
    token = "0123456789abcdef"
    assert not is_locked_by(tmp_path / "missing", token)
    assert not is_locked_by(tmp_path, token)
    (tmp_path / ".lock").write_text('{"token": "of an earlier run"}')
    assert not is_locked_by(tmp_path, token)
    (tmp_path / ".lock").write_text("{")
    assert not is_locked_by(tmp_path, token)
    (tmp_path / ".lock").write_text(json.dumps({"token": token, "beat": 3}))
    assert is_locked_by(tmp_path, token)


def test_owner_writes_a_beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    lock = FolderLock(tmp_path)
    lock.take()
    beaten = threading.Event()
    write = lock.write
    monkeypatch.setattr(lock, "write", lambda file, beat: (write(file, beat), beat > 1 and beaten.set()))
    assert beaten.wait(10)
    lock.release()
