"""What happens to a run when something breaks: a table of case, expected and observed, from the real launcher.

    make faults                                  all cases
    make faults ARGS="sigterm damage"            those whose name holds one of the words
    make faults ARGS=docs/faults.md              all cases, and put the table there

Every case starts the real train.py on a tiny model, breaks something, starts the same command again where it should go
on, and compares the result with a run that nothing happened to. Exit code 1 when a row is not as expected. Cases of full
disks mount a small one in a mount namespace of this process, which needs the rights to do so.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import itertools
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from lib.run.checkpoint import list_checkpoints
from lib.run.resume import find_checkpoint
from tests.conftest import ROOT, read_lines, tiny_roberta
from tests.resuming import differences, run_flags

LIMIT = 180
SLOW = {"sleep": 0.4}
EQUAL = "equal to an undisturbed run"
ENOUGH = "does without, or ends and is told"


@dataclasses.dataclass(frozen=True)
class Case:
    """`act` breaks something in a laboratory and says what it saw; `short` ones are part of the tests."""

    name: str
    expected: str
    act: Callable[["Laboratory"], str]
    short: bool = False


class Run:
    """A launched train.py, its log, and all processes that belong to it."""

    def __init__(self, command: list[str], folder: Path, log: Path, env: dict[str, str], **options: Any) -> None:
        """`options` are those of Popen; without other ones the output goes to the log."""
        self.log, self.folder = log, folder
        with self.log.open("ab") as file:
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file, "cwd": ROOT} | options
            self.process = subprocess.Popen(command, env=env, start_new_session=True, **streams)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Everything alive that was started with the folder of this run on its command line."""
        return [p for p in psutil.process_iter(["cmdline"]) if str(self.folder) in (p.info["cmdline"] or [])]

    def python(self) -> psutil.Process:
        """The first training process."""
        own = [
            p for p in self.processes() if "accelerate" not in " ".join(p.cmdline()) and "torchrun" not in p.cmdline()
        ]
        return min(own, key=lambda process: process.pid)

    def wait_for(self, words: str) -> None:
        until(lambda: words in self.text() or self.process.poll() is not None, f"no {words!r}:\n{self.text()[-3000:]}")
        assert words in self.text(), self.text()[-3000:]

    def wait_for_step(self, step: int) -> None:
        """Until metrics.jsonl has the step, for runs whose output nobody sees."""
        path = self.folder / "metrics.jsonl"
        found = lambda: path.exists() and f'"step": {step},' in path.read_text()  # noqa: E731
        until(lambda: found() or self.process.poll() is not None, f"no step {step}:\n{self.text()[-3000:]}")
        assert found(), self.text()[-3000:]

    def wait(self) -> int:
        """The exit code, once no process of the run is left."""
        code = self.process.wait(LIMIT)
        until(lambda: not self.processes(), f"still alive: {self.processes()}", 45)
        return code

    def kill(self) -> None:
        for process in self.processes():
            process.kill()
        self.process.wait(LIMIT)


def until(condition: Callable[[], Any], message: str, seconds: float = LIMIT) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, message
        time.sleep(0.05)


