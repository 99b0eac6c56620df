"""What happens to a run when something breaks: a table of case, expected and observed, from the real launcher.

    make faults                                  all cases
    make faults ARGS="sigterm damage"            those whose name holds one of the words

Every case starts the real train.py on a tiny model, breaks something, starts the same command again where it should go
on, and compares the result with a run that nothing happened to. Exit code 1 when a row is not as expected.
"""

import dataclasses
import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
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


@dataclasses.dataclass(frozen=True)
class Case:
    """`act` breaks something in a laboratory and says what it saw; `short` ones are part of the tests."""

    name: str
    expected: str
    act: Callable[["Laboratory"], str]
    short: bool = False


class Run:
    """A launched train.py, its log, and all processes that belong to it."""

    def __init__(self, command: list[str], folder: Path, env: dict[str, str]) -> None:
        self.log, self.folder = folder.with_suffix(".log"), folder
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env, cwd=ROOT, start_new_session=True
            )

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
        self.flags = run_flags(folder, tiny_roberta(folder / "roberta"))
        self.numbers = itertools.count()

    def new(self) -> Path:
        return self.folder / f"run-{next(self.numbers)}"

    def start(
        self, folder: Path, fault: dict[str, Any], processes: int, *flags: Any, launcher: str = "accelerate", **env: str
    ) -> Run:
        commands = {
            "python": [sys.executable],
            "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"],
            "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "2"],
        }
        command = commands[launcher]
        if launcher == "torchrun":
            command = [*command, "--nproc-per-node", str(processes)]
        elif processes > 1:
            command = [*command[:3], "--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
        script = ROOT / "tests" / "workers" / "faulty.py"
        words = [*command, script, json.dumps(fault), *self.flags, "--logging_steps", 1, *flags, "--output_dir", folder]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10"}
        return Run(list(map(str, words)), folder, environment | env)

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
        found = differences(self.reference(processes), folder, frozenset({"eval_batch_size", "run_id"}))
        return f"differs in {', '.join(found)}" if found else EQUAL

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
    names = [path.name for path in list_checkpoints(folder / "checkpoints")]
    saved = "saved" if any(name.endswith("-pending") for name in names) else f"not saved ({names})"
    lab.finish(folder, processes, *flags)
    return f"{saved}, no orphan, {lab.verdict(folder, processes)}"


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


def killed_at_random(lab: Laboratory, processes: int, times: int) -> str:
    """SIGKILL to everything, at a moment drawn anew each time, until `times` kills are done; then to the end."""
    folder, rng = lab.new(), random.Random(processes)
    for _ in range(times):
        run = lab.start(folder, {"sleep": 0.3}, processes, "--save_steps", 1)
        until(lambda run=run: (folder / "heartbeats").exists() or run.process.poll() is not None, "no training")
        if run.process.poll() is not None:
            assert run.process.returncode == 0, run.text()[-3000:]
        time.sleep(rng.uniform(0, 1.2))
        run.kill()
        shutil.rmtree(folder / "heartbeats", ignore_errors=True)
    lab.finish(folder, processes, "--save_steps", 1)
    steps = [line["step"] for line in read_lines(folder / "metrics.jsonl")]
    assert steps == list(range(1, 11)), steps
    return f"{times} kills, {lab.verdict(folder, processes)}"


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
    import socket

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


def cases() -> Iterator[Case]:
    fine = f"saved, no orphan, {EQUAL}"
    for name, processes, workers in itertools.product(("SIGTERM", "SIGINT", "SIGUSR1"), (1, 2), (0, 2)):
        for target in ("launcher", "group"):
            title = f"{name} to the {target}, {processes} processes, {workers} loader workers"
            act = functools.partial(signalled, name=name, processes=processes, workers=workers, target=target)
            short = (name, target, processes, workers) == ("SIGTERM", "launcher", 2, 2)
            yield Case(title, fine, act, short)
    yield Case("SIGTERM, plain python", f"code 75, {EQUAL}", exit_code)
    yield Case("--max_minutes", f"code 75, {EQUAL}", lambda lab: exit_code(lab, "--max_minutes", 0.001), True)
    yield Case("a second signal", "code 143 within 2 s", second_signal, True)
    for count in (1, 2):
        act = functools.partial(launcher_killed, processes=count)
        yield Case(f"SIGKILL of the launcher, {count} processes", f"no orphan, {EQUAL}", act)
        act = functools.partial(killed_at_random, processes=count, times=20)
        yield Case(f"SIGKILL at twenty random moments, {count} processes", f"20 kills, {EQUAL}", act)
    yield Case("a process is killed under torchrun --max-restarts", EQUAL, lambda lab: restarted(lab, "kill"), True)
    yield Case("a process raises under torchrun --max-restarts", EQUAL, lambda lab: restarted(lab, "raise"))
    for how in ("truncated", "flipped", "missing", "unlisted"):
        act = functools.partial(damaged, how=how)
        yield Case(f"the only checkpoint damaged: {how}", "code 2, named", act, how == "flipped")
    yield Case("foreign files among the checkpoints", EQUAL, functools.partial(damaged, how="foreign"))
    stays = f"told, the one before stays, {EQUAL}"
    yield Case("no space: a write fails", stays, lambda lab: no_space(lab, {"file_bytes": 50_000}))
    yield Case("no space: too little free", stays, lambda lab: no_space(lab, {"free": 1000}))
    near = "told, every step once, same losses but for dropout"
    yield Case("out of memory in a forward of one process", near, lambda lab: out_of_memory(lab, "oom"))
    yield Case("out of memory in a backward of one process", near, lambda lab: out_of_memory(lab, "oom_backward"), True)
    yield Case(
        "out of memory in evaluation of one process", f"told, {EQUAL}", lambda lab: out_of_memory(lab, "eval_oom")
    )
    yield Case("out of memory with one sample", "ends, told", no_memory_at_all)
    yield Case("a loss that is not finite on one process", f"ends, told, step-4, {EQUAL}", not_a_number, True)
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
    except (AssertionError, subprocess.TimeoutExpired, OSError) as error:
        return f"{type(error).__name__}: {str(error)[-1500:]}"


def main(*words: str) -> int:
    chosen = [case for case in cases() if not words or any(word.lower() in case.name.lower() for word in words)]
    bad = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        lab = Laboratory(Path(folder))
        print("| case | expected | observed | s |\n|---|---|---|---|", flush=True)
        for case in chosen:
            started = time.monotonic()
            seen = observe(case, lab)
            bad += seen != case.expected
            mark = "as expected" if seen == case.expected else f"**{seen}**"
            print(f"| {case.name} | {case.expected} | {mark} | {time.monotonic() - started:.0f} |", flush=True)
    print(f"\n{len(chosen)} cases, {bad} not as expected")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
