"""One run in a folder at a time: a lock that ends with its process, on one machine and over NFS."""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.errors import UserError

NAME = ".lock"
"""The file in a folder that is locked. It holds who has the lock."""

BEAT_SECONDS = 4.0
"""How often the holder writes that it is alive."""

PATIENCE_SECONDS = 12.0
"""How long a holder on another machine may be silent before it counts as dead."""

SETTLE_SECONDS = 2.0
"""Without locks: how long starts of the same moment wait to see who wrote its name last."""

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system says that has no locks."""


class InUse(UserError):
    """Another process has the folder."""


class FolderLock:
    """The lock of a folder, held from `take` to `release` or to the end of the process, however it ends.

    It is a POSIX lock on the folder's file `.lock`: the system drops it with the process, also on NFS, and a file that a
    dead process left never blocks. Where a file system keeps locks to one machine, or has none, a holder elsewhere is
    recognized by the beat that it writes into the file every few seconds.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.file: int | None = None
        self.is_exclusive = False
        self.ended, self.thread = threading.Event(), threading.Thread(target=self.beat, daemon=True, name="lock")
        self.owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        self.owner["token"] = secrets.token_hex(8)

    def take(self, wait: float = 0.0) -> None:
        """Take the lock, after at most `wait` seconds in which another process has it.

        Raises InUse, which names that process, if it does not end in time, and UserError if the folder cannot be written.
        """
        deadline = time.monotonic() + max(wait, 0.5)  # `check_free` of another start has it for a moment
        while self.file is None:
            file = self.open()
            try:
                while (locked := self.try_lock(file)) is False and time.monotonic() < deadline:
                    time.sleep(0.05)
                if locked is not False and self.was_removed(file):
                    continue  # by the process that had the lock: its end was not ours
                owner = read_owner(file) if locked is False else self.living_owner(file)
                if owner is None and locked is not False:
                    self.write(file, 0)
                    if locked or self.keeps(file):
                        self.file, self.is_exclusive = file, locked is True
                        continue
                    owner = read_owner(file)
                raise InUse(self.refusal(owner))
            finally:
                if self.file is None:
                    os.close(file)
        self.thread.start()

    def open(self) -> int:
        """Open the file, and create it and the folder where they are missing."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"--output_dir {self.path.parent} cannot be written: {error}") from error

    def was_removed(self, file: int) -> bool:
        """Whether the open file is no longer the one in the folder."""
        try:
            return not os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return True

    def try_lock(self, file: int) -> bool | None:
        """Whether this process has the lock now; None where the file system has no locks."""
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return None
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True

    def living_owner(self, file: int) -> dict[str, Any] | None:
        """Who is named in the file and still writes its beat, though the lock is free; None where nobody does."""
        before = read_owner(file)
        if before is None:
            return None
        if before.get("host") == self.owner["host"] and not is_another(before.get("pid")):
            return None
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.2)
            if read_owner(file) != before:
                return before
        return None

    def keeps(self, file: int) -> bool:
        """Whether this process is still the owner in the file when others that start now have written themselves."""
        time.sleep(SETTLE_SECONDS)
        return (read_owner(file) or {}).get("token") == self.owner["token"]

    def write(self, file: int, beat: int) -> None:
        content = json.dumps(self.owner | {"beat": beat}).encode()
        os.pwrite(file, content, 0)
        os.ftruncate(file, len(content))

    def beat(self) -> None:
        """Write a new beat every few seconds, in a thread of its own."""
        count = 0
        while self.file is not None and not self.ended.wait(BEAT_SECONDS):
            count += 1
            with contextlib.suppress(OSError):  # a full disk, or a server that is away: the run goes on
                self.write(self.file, count)

    def release(self) -> None:
        """Give the lock back, if it was taken, and remove its file."""
        if self.file is None:
            return
        self.ended.set()
        self.thread.join()
        with contextlib.suppress(OSError):
            os.ftruncate(self.file, 0)
            if self.is_exclusive:  # without locks another start could have written its name already
                os.unlink(self.path)
        os.close(self.file)
        self.file = None

    def refusal(self, owner: dict[str, Any] | None) -> str:
        folder = self.path.parent
        who = "another process"
        if owner:
            who = f"process {owner.get('pid')} on {owner.get('host')} (since {owner.get('started')})"
        advice = "wait for its end, stop it, or choose another --output_dir or --run_name"
        return f"--output_dir {folder} is in use by {who}; {advice}"


def check_free(folder: Path) -> None:
    """Raise InUse if another process has the folder, as far as locks tell, UserError if it is no folder; writes nothing.

    Not for a process that has the lock: closing the file would drop it.
    """
    lock = FolderLock(folder)
    try:
        file = lock.path.open("rb")
    except (FileNotFoundError, PermissionError):
        return
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be used: {error}") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise InUse(lock.refusal(read_owner(file.fileno()))) from None


def check_writable(path: Path, flag: str) -> None:
    """Raise UserError, which names `flag`, if the file or folder `path` could not be made; makes nothing."""
    there = next(parent for parent in (path, *path.absolute().parents) if os.path.lexists(parent))
    if there != path and not there.is_dir():
        raise UserError(f"{flag} {path} cannot be written: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"{flag} {path} cannot be written: no permission to write to {there}")


@contextlib.contextmanager
def locked_folder(folder: Path, wait: float) -> Iterator[None]:
    """Within, this process alone writes to the folder. Raises UserError if another one does for `wait` seconds."""
    lock = FolderLock(folder)
    lock.take(wait)
    try:
        yield
    finally:
        lock.release()


def is_locked_by(folder: Path, token: str) -> bool:
    """Whether `folder`, as this machine sees it, is the one that the process whose lock has this `token` has locked.

    Not for that process: closing the file would drop its lock.
    """
    for path in (*reversed(folder.absolute().parents), folder):  # opened, a folder of NFS is looked at afresh
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_RDONLY))
    try:
        file = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        return (read_owner(file) or {}).get("token") == token
    finally:
        os.close(file)


def read_owner(file: int) -> dict[str, Any] | None:
    """Who is named in an open lock file; None if nobody is.

    From its descriptor: to open the file once more and close it would drop the lock of this process.
    """
    try:
        found = json.loads(os.pread(file, 4096, 0))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def is_another(pid: Any) -> bool:
    """Whether `pid` is a living process of this machine, and not this one."""
    import psutil

    return isinstance(pid, int) and pid != os.getpid() and psutil.pid_exists(pid)