class Laboratory:
    """A folder with a tiny model and data, and runs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.flags = run_flags(folder, tiny_roberta(folder / "roberta"))
        self.numbers = itertools.count()

    def new(self) -> Path:
        return self.folder / f"run-{next(self.numbers)}"

    def start(
        self,
        folder: Path,
        fault: dict[str, Any],
        processes: int,
        *flags: Any,
        launcher: str = "accelerate",
        asked: tuple[Any, ...] = (),
        before: tuple[Any, ...] = (),
        options: dict[str, Any] | None = None,
        **env: str,
    ) -> Run:
        """`asked` are flags of the launcher, `before` is a command that starts it, `options` are those of Popen."""
        commands = {
            "python": [sys.executable],
            "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"],
            "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "2"],
            "node": [sys.executable, "-m", "torch.distributed.run"],
        }
        command = commands[launcher]
        if launcher == "torchrun":
            command = [*command, "--nproc-per-node", str(processes)]
        elif processes > 1:
            command = [*command[:3], "--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
        script = ROOT / "tests" / "workers" / "faulty.py"
        words = [*before, *command, *asked, script, json.dumps(fault), *self.flags, "--logging_steps", 1, *flags]
        words += ["--output_dir", folder]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10"}
        log = self.folder / f"log-{next(self.numbers)}"
        return Run(list(map(str, words)), folder, log, environment | env, **(options or {}))

    def finish(self, folder: Path, processes: int, *flags: Any, fault: dict[str, Any] | None = None, **env: Any) -> Run:
        """A run to its end."""
        run = self.start(folder, fault or {}, processes, *flags, **env)
        code = run.wait()
        assert code == 0, f"exit code {code}\n{run.text()[-3000:]}"
        return run

    @functools.cache  # noqa: B019 - there is one laboratory
    def reference(self, processes: int) -> Path:
        folder = self.new()
        self.finish(folder, processes)
        return folder

    def verdict(self, folder: Path, processes: int) -> str:
        found = self.differences(folder, processes)
        return f"differs in {', '.join(found)}" if found else EQUAL

    def differences(self, folder: Path, processes: int) -> list[str]:
        return differences(self.reference(processes), folder, frozenset({"eval_batch_size", "run_id", "run/notes"}))

    def losses(self, folder: Path) -> list[float]:
        return [line["train/loss"] for line in read_lines(folder / "metrics.jsonl")]

    def near(self, folder: Path, processes: int) -> str:
        """For runs whose dropout differs because memory was short: every step once, about the same loss."""
        a, b = self.losses(self.reference(processes)), self.losses(folder)
        same = len(a) == len(b) and all(abs(x - y) < 0.2 for x, y in zip(a, b, strict=True))
        return "every step once, same losses but for dropout" if same else f"{a}\n{b}"


# ---------------------------------------------------------------------------------------------------- signals


def signalled(lab: Laboratory, name: str, processes: int, workers: int, target: str) -> str:
    """A signal to the launcher alone, as `kill` and Slurm send it, or to its whole group, as a terminal does."""
    folder = lab.new()
    flags = ["--dataloader_num_workers", workers]
    run = lab.start(folder, SLOW, processes, *flags)
    run.wait_for("step 4/")
    number = signal.Signals[name]
    if target == "group":
        os.killpg(run.process.pid, number)
    else:
        run.process.send_signal(number)
    run.wait()
    saved = was_saved(folder)
    lab.finish(folder, processes, *flags)
    return f"{saved}, no orphan, {lab.verdict(folder, processes)}"


def was_saved(folder: Path) -> str:
    names = [path.name for path in list_checkpoints(folder / "checkpoints")]
    return "saved" if any(name.endswith("-pending") for name in names) else f"not saved ({names})"


def exit_code(lab: Laboratory, *flags: Any) -> str:
    folder = lab.new()
    run = lab.start(folder, SLOW, 1, *flags, launcher="python")
    if not flags:
        run.wait_for("step 2/")
        run.process.terminate()
    code = run.wait()
    lab.finish(folder, 1, "--max_minutes", 9)
    return f"code {code}, {lab.verdict(folder, 1)}"


def second_signal(lab: Laboratory) -> str:
    run = lab.start(lab.new(), {"sleep": 60}, 1, launcher="python")
    run.wait_for("model  ")
    until(lambda: (run.folder / "heartbeats").exists(), "training did not start")
    time.sleep(1)
    run.process.terminate()
    time.sleep(1.5)
    run.process.terminate()
    started = time.monotonic()
    code = run.wait()
    return f"code {code} within 2 s" if time.monotonic() - started < 2 else "late"


def launcher_killed(lab: Laboratory, processes: int) -> str:
    folder = lab.new()
    run = lab.start(folder, SLOW, processes, "--dataloader_num_workers", 2)
    run.wait_for("step 4/")
    run.process.kill()
    run.wait()
    lab.finish(folder, processes, "--dataloader_num_workers", 2)
    return f"no orphan, {lab.verdict(folder, processes)}"


def restarted(lab: Laboratory, do: str) -> str:
    """`torchrun --max-restarts` starts the script again by itself."""
    folder = lab.new()
    fault = {"do": do, "step": 7, "rank": 1, "once": str(folder) + ".once"}
    lab.finish(folder, 2, "--save_steps", 2, fault=fault, launcher="torchrun")
    return lab.verdict(folder, 2)


# ---------------------------------------------------------------------------------------------------- files


def damaged(lab: Laboratory, how: str) -> str:
    """The newest checkpoint is damaged; the run is started again."""
    folder = lab.new()
    shutil.copytree(lab.reference(1), folder, ignore=shutil.ignore_patterns("results.json"))
    newest = list_checkpoints(folder / "checkpoints")[0]
    weights = newest / "model.safetensors"
    if how == "truncated":
        os.truncate(weights, 100)
    elif how == "flipped":
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif how == "missing":
        (newest / "optimizer.pt").unlink()
    elif how == "unlisted":
        (newest / "manifest.json").unlink()
    elif how == "foreign":
        for name in ("latest", ".DS_Store", "step-99.tmp", "step-x"):
            (folder / "checkpoints" / name).mkdir()
        (folder / "checkpoints" / "step-77").write_text("no folder")
    run = lab.start(folder, {}, 1, "--resume_from_checkpoint", "must", launcher="python")
    code = run.wait()
    if code:
        return f"code {code}, {'named' if f'{newest} is damaged' in run.text() else 'not named'}"
    return lab.verdict(folder, 1)


def no_space(lab: Laboratory, fault: dict[str, Any]) -> str:
    """The disk has no room for a later checkpoint; then it has."""
    folder = lab.new()
    run = lab.start(folder, SLOW, 2, "--max_minutes", 60, "--save_steps", 2)
    run.wait_for("step 5/")
    run.process.terminate()
    run.wait()
    before = find_checkpoint("must", folder / "checkpoints")
    run = lab.start(folder, fault, 2)
    code, after = run.wait(), find_checkpoint("must", folder / "checkpoints")
    told = "told" if "could not be saved" in run.text() and 'train.py", line' not in run.text() else "not told"
    assert code, run.text()[-3000:]
    lab.finish(folder, 2)
    return f"{told}, {'the one before stays' if before == after else 'lost'}, {lab.verdict(folder, 2)}"


# ---------------------------------------------------------------------------------------------------- numbers, memory


def out_of_memory(lab: Laboratory, do: str) -> str:
    folder = lab.new()
    room = 24 if do == "eval_oom" else 1  # positions, enough for one of the longest samples but not for two; samples
    run = lab.finish(folder, 2, fault={"do": do, "rank": 1, "step": 3, "size": room})
    told = "told" if "out of memory" in run.text() else "not told"
    return f"{told}, {lab.verdict(folder, 2) if do == 'eval_oom' else lab.near(folder, 2)}"


def no_memory_at_all(lab: Laboratory) -> str:
    run = lab.start(lab.new(), {"do": "oom", "rank": 1, "step": 3, "size": 0}, 2)
    code = run.wait()
    return f"{'ends' if code else 'goes on'}, {'told' if 'with a single sample' in run.text() else 'not told'}"


def not_a_number(lab: Laboratory) -> str:
    folder = lab.new()
    run = lab.start(folder, {"do": "nan", "rank": 1, "step": 5}, 2, "--save_steps", 2)
    code = run.wait()
    told = "step 5 (learning rate" in run.text() and "rows " in run.text()
    checkpoint = find_checkpoint("must", folder / "checkpoints")
    assert checkpoint is not None
    lab.finish(folder, 2)
    return f"{'ends' if code else 'goes on'}, {'told' if told else 'not told'}, {checkpoint.name}, {lab.verdict(folder, 2)}"


# ---------------------------------------------------------------------------------------------------- hanging


def frozen(lab: Laboratory, rank: int) -> str:
    run = lab.start(lab.new(), {"do": "freeze", "rank": rank, "step": 4}, 2, "--ddp_timeout", 6)
    code = run.wait()
    named = f"process {rank} (" in run.text() and "step 4, " in run.text() and "frozen or dead" in run.text()
    stacks = "train_step" in run.text()
    return (
        f"{'ends' if code else 'goes on'}, {'named' if named else 'not named'}, {'stacks' if stacks else 'no stacks'}"
    )


def one_raises(lab: Laboratory) -> str:
    run = lab.start(lab.new(), {"do": "raise", "rank": 1, "step": 4}, 2)
    return "ends, no orphan" if run.wait() else "goes on"


def long_tokenisation(lab: Laboratory) -> str:
    folder = lab.new()
    lab.finish(folder, 2, "--ddp_timeout", 4, fault={"tokenize": 12})
    return lab.verdict(folder, 2)


def tracker_down(lab: Laboratory, kind: str) -> str:
    """A W&B server that refuses, or that accepts and says nothing; the run is interrupted in between."""
    folder, server = lab.new(), socket.socket()
    server.bind(("127.0.0.1", 0))
    if kind == "hanging":
        server.listen()
    env = {
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}",
    }
    run = lab.start(folder, SLOW, 1, "--report_to", "wandb", **env)
    run.wait_for("step 4/")
    run.process.terminate()
    run.wait()
    lab.finish(folder, 1, "--report_to", "wandb", **env)
    server.close()
    ids = {path.name.rpartition("-")[2] for path in (folder / "wandb").glob("*run-*")}
    return f"{len(ids)} tracker run, {lab.verdict(folder, 1)}"


# ---------------------------------------------------------------------------------------------------- terminal, workers


class Reader:
    """Reads what a run writes to a pipe or a terminal, into its log, until `leave` closes this end."""

    def __init__(self, descriptor: int, log: Path) -> None:
        self.descriptor, self.log, self.left = descriptor, log, threading.Event()
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self) -> None:
        with contextlib.suppress(OSError), self.log.open("ab") as file:
            while not self.left.is_set():
                if select.select([self.descriptor], [], [], 0.02)[0]:
                    part = os.read(self.descriptor, 65536)
                    if not part:
                        break
                    file.write(part)
                    file.flush()
        self.left.wait(LIMIT)
        os.close(self.descriptor)

    def leave(self) -> None:
        self.left.set()
        self.thread.join()


def start_read(
    lab: Laboratory, folder: Path, fault: dict[str, Any], processes: int, *flags: Any, kind: str = "pipe", **more: Any
) -> tuple[Run, Reader]:
    """A run that writes to a pipe, or to a terminal of its own, which the reader can close."""
    mine, other = os.openpty() if kind == "terminal" else os.pipe()
    options: dict[str, Any] = {"stdout": other, "stderr": other}
    if kind == "terminal":
        options |= {"stdin": other, "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)}
    run = lab.start(folder, fault, processes, *flags, options=options, **more)
    os.close(other)
    return run, Reader(mine, run.log)


def hung_up(lab: Laboratory, processes: int) -> str:
    """The terminal goes away, as when an ssh connection drops: SIGHUP, then errors for whoever writes there."""
    folder = lab.new()
    run, reader = start_read(lab, folder, SLOW, processes, kind="terminal")
    run.wait_for_step(4)
    reader.leave()
    run.wait()
    saved = was_saved(folder)
    lab.finish(folder, processes)
    return f"{saved}, no orphan, {lab.verdict(folder, processes)}"


def nohup(lab: Laboratory, processes: int, how: str) -> str:
    folder = lab.new()
    if how == "terminal":
        run, reader = start_read(lab, folder, SLOW, processes, kind="terminal", before=("nohup",))
    else:
        run = lab.start(folder, SLOW, processes, before=("nohup",))
    run.wait_for_step(4)
    if how == "terminal":
        reader.leave()
    else:
        os.killpg(run.process.pid, signal.SIGHUP)
    if run.wait():
        saved = was_saved(folder)
        lab.finish(folder, processes)
        return f"{saved}, {lab.verdict(folder, processes)}"
    return f"goes on, {lab.verdict(folder, processes)}"


def unread(lab: Laboratory, processes: int, how: str) -> str:
    """Nobody reads what the run prints."""
    folder = lab.new()
    if how == "/dev/full":
        with Path(how).open("w") as full:
            run = lab.start(folder, SLOW, processes, options={"stdout": full, "stderr": full})
    else:
        run, reader = start_read(lab, folder, SLOW, processes)
        run.wait_for_step(4)
        reader.leave()
    code = run.wait()
    end = f"goes on, {lab.verdict(folder, processes)}" if (folder / "results.json").exists() else "ends"
    return f"code {code}, {end}" if code else end


def raises_with_workers(lab: Laboratory, processes: int, rank: int) -> str:
    fault = {"do": "raise", "rank": rank, "step": 4}
    run = lab.start(lab.new(), fault, processes, "--dataloader_num_workers", 2)
    run.wait_for_step(3)
    code = run.process.wait(45)
    code = run.wait()
    named = "named" if processes == 1 or re.search(rf"process {rank}\b", run.text()) else "not named"
    return f"{'ends' if code else 'goes on'}, no orphan, {named}" + ("" if "a fault" in run.text() else ", not told")


def no_room_for_batches(lab: Laboratory, processes: int, what: str) -> str:
    """Workers of a data loader have no room in /dev/shm, or TMPDIR is too long for the path of a socket."""
    folder, before, env = lab.new(), (), {}
    if what == "/dev/shm":
        before = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=8k tmpfs /dev/shm && exec "$@"', "sh")
    else:
        env = {"TMPDIR": str(lab.folder / ("x" * 120))}
        Path(env["TMPDIR"]).mkdir(exist_ok=True)
    run = lab.start(folder, {}, processes, "--dataloader_num_workers", 2, before=before, **env)
    if run.wait() == 0:
        verdict = lab.verdict(folder, processes)
        return ENOUGH if verdict == EQUAL else verdict
    return ENOUGH if "--dataloader_num_workers 0" in run.text() else f"ends, not told: {run.text()[-500:]}"


# ---------------------------------------------------------------------------------------------------- disks


@functools.cache
def own_mounts() -> None:
    """What this process mounts from now on is seen by it and its children only. Raises OSError without the right to it."""
    CLONE_NEWNS = 0x20000
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "no right to mount a small disk")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True, capture_output=True)


@contextlib.contextmanager
def small_disk(lab: Laboratory) -> Iterator[Path]:
    """An empty disk of eight MiB."""
    own_mounts()
    disk = lab.folder / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True, capture_output=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all room."""
    path = disk / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return path


