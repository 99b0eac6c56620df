"""Kill training with SIGKILL a thousand times, start it again each time, and compare its end with an undisturbed run.

    make kills                                     1,000 kills, about twenty minutes on two cores
    make kills ARGS="--kills 50 --seed 3"
    make kills ARGS="--seed 3 --experiment 17"     the experiment of that number again
    make kills ARGS="--kills 100 --setting shards" only settings with this word in their name

An experiment is one run in a folder of its own: killed, started again, killed again, up to a dozen times, then left in
peace. After each kill the newest checkpoint that verifies must not be older than before, and the best model must load; at
the end everything must equal an undisturbed run bit by bit. Exit code 1 when anything is lost, unequal, left over or hangs.

Importing the libraries takes seconds, so they are imported once, and each start is a fork that runs train.py from its
first line. One start in fifty goes through `accelerate launch`.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import json
import mmap
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read by the libraries below. One thread: a fork keeps no others.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "true"

import psutil
import tqdm
from safetensors.torch import load_file

import train  # noqa: F401 - what its forks import is imported here
from lib.data import load
from lib.model import stored_tensors
from lib.run.checkpoint import NAME, Checkpointer, list_checkpoints
from lib.run.run import Run
from lib.runtime import accelerator
from lib.runtime.atomic import find_damage
from lib.training.learner import Learner
from tests.conftest import ROOT, tiny_roberta
from tests.resuming import become_reaper, differences, leftovers, run_flags
from tests.writes import watch_writes

LIMIT = 120.0
"""Seconds for a start that nothing happens to."""
SOON = 30.0
"""Seconds in which the processes of a start end after one of them was killed."""
MOST = 12
"""Kills of one experiment."""
LAUNCHED = 0.02
"""The share of starts that goes through `accelerate launch`, which takes seconds longer."""
START_SECONDS = 8.0
"""What `accelerate launch` takes to import everything, about."""

PHASES = ("launch", "data", "model", "start", "training", "evaluation", "saving", "report", "finished", "not seen")
STEPS: list[tuple[Any, str, str, str | None]] = [
    (accelerator, "build_accelerator", "launch", "data"),
    (load, "load_data", "data", "model"),
    (Run, "start", "start", "training"),
    (Learner, "evaluate", "evaluation", None),
    (Run, "save_best", "saving", None),
    (Run, "save_checkpoint", "saving", None),
    (Run, "load_best", "report", "report"),
    (Run, "finish", "report", "report"),
]
"""Functions of a run, the phase within each, and the one after it; None: the one before it."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained: flags beside those of `run_flags`, the number of processes, and whether the model is in shards.

    `parts`: these are saved in parts, as large ones are.
    """

    name: str
    flags: str
    processes: int
    shards: bool = False
    parts: bool = False

    def command(self, flags: list[Any], folder: Path) -> list[str]:
        """train.py with `flags`, those of the setting in place of equal ones."""
        own = self.flags.split()
        pairs = dict(zip(flags[::2], flags[1::2], strict=True)) | dict(zip(own[::2], own[1::2], strict=True))
        words = [part for pair in pairs.items() for part in pair]
        return [str(part) for part in (ROOT / "train.py", *words, "--output_dir", folder)]


FLAGS = {
    "a checkpoint after each step": "--save_steps 1",
    "a checkpoint after each evaluation": "--metric_for_best_model loss --lr 1e-3 --eval_steps 2",
    "a checkpoint now and then": "--save_steps 4 --save_total_limit 2 --eval_steps 2",
    "early stopping": "--early_stopping_patience 2 --eval_steps 2 --save_steps 1 --epochs 4 --lr 1e-3",
    "loader workers": "--dataloader_num_workers 1 --save_steps 2",
    "frozen layers": "--freeze backbone --save_steps 1",
    "averaged weights": "--average_checkpoints 3 --eval_steps 2 --save_steps 4 --metric_for_best_model loss --lr 3e-2",
    "in the background": "--save_steps 2 --async_save True --metric_for_best_model loss --lr 1e-3 --eval_steps 1",
    "an adapter": "--adapter bottleneck --save_steps 2 --metric_for_best_model loss",
}
IN_SHARDS = {name: FLAGS[name] for name in ("a checkpoint after each step", "averaged weights", "an adapter")}
IN_SHARDS |= {"frozen layers": "--freeze 1 --save_steps 1"}
SETTINGS = [Setting(name, flags, processes) for name, flags in FLAGS.items() for processes in (1, 2)]
SETTINGS += [Setting(f"{name}, shards", flags, 2, shards=True) for name, flags in IN_SHARDS.items()]
SETTINGS += [Setting(f"{name}, shards in parts", flags, 2, True, True) for name, flags in IN_SHARDS.items()]


@dataclasses.dataclass(frozen=True)
class Kill:
    """SIGKILL after `seconds`, or at the given one of the moments before and after a write of process `rank`.

    `target`: `all`, `one` (process `rank`), or, through the launcher, `launcher`. `told`: a launcher would ask the other
    process to end as well; else it must notice by itself.
    """

    target: str
    rank: int = 0
    seconds: float | None = None
    moment: int | None = None
    told: bool = False
    launched: bool = False
    finished: bool = False

    @property
    def kind(self) -> str:
        whom = {"all": "all processes", "one": "one process of two", "launcher": "the launcher alone"}[self.target]
        when = "a random time" if self.moment is None else "a write"
        when = "a random time after the end" if self.finished else when
        return f"{when}, {whom}" + (
            ", through accelerate launch" if self.launched and self.target != "launcher" else ""
        )


@dataclasses.dataclass(frozen=True)
class Reference:
    """An undisturbed run of a setting: its folder, its seconds, and the moments before and after writes of each process."""

    folder: Path
    seconds: float
    moments: list[int]


@dataclasses.dataclass
class Story:
    """What happened to an experiment."""

    number: int
    setting: Setting
    kills: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    """Of each kill, its kind and the phase that it met."""
    log: list[str] = dataclasses.field(default_factory=list)
    fault: str = ""
    problem: str = ""


class Broken(Exception):
    """A law does not hold; `fault` is one of FAULTS."""

    def __init__(self, fault: str, problem: str) -> None:
        super().__init__(problem)
        self.fault = fault


FAULTS = {
    "lost": "a checkpoint or the best model is gone",
    "unequal": "the end differs from an undisturbed run",
    "hanging": "processes did not end",
    "failed": "a start that nothing happened to failed",
    "left": "drafts of a killed process are still there",
}


class Board:
    """Memory that the processes of one start share: for each its phase and its moments so far."""

    def __init__(self) -> None:
        self.cells = memoryview(mmap.mmap(-1, 4096)).cast("q")

    def phase(self, rank: int) -> str:
        return PHASES[self.cells[rank]]

    def enter(self, rank: int, phase: str) -> None:
        self.cells[rank] = PHASES.index(phase)

    def moments(self, rank: int) -> int:
        return self.cells[64 + rank]

    def count(self, rank: int) -> int:
        self.cells[64 + rank] += 1
        return self.cells[64 + rank]


# ---------------------------------------------------------------------------------------------------- in a fork


def note_phases(board: Board, rank: int) -> None:
    def noted(function: Any, during: str, after: str | None) -> Any:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            before = board.phase(rank)
            board.enter(rank, during)
            result = function(*arguments, **options)
            board.enter(rank, after or before)
            return result

        return call

    for owner, name, during, after in STEPS:
        setattr(owner, name, noted(getattr(owner, name), during, after))
    is_finished = Run.is_finished

    def known(self: Run, data: Any) -> bool:
        found = is_finished(self, data)
        if found:
            board.enter(rank, "finished")
        return found

    Run.is_finished = known  # type: ignore[method-assign]


def kill_at(moment: int | None, target: str, board: Board, rank: int) -> None:
    """Count the moments before and after writes of this process, and kill it, or all, at the given one."""

    def note(_: str) -> None:
        if board.count(rank) == moment:
            if target == "all":
                os.killpg(os.getpgrp(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    watch_writes(note)


def remove_first(self: Checkpointer, *arguments: Any) -> None:
    """A save that is broken on purpose."""
    for old in list_checkpoints(self.folder / "checkpoints"):
        shutil.rmtree(old, ignore_errors=True)
    WRITE(self, *arguments)


WRITE = Checkpointer.write


def redirect(log: Path) -> None:
    """Standard streams of a command in the background, whose output goes to `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, file), (2, file)):
        os.dup2(source, number)


def train_in_fork(words: list[str], prepare: Callable[[], None]) -> None:
    """Run train.py with these arguments as a process of its own; never returns."""
    code = 1
    try:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - the terminal's would keep its buffer
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.argv = words
        prepare()
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


# ---------------------------------------------------------------------------------------------------- one start


class Start:
    """The processes of one start of train.py, which this process waits for: they and all that they leave behind."""

    def __init__(
        self, setting: Setting, folder: Path, flags: list[Any], kill: Kill | None = None, broken: bool = False
    ):
        self.board, self.codes = Board(), dict[int, int]()
        self.log = folder.with_suffix(".log")
        self.ranks: list[int] = []
        words = setting.command(flags, folder)
        environment = {"HF_DATASETS_CACHE": str(folder.with_suffix(".cache"))}
        if kill is not None and kill.launched:
            command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(setting.processes)]
            if setting.shards:
                command += ["--config_file", str(ROOT / "accelerate_configs" / "fsdp2.yaml")]
            elif setting.processes > 1:
                command += ["--multi_gpu", "--main_process_port", "0"]
            self.ranks = [self.fork(lambda: os.execve(command[0], command + words, os.environ | environment))]
            return
        if setting.processes > 1:
            environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            environment["MASTER_PORT"] = str(free_port())
        if setting.shards:
            environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        for rank in range(setting.processes):
            own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if setting.processes > 1 else {})
            moment = kill.moment if kill is not None and kill.rank == rank else None

            def prepare(rank: int = rank, own: dict[str, str] = own, moment: int | None = moment) -> None:
                os.environ.update(own)
                note_phases(self.board, rank)
                kill_at(moment, kill.target if kill else "all", self.board, rank)
                if setting.parts:
                    stored_tensors.LARGE = 0
                if broken:
                    Checkpointer.write = remove_first  # type: ignore[method-assign]

            self.ranks.append(self.fork(lambda prepare=prepare: train_in_fork(words, prepare)))

    def fork(self, work: Callable[[], Any]) -> int:
        """A process of the group of the first one."""
        group = self.ranks[0] if self.ranks else 0
        pid = os.fork()
        if pid == 0:
            try:
                os.setpgid(0, group)
                redirect(self.log)
                work()
            finally:
                os._exit(127)
        with contextlib.suppress(OSError):
            os.setpgid(pid, group or pid)
        return pid

    def reap(self) -> bool:
        """Whether no process of the start is left; notes how those that this process forked have ended."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return False
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return True

    def wait(self, seconds: float, condition: Callable[[], bool]) -> bool:
        """Whether `condition` holds within this time."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.003)
        return True

    def kill_now(self, kill: Kill) -> None:
        """SIGKILL to those whom `kill` names, and are still there."""
        if kill.launched:
            below = psutil.Process(self.ranks[0]).children(recursive=True)
            victims = {"all": [self.ranks[0], *(child.pid for child in below)], "launcher": self.ranks[:1]}
            victims["one"] = [child.pid for child in below[kill.rank :][:1]]
            for pid in victims[kill.target]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        elif kill.target == "all":
            os.killpg(self.ranks[0], signal.SIGKILL)
        else:
            os.kill(self.ranks[kill.rank], signal.SIGKILL)

    def run(self, kill: Kill | None) -> bool:
        """Run to the end or to `kill`; whether it came to its end. Raises Broken if processes hang or fail by themselves."""
        killed = False
        try:
            if kill is not None and kill.seconds is not None and not self.wait(kill.seconds, self.reap):
                with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                    self.kill_now(kill)
                    killed = True
            if not self.wait(LIMIT, lambda: self.reap() or self.is_wounded()):
                raise Broken("hanging", f"no end after {LIMIT:.0f} s")
            killed = killed or self.is_wounded()
            self.end_others(kill is not None and kill.told)
            if all(self.codes.get(pid) == 0 for pid in self.ranks):
                return True
            if not killed:
                raise Broken("failed", f"exit codes {list(self.codes.values())}")
            return False
        finally:
            for pid in [*self.ranks, *(child.pid for child in psutil.Process().children(recursive=True))]:
                if pid not in self.codes:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            self.wait(10, self.reap)

    def is_wounded(self) -> bool:
        return any(self.codes.get(pid) == -signal.SIGKILL for pid in self.ranks)

    def end_others(self, told: bool) -> None:
        """Wait for the processes that were not killed, and for loader workers; `told`: ask them to end, as launchers do.

        Before the processes know each other nothing tells one that another has died: there only a launcher ends them.
        """
        if not self.wait(1, self.reap):
            for rank, pid in enumerate(self.ranks):
                if pid not in self.codes and (told or self.board.phase(rank) == "launch"):
                    os.kill(pid, signal.SIGTERM)
        if not self.wait(SOON, self.reap):
            left = [
                f"{child.pid} {' '.join(child.cmdline())[:80]}" for child in psutil.Process().children(recursive=True)
            ]
            raise Broken("hanging", f"{SOON:.0f} s after the end of one process there are still: {'; '.join(left)}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------------------------------------------- an experiment


def newest_checkpoint(folder: Path) -> tuple[int, bool] | None:
    """Step of the newest checkpoint that verifies, and whether it was saved after everything that belongs to the step."""
    for path in list_checkpoints(folder / "checkpoints"):
        if find_damage(path) is None:
            found = NAME.fullmatch(path.name)
            assert found
            return int(found[1]), found[2] is None
    return None


def has_model(folder: Path) -> bool:
    try:
        for file in (folder / "model").glob("*.safetensors"):
            load_file(file)
            return True
    except Exception:
        return False
    return False


@dataclasses.dataclass(frozen=True)
class Driver:
    """All experiments: their folder, their data, and how they are drawn."""

    folder: Path
    flags: list[Any]
    seed: int
    broken: bool
    references: dict[Setting, Reference] = dataclasses.field(default_factory=dict)

    def reference(self, setting: Setting) -> Reference:
        """Run a setting undisturbed."""
        become_reaper()
        folder = self.folder / f"reference-{SETTINGS.index(setting)}"
        started, start = time.monotonic(), Start(setting, folder, self.flags)
        start.run(None)
        processes = json.loads((folder / "results.json").read_text())["run/num_processes"]
        assert processes == setting.processes, f"{processes} processes instead of {setting.processes}"
        moments = [start.board.moments(rank) for rank in range(setting.processes)]
        return Reference(folder, time.monotonic() - started, moments)

    def draw(self, rng: random.Random, setting: Setting, finished: bool = False) -> Kill:
        """A kill of any kind; the random numbers do not depend on what happened before."""
        reference = self.references[setting]
        rank, told = rng.randrange(setting.processes), rng.random() < 0.75
        when, how, whom, part = (rng.random() for _ in range(4))
        target = "one" if setting.processes > 1 and whom < 0.5 and not finished else "all"
        if when < LAUNCHED and not (self.broken or finished or setting.parts):
            target = "launcher" if whom > 0.7 else target
            return Kill(target, rank, seconds=part * (START_SECONDS + reference.seconds), launched=True)
        if finished:
            return Kill("all", rank, seconds=0.4 * part, finished=True)
        if how < 0.5 or self.broken:
            rank = rank if reference.moments[rank] and not self.broken else 0
            return Kill(target, rank, told=told, moment=1 + int(part * reference.moments[rank]))
        return Kill(target, rank, told=told, seconds=part * reference.seconds)

    def experiment(self, number: int, most: int) -> Story:
        """One experiment with at most `most` kills."""
        become_reaper()
        rng, setting = random.Random(f"{self.seed} {number}"), list(self.references)[number % len(self.references)]
        story, folder = Story(number, setting), self.folder / f"experiment-{number}"
        try:
            self.live(story, rng, folder, most)
        except Broken as error:
            story.fault, story.problem = error.fault, str(error)
        except Exception:
            story.fault, story.problem = "failed", traceback.format_exc()
        else:
            for path in self.folder.glob(f"{folder.name}*"):
                if path.stem == folder.name:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        return story

    def live(self, story: Story, rng: random.Random, folder: Path, most: int) -> None:
        setting, seen = story.setting, (None, False)
        ended = False
        while len(story.kills) < most and not ended:
            ended = self.start(story, folder, self.draw(rng, setting))
            seen = check_kept(folder, seen)
        if not ended:
            self.start(story, folder, None)
        self.compare(story, folder)
        if len(story.kills) < most and rng.random() < 0.3:
            self.start(story, folder, self.draw(rng, setting, finished=True))
            self.start(story, folder, None)
            self.compare(story, folder)

    def start(self, story: Story, folder: Path, kill: Kill | None) -> bool:
        start = Start(story.setting, folder, self.flags, kill, self.broken)
        story.log.append(str(kill))
        if start.run(kill):
            return True
        assert kill is not None
        phase = "not seen" if kill.launched else start.board.phase(kill.rank)
        story.kills.append((kill.kind, phase))
        if not (folder / "results.json").exists() and 0 in map(start.codes.get, start.ranks):
            raise Broken("failed", f"a process of the run ended with code 0 before there were results: {start.codes}")
        return False

    def compare(self, story: Story, folder: Path) -> None:
        """Raise Broken unless the finished run equals the reference, and no drafts are left."""
        reference = self.references[story.setting].folder
        found = differences(reference, folder, frozenset({"eval_batch_size", "run_id"}))
        name = Path("eval-test", "predictions.jsonl")
        found += [str(name)] * ((reference / name).read_bytes() != (folder / name).read_bytes())
        if found:
            raise Broken("unequal", ", ".join(found))
        if left := leftovers(folder):
            raise Broken("left", ", ".join(left))


def check_kept(folder: Path, seen: tuple[tuple[int, bool] | None, bool]) -> tuple[tuple[int, bool] | None, bool]:
    """The newest checkpoint and whether there is a best model, now; raises Broken if there was more before."""
    newest, model = newest_checkpoint(folder), has_model(folder)
    if seen[0] is not None and (newest is None or newest < seen[0]):
        raise Broken("lost", f"the newest checkpoint that verifies was {seen[0]}, now it is {newest}")
    if seen[1] and not model:
        raise Broken("lost", "model/ does not load any more")
    return newest, model


# ---------------------------------------------------------------------------------------------------- all of them


def import_all(driver: Driver) -> None:
    """Import here what a run imports on the way, so that its forks need not."""
    become_reaper()
    names = driver.folder / "modules"

    def prepare() -> None:
        os.environ["HF_DATASETS_CACHE"] = str(driver.folder / "first.cache")
        finish = Run.finish

        def noted(self: Run, *arguments: Any) -> None:
            finish(self, *arguments)
            names.write_text("\n".join(sys.modules))

        Run.finish = noted  # type: ignore[method-assign]

    pid = os.fork()
    if pid == 0:
        redirect(driver.folder / "first.log")
        train_in_fork(SETTINGS[0].command(driver.flags, driver.folder / "first"), prepare)
    os.waitpid(pid, 0)
    for name in names.read_text().split():
        if name not in sys.modules and not name.startswith("evaluate_modules"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def stories(driver: Driver, pool: concurrent.futures.Executor, kills: int, jobs: int) -> Iterator[Story]:
    """Experiments until there are as many kills."""
    waiting: dict[concurrent.futures.Future[Story], int] = {}
    done, number = 0, 0
    while done < kills or waiting:
        while done + sum(waiting.values()) < kills and len(waiting) < jobs:
            most = min(MOST, kills - done - sum(waiting.values()))
            waiting[pool.submit(driver.experiment, number, most)] = most
            number += 1
        ready, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in ready:
            del waiting[future]
            story = future.result()
            done += len(story.kills)
            yield story


def table(found: list[Story]) -> str:
    """Kills by kind and phase."""
    counts = collections.Counter(kill for story in found for kill in story.kills)
    kinds = sorted({kind for kind, _ in counts})
    lines = [f"| kill at | {' | '.join(PHASES)} | all |", "|---" * (len(PHASES) + 2) + "|"]
    for kind in [*kinds, "all"]:
        row = [sum(n for (k, p), n in counts.items() if kind in (k, "all") and p == phase) for phase in PHASES]
        lines.append(f"| {kind} | {' | '.join(str(n or '') for n in row)} | {sum(row)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="experiments at the same time")
    parser.add_argument("--experiment", type=int, help="only the one with this number")
    parser.add_argument("--setting", default="", help="only settings with this in their name")
    parser.add_argument(
        "--broken", action="store_true", help="a save that removes the old checkpoint first: must be found"
    )
    asked = parser.parse_args()
    tqdm.tqdm.monitor_interval = 0  # its thread
    started, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="kills-"))
    driver = Driver(folder, run_flags(folder, tiny_roberta(folder / "roberta")), asked.seed, asked.broken)
    import_all(driver)
    chosen = [setting for setting in SETTINGS if asked.setting in setting.name]
    chosen = chosen[: max(1, asked.kills // 10)]  # each needs a reference
    found: list[Story] = []
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(asked.jobs, context) as pool:
        driver.references.update(zip(chosen, pool.map(driver.reference, chosen), strict=True))
        one = (pool.submit(driver.experiment, n, MOST).result() for n in [asked.experiment] if n is not None)
        for story in one if asked.experiment is not None else stories(driver, pool, asked.kills, asked.jobs):
            found.append(story)
            if story.fault:
                words = f"--kills {asked.kills} --seed {asked.seed} --experiment {story.number}"
                words += f" --setting '{asked.setting}'" if asked.setting else ""
                again = f'make kills ARGS="{words}"'
                kept = folder / f"experiment-{story.number}"
                print(f"{story.fault}: {story.setting}\n  {story.problem}\n  kept: {kept}*; again: {again}", flush=True)
                print("\n".join(f"  {line}" for line in story.log), flush=True)
            if sys.stderr.isatty():
                print(f"\r{sum(len(s.kills) for s in found)} kills ", end="", file=sys.stderr, flush=True)
    bad = collections.Counter(story.fault for story in found if story.fault)
    count = sum(len(story.kills) for story in found)
    two = sum(story.setting.processes == 2 for story in found)
    print(table(found))
    faults = ", ".join(f"{name} {bad[name]}" for name in FAULTS)
    print(f"\n{count} kills, {len(found)} experiments ({two} with two processes): {faults}; ", end="")
    print(f"seed {asked.seed}, {(time.monotonic() - started) / 60:.1f} minutes")
    if not bad:
        shutil.rmtree(folder)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
