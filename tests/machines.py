"""Two machines on this one: network namespaces with names and loopbacks of their own, joined by a cable; one disk."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT, WORKER_ENV

PORT = 29500
"""Free on every new machine."""

IMPATIENT = """
import runpy, sys
from lib.runtime import processes
processes.NFS_SECONDS = 1.0
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A program that runs another one, which waits a second, not half a minute, for what NFS shows late."""


class Machine:
    """A network namespace in which commands are started; its own name leads to its loopback, as Debian has it."""

    def __init__(self, number: int, owner: str = str(os.getpid())) -> None:
        self.number, self.name = number, f"machine{owner}{'ab'[number]}"
        self.interface, self.address = f"net-{'ab'[number]}", f"10.77.0.{number + 1}"
        self.etc = Path("/etc/netns") / self.name

    def start(self, command: list[Any], log: Path, cwd: Path | None = None, **variables: str) -> subprocess.Popen:
        """Start a command on the CPU of this machine; it writes into `log`."""
        place = [
            "ip",
            "netns",
            "exec",
            self.name,
            "unshare",
            "--uts",
            "sh",
            "-c",
            'hostname "$0" && exec "$@"',
            self.name,
        ]
        environment = os.environ | WORKER_ENV | {"ACCELERATE_USE_CPU": "true"} | variables
        with log.open("ab") as file:
            return subprocess.Popen(
                [*place, *map(str, command)],
                cwd=cwd,
                env=environment,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
            )

    def block(self) -> None:
        """Drop what this machine sends to the other one over TCP, but for what goes from or to PORT, as a firewall does."""
        other = f"10.77.0.{2 - self.number}"
        rules = (f"sport {PORT} lookup main", f"dport {PORT} lookup main", f"to {other} blackhole")
        for number, rule in enumerate(rules, start=10):
            ip(*f"-n {self.name} rule add pref {number} ipproto tcp {rule}".split())

    def processes(self) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, check=False, timeout=20)
        return list(map(int, listed.stdout.split()))

    def remove(self) -> None:
        """End its processes and remove it, as far as it is there."""
        self.kill()
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True, timeout=20)
        with contextlib.suppress(OSError):
            (self.etc / "hosts").unlink()
            self.etc.rmdir()

    def kill(self) -> None:
        """End all processes at once, as when the power goes."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Within, two machines; their processes, names and files are gone afterwards. Skips the test where none can be made."""
    first, second = both = Machine(0), Machine(1)
    for folder in Path("/etc/netns").glob("machine*[0-9][ab]"):  # of a test that was killed
        if not psutil.pid_exists(int(folder.name[7:-1])):
            Machine("ab".index(folder.name[-1]), folder.name[7:-1]).remove()
    try:
        try:
            for machine in both:
                ip("netns", "add", machine.name)
                machine.etc.mkdir(parents=True)
                (machine.etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {machine.name}\n")
            ends = (("name", first.interface, "netns", first.name), ("name", second.interface, "netns", second.name))
            ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for machine in both:
                ip("-n", machine.name, "link", "set", "lo", "up")
                ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", machine.interface)
                ip("-n", machine.name, "link", "set", machine.interface, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this user may not make network namespaces: {getattr(error, 'stderr', None) or error}")
        yield both
    finally:
        for machine in both:
            machine.remove()


def accelerate_launch(
    rank: int, *flags: Any, machines: int = 2, each: int = 2, address: str = "10.77.0.1"
) -> list[Any]:
    """The line for machine `rank` of several, with `each` processes on every one."""
    line = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", machines]
    line += ["--machine_rank", rank, "--main_process_ip", address, "--main_process_port", PORT]
    return [*line, "--num_processes", machines * each, *flags]


def torchrun(rank: int, *flags: Any, nodes: str = "2", each: int = 2, address: str = "10.77.0.1") -> list[Any]:
    """The line of torchrun in which the machines find each other by themselves.

    No name is known, and the first machine does not know that the address is its own.
    """
    line = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", each]
    line += ["--rdzv-backend", "c10d", "--rdzv-id", "run", "--rdzv-endpoint", f"{address}:{PORT}"]
    line += ["--rdzv-conf", f"is_host={int(rank == 0)},last_call_timeout=5"]
    return [*line, "--local-addr", f"10.77.0.{rank + 1}", *flags]


def wait_for(words: str, log: Path, *running: subprocess.Popen, seconds: float = 90.0) -> None:
    """Wait until `log` has `words`, as long as the processes run."""
    end = time.monotonic() + seconds
    while words not in (text := log.read_text(errors="replace") if log.exists() else ""):
        assert time.monotonic() < end, f"no {words!r} in {log}:\n{text}"
        assert all(process.poll() is None for process in running), text
        time.sleep(0.1)


TRAIN = ROOT / "train.py"