def full_at_restart(lab: Laboratory, processes: int, disk: Path | None = None) -> str:
    """`disk` is full; without one, no file can be as long as config.yaml."""
    folder = (disk or lab.folder) / lab.new().name
    run = lab.start(folder, SLOW, processes)
    run.wait_for_step(4)
    run.process.terminate()
    run.wait()
    before = (folder / "config.yaml").read_bytes()
    filler = fill(disk) if disk else None
    run, _ = start_read(lab, folder, {} if disk else {"file_bytes": len(before) // 2}, processes)
    code = run.wait()
    words = "No space left|could not be saved|cannot be written|File too large"
    told = "told" if code and re.search(words, run.text()) else "not told"
    stays = "config.yaml stays" if (folder / "config.yaml").read_bytes() == before else "config.yaml lost"
    if filler:
        filler.unlink()
    run = lab.finish(folder, processes)
    resumed = "resumed" if "resumed from" in run.text() else "started anew"
    return f"{told}, {stays}, {resumed}, {lab.verdict(folder, processes)}"


def full_disk_at_restart(lab: Laboratory, processes: int) -> str:
    with small_disk(lab) as disk:
        return full_at_restart(lab, processes, disk)


def full_at_log(lab: Laboratory, processes: int) -> str:
    """metrics.jsonl cannot grow for two steps: a limit of the size of files does to it what a full disk does."""
    folder = lab.new()
    run, _ = start_read(lab, folder, {"sleep": 1.0}, processes)
    run.wait_for_step(4)
    process = run.python()
    _, hard = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, ((folder / "metrics.jsonl").stat().st_size + 10, hard))
    until(lambda: "step 5/" in run.text() or run.process.poll() is not None, "no step 5")
    if run.process.poll() is None:
        process.rlimit(psutil.RLIMIT_FSIZE, (hard, hard))
    code = run.wait()
    if code:
        return f"code {code}: {run.text()[-500:]}"
    others = [name for name in lab.differences(folder, processes) if name != "metrics.jsonl"]
    told = "told" if "metrics.jsonl" in run.text() else "not told"
    return f"{told}, goes on, {'differs in ' + ', '.join(others) if others else 'everything else equal'}"


def full_at_report(lab: Laboratory, processes: int) -> str:
    folder = lab.new()
    run, _ = start_read(lab, folder, {"report_bytes": 300}, processes)
    code = run.wait()
    told = "told" if code and 'train.py", line' not in run.text() and "File too large" in run.text() else "not told"
    torn = []
    for path in [folder / "results.json", folder / "record.json", *folder.glob("eval-*/*.json*")]:
        try:
            [
                json.loads(text)
                for text in ([path.read_text()] if path.suffix == ".json" else path.read_text().splitlines())
            ]
        except ValueError:
            torn.append(path.name)
        except FileNotFoundError:
            pass
    lab.finish(folder, processes)
    return f"{told}, {'torn: ' + ', '.join(torn) if torn else 'nothing torn'}, {lab.verdict(folder, processes)}"


# ---------------------------------------------------------------------------------------------------- locks


def two_starts(lab: Laboratory, processes: int, fault: dict[str, Any]) -> str:
    """The same command twice at the same moment."""
    folder = lab.new()
    runs = [lab.start(folder, SLOW | fault, processes) for _ in range(2)]
    codes = [run.process.wait(LIMIT) for run in runs]
    if sorted(map(bool, codes)) != [False, True]:
        return f"codes {codes}: {runs[0].text()[-500:]}{runs[1].text()[-500:]}"
    refused = runs[0 if codes[0] else 1].text()
    named = "refused" if "in use by" in refused and 'train.py", line' not in refused else f"ends: {refused[-500:]}"
    return f"one {named}, {lab.verdict(folder, processes)}"


def holder_killed(lab: Laboratory, processes: int, fault: dict[str, Any]) -> str:
    folder = lab.new()
    run = lab.start(folder, SLOW | fault, processes)
    run.wait_for_step(4)
    run.kill()
    lab.finish(folder, processes, fault=fault)
    return lab.verdict(folder, processes)


# ---------------------------------------------------------------------------------------------------- files of a run


def model_deleted(lab: Laboratory, processes: int) -> str:
    folder = lab.new()
    run = lab.start(folder, SLOW, processes)
    run.wait_for_step(4)
    shutil.rmtree(folder / "model")
    if run.wait():
        lab.finish(folder, processes)
    told = "told" if re.search(r"model\S* (was|is) gone", run.text()) else "not told"
    return f"{told}, {lab.verdict(folder, processes)}"


def renamed(lab: Laboratory, processes: int) -> str:
    folder = lab.new()
    run = lab.start(folder, SLOW, processes)
    run.wait_for_step(4)
    elsewhere = folder.rename(folder.with_name(f"{folder.name}-renamed"))
    code = run.wait()
    told = "told" if "renamed" in run.text() and 'train.py", line' not in run.text() else "not told"
    left = sorted(path.name for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder, ignore_errors=True)
    elsewhere.rename(folder)
    lab.finish(folder, processes)
    nothing = f"made again: {', '.join(left)}" if left else "nothing published"
    return f"{'ends' if code else 'goes on'}, {told}, {nothing}, {lab.verdict(folder, processes)}"


def best_flipped(lab: Laboratory, processes: int, everywhere: bool) -> str:
    """One bit of the best model is flipped in all checkpoints, or also in model/."""
    folder = lab.new()
    run = lab.start(folder, SLOW, processes)
    run.wait_for_step(4)
    run.process.terminate()
    run.wait()
    files = [*(folder / "checkpoints").glob("*/best/model.safetensors")]
    files += [folder / "model" / "model.safetensors"] * everywhere
    for path in {path.stat().st_ino: path for path in files}.values():
        flip(path)
    run = lab.finish(folder, processes)
    told = "told" if re.search("best model .* is (damaged|lost)", run.text()) else "not told"
    resumed = "resumed" if "resumed from" in run.text() else "started anew"
    found = lab.differences(folder, processes)
    lost = {"model.safetensors", "optimizer or schedule", "metrics.jsonl"} & set(found)
    verdict = "the training is equal" if everywhere else EQUAL  # a later evaluation may make the same best model
    if lost or (found and not everywhere):
        verdict = f"differs in {', '.join(found)}"
    return f"{told}, {resumed}, {verdict}"


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file, which keeps its date."""
    date, content = path.stat().st_mtime_ns, bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(date, date))


def changed_between(lab: Laboratory, what: str) -> str:
    """The weights under an adapter, or a label, change while the run is stopped; their files keep size and date."""
    own = Laboratory(lab.new())
    folder, flags = own.new(), ("--adapter", "bottleneck")
    run = own.start(folder, SLOW, 1, *flags)
    run.wait_for_step(4)
    run.process.terminate()
    run.wait()
    if what == "weights":
        flip(own.folder / "roberta" / "model.safetensors")
    else:
        path = own.folder / "train.csv"
        date, rows = path.stat().st_mtime_ns, path.read_text().splitlines()
        rows[1] = rows[1].replace(",bad", ",dull").replace(",good", ",bad").replace(",dull", ",good")
        path.write_text("\n".join(rows) + "\n")
        os.utime(path, ns=(date, date))
    run = own.start(folder, {}, 1, *flags)
    code = run.wait()
    return f"{'refused' if code else 'goes on'}, {'told' if re.search('there, .* now', run.text()) else 'not told'}"


def cache_damaged(lab: Laboratory, how: str) -> str:
    """The prepared data of an earlier run are damaged."""
    folder, cache = lab.new(), lab.new()
    lab.finish(lab.new(), 1, HF_DATASETS_CACHE=str(cache))
    for path in cache.glob("prepared/*/tokens-train*"):
        flip(path) if how == "flipped" else os.truncate(path, path.stat().st_size // 2)
    run = lab.finish(folder, 1, HF_DATASETS_CACHE=str(cache))
    return f"{'told' if 'made again' in run.text() else 'not told'}, {lab.verdict(folder, 1)}"


def cache_unwritable(lab: Laboratory, processes: int, variable: str) -> str:
    folder = lab.new()
    lab.finish(folder, processes, **{variable: "/dev/null/cache"})
    return lab.verdict(folder, processes)


# ---------------------------------------------------------------------------------------------------- launchers


def starter_ends(lab: Laboratory, processes: int) -> str:
    """A script in a folder with a launcher's name starts the run in the background, and ends before it."""
    folder, place = lab.new(), lab.folder / "accelerate-torchrun"
    place.mkdir(exist_ok=True)
    script, go = place / f"{folder.name}.sh", place / f"{folder.name}.go"
    script.write_text(f'"$@" &\nwhile [ ! -e {shlex.quote(str(go))} ]; do sleep 0.1; done\n')
    launcher = "python" if processes == 1 else "accelerate"
    run = lab.start(folder, SLOW, processes, launcher=launcher, before=("bash", script))
    run.wait_for_step(4)
    go.touch()
    run.process.wait(LIMIT)
    until(lambda: not run.processes(), f"still alive: {run.processes()}")
    if not (folder / "results.json").exists():
        return f"ends: {run.text()[-500:]}"
    return f"goes on, {lab.verdict(folder, processes)}"


def time_limit_over_restarts(lab: Laboratory) -> str:
    """Two starts take less than `--max_minutes` each, together they take more."""
    folder = lab.new()
    fault = {"do": "raise", "step": 5, "rank": 1, "once": str(folder) + ".once", "sleep": 3.0}
    run = lab.start(folder, fault, 2, "--save_steps", 1, "--max_minutes", 0.6, launcher="torchrun")
    code = run.wait()
    stopped = "stopped" if code and "--max_minutes" in run.text() else f"code {code}"
    lab.finish(folder, 2, "--save_steps", 1)
    return f"{stopped}, {lab.verdict(folder, 2)}"


def refused(lab: Laboratory, processes: int, word: str, asked: tuple[Any, ...] = (), **env: str) -> str:
    """Whether a launch is refused by the name of its setting before data are prepared; else what comes of it."""
    folder = lab.new()
    cache = folder.with_suffix(".cache")
    run = lab.start(folder, {}, processes, asked=asked, HF_DATASETS_CACHE=str(cache), **env)
    if run.wait() == 0:
        return lab.verdict(folder, processes)
    early = "before data" if not cache.exists() else "after data"
    traced = ", with a trace" if 'train.py", line' in run.text() else ""
    return f"refused {early}, {'named' if word.lower() in run.text().lower() else 'not named: ' + run.text()[-500:]}{traced}"


def own_default(lab: Laboratory, processes: int, word: str, settings: str) -> str:
    """`accelerate config` of the user has chosen something that is not followed here."""
    home = lab.new()
    (home / "accelerate").mkdir(parents=True)
    several = "MULTI_GPU" if processes > 1 else "'NO'"
    lines = ["compute_environment: LOCAL_MACHINE", f"distributed_type: {several}", f"num_processes: {processes}"]
    lines += ["num_machines: 1", "machine_rank: 0", "use_cpu: true", settings]
    (home / "accelerate" / "default_config.yaml").write_text("\n".join(lines) + "\n")
    return refused(lab, processes, word, HF_HOME=str(home))


def not_shared(lab: Laboratory) -> str:
    """Two machines, each with a folder of its own under the same name."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    runs = []
    for rank in range(2):
        home = lab.new()
        home.mkdir()
        asked = ("--nnodes", 2, "--nproc-per-node", 1, "--node-rank", rank)
        asked += ("--master-addr", "127.0.0.1", "--master-port", port)
        runs.append(lab.start(Path("run"), {}, 1, launcher="node", asked=asked, options={"cwd": home}))
    codes = [run.process.wait(LIMIT) for run in runs]
    told = "told" if any(re.search("machines", run.text()) for run in runs) else f"not told: {runs[0].text()[-500:]}"
    stepped = "trained" if any("step 1/" in run.text() for run in runs) else "before the first step"
    return f"{'both end' if all(codes) else f'codes {codes}'}, {stepped}, {told}"


def cases() -> Iterator[Case]:
    yield from cases_of_signals()
    yield from cases_of_surroundings()
    yield from cases_of_files()
    yield from cases_of_launches()
    yield from cases_of_numbers()


def cases_of_signals() -> Iterator[Case]:
    fine = f"saved, no orphan, {EQUAL}"
    for name, target in itertools.product(("SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1"), ("launcher", "group")):
        for processes, workers in itertools.product((1, 2), (0, 2)):
            if name in ("SIGINT", "SIGUSR1") and (processes > 1) != (workers > 0):
                continue  # fewer of those that are handled alike
            title = f"{name} to the {target}, {processes} processes, {workers} loader workers"
            act = functools.partial(signalled, name=name, processes=processes, workers=workers, target=target)
            yield Case(title, fine, act)
    yield Case("SIGTERM, plain python", f"code 75, {EQUAL}", exit_code)
    yield Case("--max_minutes", f"code 75, {EQUAL}", lambda lab: exit_code(lab, "--max_minutes", 0.001), True)
    yield Case("a second signal", "code 143 within 2 s", second_signal, True)
    for count in (1, 2):
        act = functools.partial(launcher_killed, processes=count)
        yield Case(f"SIGKILL of the launcher, {count} processes", f"no orphan, {EQUAL}", act)
    for count in (1, 2):
        act = functools.partial(restarted, do="kill" if count == 1 else "raise")
        what = "is killed" if count == 1 else "raises"
        yield Case(f"a process {what} under torchrun --max-restarts", EQUAL, act)
    yield Case("--max_minutes over torchrun's restarts", f"stopped, {EQUAL}", time_limit_over_restarts)


def cases_of_surroundings() -> Iterator[Case]:
    for count in (1, 2):
        of = f"{count} processes"
        act: Callable[[Laboratory], str] = functools.partial(hung_up, processes=count)
        yield Case(f"the terminal is closed, {of}", f"saved, no orphan, {EQUAL}", act)
        for how, words in (("signal", "SIGHUP to the group"), ("terminal", "the terminal is closed")):
            act = functools.partial(nohup, processes=count, how=how)
            ends = "goes on" if count == 1 else "saved"  # torchrun, which starts several, takes SIGHUP all the same
            yield Case(f"nohup, {words}, {of}", f"{ends}, {EQUAL}", act)
        for how in ("a closed pipe", "/dev/full"):
            act = functools.partial(unread, processes=count, how=how)
            yield Case(f"stdout and stderr are {how}, {of}", f"goes on, {EQUAL}", act)
        act = functools.partial(raises_with_workers, processes=count, rank=count - 1)
        yield Case(f"a process raises while its loader workers live, {of}", "ends, no orphan, named", act)
        for what in ("/dev/shm", "TMPDIR"):
            act = functools.partial(no_room_for_batches, processes=count, what=what)
            why = "/dev/shm of two pages" if what == "/dev/shm" else "TMPDIR too long for a socket"
            yield Case(f"loader workers, {why}, {of}", ENOUGH, act)
        stays = f"told, config.yaml stays, resumed, {EQUAL}"
        act = functools.partial(full_disk_at_restart, processes=count)
        yield Case(f"the disk is full at a restart, {of}", stays, act)
        act = functools.partial(full_at_restart, processes=count)
        yield Case(f"config.yaml cannot be written at a restart, {of}", stays, act)
        goes_on = "told, goes on, everything else equal"
        yield Case(f"metrics.jsonl cannot be written, {of}", goes_on, functools.partial(full_at_log, processes=count))
        act = functools.partial(full_at_report, processes=count)
        yield Case(f"the report cannot be written, {of}", f"told, nothing torn, {EQUAL}", act)
        for locks in (True, False):
            fault, where = {} if locks else {"locks": False}, "locks" if locks else "no locks"
            act = functools.partial(two_starts, processes=count, fault=fault)
            yield Case(f"two starts at the same moment, {where}, {of}", f"one refused, {EQUAL}", act)
            act = functools.partial(holder_killed, processes=count, fault=fault)
            yield Case(f"who has the lock is killed, {where}, {of}", EQUAL, act)


def cases_of_files() -> Iterator[Case]:
    for count in (1, 2):
        of = f"{count} processes"
        act: Callable[[Laboratory], str] = functools.partial(model_deleted, processes=count)
        yield Case(f"model/ is deleted meanwhile, {of}", f"told, {EQUAL}", act)
        act = functools.partial(renamed, processes=count)
        yield Case(f"the run's folder is renamed meanwhile, {of}", f"ends, told, nothing published, {EQUAL}", act)
        for everywhere in (False, True):
            act = functools.partial(best_flipped, processes=count, everywhere=everywhere)
            left = "the training is equal" if everywhere else EQUAL
            where = "all checkpoints and model/" if everywhere else "all checkpoints"
            yield Case(f"a bit of the best model flips in {where}, {of}", f"told, resumed, {left}", act)
        for variable in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
            act = functools.partial(cache_unwritable, processes=count, variable=variable)
            yield Case(f"{variable} cannot be written, {of}", EQUAL, act)
    for what in ("weights", "label"):
        act = functools.partial(changed_between, what=what)
        words = "the weights under an adapter change" if what == "weights" else "a label changes"
        yield Case(f"{words} before a restart, same size and date", "refused, told", act)
    for how in ("flipped", "truncated"):
        yield Case(f"prepared data {how}", f"told, {EQUAL}", functools.partial(cache_damaged, how=how))
    for how in ("truncated", "flipped", "missing", "unlisted"):
        act = functools.partial(damaged, how=how)
        yield Case(f"the only checkpoint damaged: {how}", "code 2, named", act, how == "flipped")
    yield Case("foreign files among the checkpoints", EQUAL, functools.partial(damaged, how="foreign"))
    stays = f"told, the one before stays, {EQUAL}"
    yield Case("no space: a write fails", stays, lambda lab: no_space(lab, {"file_bytes": 50_000}))
    yield Case("no space: too little free", stays, lambda lab: no_space(lab, {"free": 1000}))


def cases_of_launches() -> Iterator[Case]:
    named = "refused before data, named"
    for count in (1, 2):
        of = f"{count} processes"
        act: Callable[[Laboratory], str] = functools.partial(starter_ends, processes=count)
        yield Case(f"the script that started the run ends, {of}", f"goes on, {EQUAL}", act)
        act = functools.partial(refused, processes=count, word="dynamo", asked=("--dynamo_backend", "inductor"))
        yield Case(f"accelerate launch --dynamo_backend inductor, {of}", named, act)
        act = functools.partial(refused, processes=count, word="fp8", asked=("--mixed_precision", "fp8"))
        yield Case(f"accelerate launch --mixed_precision fp8, {of}", named, act)
        for word, variables in (
            ("FSDP", {"ACCELERATE_USE_FSDP": "true"}),
            ("DeepSpeed", {"ACCELERATE_USE_DEEPSPEED": "true"}),
            ("parallelism", {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}),
        ):
            act = functools.partial(refused, processes=count, word=word, **variables)
            yield Case(f"{next(iter(variables))}=true, {of}", named, act)
        act = functools.partial(refused, processes=count, word="", ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
        yield Case(f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4, {of}", EQUAL, act)
        settings = "dynamo_config:\n  dynamo_backend: INDUCTOR"
        act = functools.partial(own_default, processes=count, word="dynamo", settings=settings)
        yield Case(f"dynamo in the user's default_config.yaml, {of}", named, act)
    act = functools.partial(refused, processes=1, word="--num_processes", asked=("--cpu", "--num_processes", 2))
    yield Case("accelerate launch --cpu --num_processes 2", named, act)
    yield Case("two machines without a shared disk", "both end, before the first step, told", not_shared)


def cases_of_numbers() -> Iterator[Case]:
    near = "told, every step once, same losses but for dropout"
    yield Case("out of memory in a forward of one process", near, lambda lab: out_of_memory(lab, "oom"))
    yield Case("out of memory in a backward of one process", near, lambda lab: out_of_memory(lab, "oom_backward"))
    yield Case(
        "out of memory in evaluation of one process", f"told, {EQUAL}", lambda lab: out_of_memory(lab, "eval_oom")
    )
    yield Case("out of memory with one sample", "ends, told", no_memory_at_all)
    yield Case("a loss that is not finite on one process", f"ends, told, step-4, {EQUAL}", not_a_number)
    for rank in (0, 1):
        act = functools.partial(frozen, rank=rank)
        yield Case(f"process {rank} is frozen", "ends, named, stacks", act)
    yield Case("one process raises", "ends, no orphan", one_raises)
    yield Case("tokenisation longer than --ddp_timeout", EQUAL, long_tokenisation)
    for kind in ("refusing", "hanging"):
        act = functools.partial(tracker_down, kind=kind)
        yield Case(f"W&B server {kind}, run interrupted", f"1 tracker run, {EQUAL}", act)


def observe(case: Case, lab: Laboratory) -> str:
    try:
        return case.act(lab)
    except (AssertionError, subprocess.SubprocessError, OSError, psutil.Error) as error:
        return " ".join(f"{type(error).__name__}: {str(error)[-600:]}".replace("|", "/").split())


def main(*words: str) -> int:
    page = Path(words[0]) if words and words[0].endswith(".md") else None
    words = words[1:] if page else words
    chosen = [case for case in cases() if not words or any(word.lower() in case.name.lower() for word in words)]
    bad, lines = 0, ["| case | expected | observed | s |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        lab = Laboratory(Path(folder))
        print(*lines, sep="\n", flush=True)
        for case in chosen:
            started = time.monotonic()
            seen = observe(case, lab)
            bad += seen != case.expected
            mark = "as expected" if seen == case.expected else f"**{seen}**"
            lines.append(f"| {case.name} | {case.expected} | {mark} | {time.monotonic() - started:.0f} |")
            print(lines[-1], flush=True)
    print(f"\n{len(chosen)} cases, {bad} not as expected")
    if page:
        text = page.read_text(encoding="utf-8")
        page.write_text(re.sub(r"(?m)^\| case (.*\n\|)*.*", lambda _: "\n".join(lines), text), encoding="utf-8")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
