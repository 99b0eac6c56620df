"""Places where a run can be started: a GPU that nobody else uses, or a share of the cores of a CPU."""

import contextlib
import csv
import dataclasses
import fcntl
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lib.errors import UserError, first_line
from lib.runtime.cpu.tuning import allowed_cores
from lib.runtime.launch_checks import MPI_SIZES, truth
from lib.runtime.launcher import threads_are_chosen

LOCKS = Path("/tmp")
"""Where the locks of GPUs are, `gpu-UUID.lock`: the same folder for all users, whatever their TMPDIR."""

OWN_MIB = 1024
"""MiB on a GPU that its driver and its screen may take; with more, another program computes there."""

LAUNCHED = {*MPI_SIZES, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
"""Variables by which a process knows that it is one of several; a run is not, though srun may have started its sweep."""

OF_ONE_RUN = {
    *("WANDB_RUN_ID", "WANDB_NAME", "WANDB_RESUME", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH"),
    *("SWANLAB_RUN_ID", "SWANLAB_RUN_RESUME", "SWANLAB_RESUME", "SWANLAB_EXPERIMENT_NAME", "SWANLAB_EXP_NAME"),
}
"""Variables of a tracker that name one run: all runs of a sweep would be that one. Project, group and tags are for all."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU of this machine."""

    index: str
    uuid: str


@dataclasses.dataclass
class Slot:
    """A place for one run, taken from `Slots.take` to `release`; `variables` lead a process to it.

    `lock` is the descriptor of the lock on a GPU. The process that is started inherits it, so that the GPU is taken as
    long as that process lives, and free when it ends, however it ends.
    """

    name: str
    variables: dict[str, str]
    lock: int | None = None

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen:
        """Start a command here, in a session of its own; its output goes to the end of `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={k: v for k, v in os.environ.items() if k not in LAUNCHED | OF_ONE_RUN} | self.variables,
                pass_fds=() if self.lock is None else (self.lock,),
                start_new_session=True,  # Ctrl-C is for the sweep, which passes it on
            )
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None
        return process


class Slots:
    """The places that may be used at once, at most `count` of them: `gpus`, or shares of the CPU where there are none."""

    def __init__(self, gpus: Sequence[Gpu], count: int) -> None:
        self.gpus, self.count = gpus, count
        self.taken: list[Slot] = []

    @property
    def description(self) -> str:
        """The places in words."""
        kind = "GPU" if self.gpus else "run"
        return f"{self.count} {kind}{'s' if self.count > 1 else ''} at a time"

    def take(self) -> Slot | None:
        """A place that nobody uses now; None if there is none."""
        if len(self.taken) >= self.count:
            return None
        if not self.gpus:
            threads = (
                {}
                if self.count == 1 or threads_are_chosen()
                else {"OMP_NUM_THREADS": str(max(1, allowed_cores() // self.count))}
            )
            slot = Slot("CPU", threads)
        else:
            in_use = busy_gpus() | {slot.name for slot in self.taken}
            found = (lock_gpu(gpu) for gpu in self.gpus if gpu.uuid not in in_use)
            taken = next((slot for slot in found if slot is not None), None)
            if taken is None:
                return None
            slot = taken
        self.taken.append(slot)
        return slot

    def give_back(self, slot: Slot) -> None:
        self.taken.remove(slot)


def find_slots(wanted: str, most: int | None) -> Slots:
    """The places for runs: the GPUs of `wanted` (`all`, `free:N` or numbers), or without a GPU one run at a time.

    `most` runs at a time, if it is given. Raises UserError for a GPU that is not there.
    """
    visible = visible_gpus()
    if wanted == "all":
        gpus, count = visible, len(visible)
    elif wanted.startswith("free:"):
        gpus, count = visible, int(wanted[5:])
        if count > len(visible):
            raise UserError(
                f"--gpus {wanted}: this machine shows {len(visible)} GPUs (CUDA_VISIBLE_DEVICES, nvidia-smi -L)"
            )
    else:
        gpus = [find_gpu(name, visible) for name in wanted.split(",")]
        count = len(gpus)
    return Slots(gpus, most if most and (most < count or not gpus) else max(1, count))


def find_gpu(name: str, gpus: Sequence[Gpu]) -> Gpu:
    """The GPU of a number or UUID. Raises UserError if it is not among `gpus`."""
    found = next((gpu for gpu in gpus if name == gpu.index or (len(name) > 4 and gpu.uuid.startswith(name))), None)
    if found is None:
        known = ", ".join(gpu.index for gpu in gpus) or "none"
        raise UserError(
            f"--gpus {name}: no such GPU; this machine shows: {known} (CUDA_VISIBLE_DEVICES, nvidia-smi -L)"
        )
    return found


def visible_gpus() -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, by number in the order of the bus or by UUID; without it, all."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if truth("ACCELERATE_USE_CPU"):
        return []
    gpus = [Gpu(index, uuid) for index, uuid in ask("--query-gpu=index,uuid")]
    if named is None:
        return gpus
    names = [name.strip() for name in named.split(",") if name.strip()]
    if any(name.startswith("MIG-") for name in names):  # parts of a GPU, which nvidia-smi does not list here
        return [Gpu(name, name) for name in names]
    return [gpu for name in names for gpu in gpus if name == gpu.index or (len(name) > 4 and gpu.uuid.startswith(name))]


def busy_gpus() -> set[str]:
    """The UUIDs of the GPUs on which programs have memory; "0 % busy" would not do: a waiting program has its memory, too."""
    computing = {uuid for uuid, _ in ask("--query-compute-apps=gpu_uuid,pid")}
    return computing | {
        uuid for uuid, used in ask("--query-gpu=uuid,memory.used") if used.isdigit() and int(used) > OWN_MIB
    }


def ask(query: str) -> list[list[str]]:
    """The rows that nvidia-smi gives for a query; none without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        raise UserError("nvidia-smi does not answer; without GPUs: ACCELERATE_USE_CPU=true") from None
    if done.returncode:
        return []
    return [[cell.strip() for cell in row] for row in csv.reader(done.stdout.splitlines()) if row]


def lock_gpu(gpu: Gpu) -> Slot | None:
    """Take the lock of a GPU; None if another sweep, of anybody, has it."""
    path = LOCKS / f"gpu-{gpu.uuid}.lock"
    try:
        with contextlib.suppress(FileExistsError):
            fresh = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0o444)
            os.fchmod(fresh, 0o444)  # open to all users, whatever the umask
            os.close(fresh)
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise UserError(f"the lock of GPU {gpu.index} cannot be opened: {first_line(error)}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return Slot(gpu.uuid, {"CUDA_VISIBLE_DEVICES": gpu.uuid, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, lock)
