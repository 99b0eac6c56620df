"""The program that launched this process, such as `accelerate launch` or torchrun, and what it was told by the user.

A launcher is known by the variables that it sets, whatever its name. It exports what it was told and what it made up in the
same variables. What the user told it stands in the environment and the command that it was itself started with.
"""

import dataclasses
import os
import re
from pathlib import Path

MARKS = ("ACCELERATE_DYNAMO_USE_FULLGRAPH", "TORCHELASTIC_RUN_ID")
"""Variables that `accelerate launch` and torchrun always set, and users do not: ACCELERATE_MIXED_PRECISION may be their own."""


@dataclasses.dataclass(frozen=True)
class Launcher:
    """The command and the environment that a launcher was started with, and its process.

    `is_parent`: it started this process itself; else there is a shell or a script between.
    """

    command: list[str]
    environment: dict[str, str]
    pid: int = 0
    is_parent: bool = False

    @property
    def text(self) -> str:
        """The command in one line, with underscores in its flags."""
        return " ".join(f"--{part[2:].replace('-', '_')}" if part[:2] == "--" else part for part in self.command)

    def config_file(self) -> Path | None:
        """The file of `--config_file`, if there is one."""
        found = re.search(r"--config_file[= ](\S+)", self.text)
        path = Path(self.environment.get("PWD", "."), found[1]) if found else None
        return path if path and path.is_file() else None


def is_launched() -> bool:
    """Whether the environment is that of a process of a launcher."""
    return any(mark in os.environ for mark in MARKS)


def find_launcher(processes: Path = Path("/proc")) -> Launcher | None:
    """The launcher of this process: the nearest one above it that set its marks, because they were not in its environment.

    None without a launcher, and where the system does not tell.
    """
    marks = {mark: os.environ[mark] for mark in MARKS if mark in os.environ}
    try:
        pid = parent = os.getppid()
        while marks and pid > 0:
            block = (processes / str(pid) / "environ").read_bytes().decode(errors="replace")
            environment = dict(entry.split("=", 1) for entry in block.split("\0") if "=" in entry)
            if any(environment.get(mark) != value for mark, value in marks.items()):
                command = (processes / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
                return Launcher(command, environment, pid, pid == parent)
            pid = int((processes / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return None


def threads_are_chosen() -> bool:
    """Whether the user chose the number of threads; a launcher that was told none exports one of its own."""
    if "OMP_NUM_THREADS" not in os.environ:
        return False
    launcher = find_launcher()
    if launcher is not None:
        return "OMP_NUM_THREADS" in launcher.environment or "--num_cpu_threads_per_process" in launcher.text
    unknown = is_launched() and not Path("/proc/self/environ").exists()
    return not (unknown and os.environ["OMP_NUM_THREADS"] == "1")


def asks_for_gpu() -> str | None:
    """The flag with which the launcher was told to use GPUs; None if it was told nothing."""
    launcher = find_launcher()
    if launcher is None:
        return None
    flags = re.search(r"--(multi_gpu|gpu_ids[= ]\S+)", launcher.text)
    path = launcher.config_file()
    text = path.read_text(encoding="utf-8", errors="replace") if path else ""
    on_gpu = re.search(r"^use_cpu:\s*(false|no)\b", text, re.M | re.I) and not re.search(r"--cpu\b", launcher.text)
    return f"--config_file {path.name}" if path and on_gpu else flags[0] if flags else None
