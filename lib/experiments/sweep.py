"""A sweep: which runs belong to it, what is known of them on disk, and running those that are missing.

All that a sweep knows is in the folders of its runs. So it can be killed at any moment and started again, and several
machines with the same folders can work on one sweep.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lib.config.cli import dump_config, plain_options
from lib.config.sections import DataConfig, flatten
from lib.config.sweep import Recipe, SweepConfig
from lib.config.train import TrainConfig
from lib.data.catalog import ROLES, dataset_name
from lib.data.load import Data, load_data
from lib.errors import printable, require
from lib.evaluation.scores import LOWER_IS_BETTER, Metrics, choose_metrics
from lib.model.load import load_tokenizer
from lib.model.source import model_name
from lib.run.checkpoint import NAME, list_checkpoints
from lib.run.learning_curves import is_number
from lib.run.ownership import is_run_folder, refuse
from lib.run.record import run_name
from lib.run.resume import check_settings
from lib.run.tracking import read_log, read_object
from lib.runtime.atomic import write_atomically
from lib.runtime.lock import FolderLock, InUse, check_free, check_writable
from lib.runtime.signals import EXIT_RESUME, SIGNALS, Stopped
from lib.runtime.slots import Slot, Slots
from lib.training.plan import Plan
from lib.training.state import State

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.2
ELSEWHERE_SECONDS = 5.0
"""How often a sweep looks whether a run that another machine has is finished, and whether a GPU is free."""

NAMES = (
    *("sweep.yaml", "results.json", "runs.jsonl", "table.md", "curves.png", "out_of_fold.jsonl", "suspects.jsonl"),
    *("logs", "claims"),
)
"""What a sweep writes into its folder."""

LONGEST_PART = 40
"""Characters of the varied options that a sweep adds to the names of its runs; digits stand for what is longer."""

MAY_CHANGE = {"seeds", "trials", "finalists", "output_dir", "gpus", "max_parallel", "list"}
"""Options with which a sweep may be started again: more seeds and trials keep the runs that are there."""


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep: a train.py command and its folder."""

    recipe: Recipe
    seed: int
    score_test: bool = True
    fold: str | None = None

    @property
    def more(self) -> list[str]:
        own = [*([] if self.score_test else ["--score_test", "False"]), *(["--fold", self.fold] if self.fold else [])]
        if not self.recipe.unsaid:
            return own
        said = "-".join(f"{name}_{value}" for name, value in self.recipe.varied if name in self.recipe.unsaid)
        part = re.sub(r"[^\w.-]+", "_", said).strip("_")
        if len(part) > LONGEST_PART:
            part = f"{part[:LONGEST_PART]}_{hashlib.sha256(said.encode()).hexdigest()[:6]}"
        name = run_name(self.recipe.config(self.seed, *own)).rpartition("-s")[0]
        return [*own, "--run_name", f"{name[:70]}-{part}-s{self.seed}"]

    @property
    def flags(self) -> list[str]:
        return self.recipe.flags(self.seed, *self.more)

    @functools.cached_property
    def config(self) -> TrainConfig:
        return self.recipe.config(self.seed, *self.more)

    @functools.cached_property
    def folder(self) -> Path:
        return Path("outputs") / run_name(self.config)

    def __str__(self) -> str:
        return f"{self.recipe} seed={self.seed}" + (f" fold={self.fold}" if self.fold else "")

    def results(self) -> dict[str, Any] | None:
        """results.json of the finished run; None before. Raises UserError if the folder holds a run with other settings."""
        try:
            found = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        check_settings(self.config, self.folder)
        return found if isinstance(found, dict) else None

    def step(self) -> int:
        """The step of the newest checkpoint; 0 without one."""
        names = [NAME.fullmatch(path.name) for path in list_checkpoints(self.folder / "checkpoints")]
        return max((int(name[1]) for name in names if name and name[2] is None), default=0)

    def evaluations(self, metric: str) -> list[tuple[int, float]]:
        """Step and validation score of each evaluation so far."""
        key = f"eval/{metric}"
        lines = read_log(self.folder / "metrics.jsonl")
        return [(line["step"], line[key]) for line in lines if is_number(line.get(key))]

    def score(self, metric: str, until: int | None = None) -> float | None:
        """The validation score of the model that the finished run saved, its mean of weights included.

        Before, and up to the step `until`, the best evaluation so far; None without one.
        """
        results = read_object(self.folder / "results.json") if until is None else {}
        if results:
            saved = results.get(f"eval/{metric}")
            return saved if is_number(saved) else None
        values = [value for step, value in self.evaluations(metric) if until is None or step <= until]
        choose = min if metric in LOWER_IS_BETTER else max
        return choose(values, default=None)


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to its end, or up to the step `until`, where it is paused."""

    run: PlannedRun
    until: int | None = None

    @property
    def is_done(self) -> bool:
        return self.run.results() is not None or (self.until is not None and self.run.step() >= self.until)

    def command(self) -> list[str]:
        pause = ["--pause_at_step", str(self.until)] if self.until is not None else []
        return [sys.executable, str(ROOT / "train.py"), *self.run.flags, *pause]


class Sweep:
    """The runs of a sweep by stages, and their scores."""

    def __init__(self, config: SweepConfig, recipes: Sequence[Recipe]) -> None:
        self.config, self.recipes = config, name_recipes(recipes)
        self.folder = Path(config.output_dir or Path("sweeps") / (config.name or sweep_name(config, recipes)))
        self.data: dict[tuple[str, DataConfig], Data] = {}
        self.failed: dict[PlannedRun, str] = {}
        self.runs: list[PlannedRun] = []
        """The runs of all stages so far, in order."""

    def open(self) -> None:
        """Read the data, as every run will, and keep the options of the sweep in its folder.

        Raises UserError for data that no run could use, and if the folder holds another sweep, or files of somebody else.
        """
        path, written = self.folder / "sweep.yaml", dump_config(self.config)
        check_writable(self.folder, "--output_dir")
        named = [name for name in NAMES if os.path.lexists(self.folder / name)]
        before = read_options(path)  # afterwards: another machine may start this sweep now, and writes this file first
        if before is None:
            run = ["a run of train.py"] if is_run_folder(self.folder) else []
            refuse(self.folder, named + run, "a sweep", "--output_dir or --name")
        now = plain_options(written)
        changed = [key for key in now if key not in MAY_CHANGE and before and before.get(key) != now[key]]
        lines = "\n".join(f"  {key}: {before and before.get(key)} there, {now[key]} now" for key in changed)
        require(not changed, f"{self.folder} holds another sweep:\n{lines}\nChoose another --name.")
        for recipe in self.recipes:
            self.read_data(recipe.config(0))
        write_atomically(path, written)

    def read_data(self, config: TrainConfig) -> Data:
        """The training and validation data of a run, read once for all runs that share it; fills the cache of all of them."""
        splits = ROLES[:2] if self.config.chooses else ROLES
        key = config.model.model, config.data
        if key not in self.data:
            tokenizer = load_tokenizer(config.model, config.adapter.virtual_tokens)
            self.data[key] = load_data(config.data, tokenizer, splits)
        return self.data[key]

    def metrics(self, run: PlannedRun) -> Metrics:
        config = run.config
        return choose_metrics(
            config.metrics, config.data, self.read_data(config), config.training.metric_for_best_model
        )

    @functools.cached_property
    def metric(self) -> str:
        """The validation metric that recipes are compared by: the one that chooses the model of a run."""
        return self.metrics(PlannedRun(self.recipes[0], 0)).best

    # ------------------------------------------------------------------------------------------------ stages

    def stages(self) -> Iterator[list[Job]]:
        """The jobs of each stage; those of the next one depend on what came out of this one.

        Raises UserError if a stage leaves no run to choose from.
        """
        count = self.config.chooses
        if count is None:
            total, seeds = self.config.folds, range(self.config.seeds)
            folds = [f"{number + 1}/{total}" for number in range(total)] if total else [None]
            yield self.planned(
                [PlannedRun(r, seed, fold=fold) for r in self.recipes for seed in seeds for fold in folds]
            )
            return
        trials = self.planned([PlannedRun(recipe, 0, score_test=False) for recipe in self.recipes])
        for keep, share in self.pauses(len(trials), count):
            jobs = [Job(job.run, self.pause_step(job.run, share)) for job in trials]
            yield jobs
            trials = [Job(run) for run in self.best(jobs, keep)]
        yield trials
        chosen = self.best(trials, count)
        yield self.planned([PlannedRun(run.recipe, seed) for run in chosen for seed in range(1, self.config.seeds + 1)])

    def planned(self, runs: list[PlannedRun]) -> list[Job]:
        self.runs += runs
        folders = [run.folder for run in runs]
        twice = next((run for run, folder in zip(runs, folders, strict=True) if folders.count(folder) > 1), None)
        require(
            twice is None, f"{twice}: another run of this sweep would have the same folder, {twice and twice.folder}"
        )
        return [Job(run) for run in runs]

    def pauses(self, trials: int, finalists: int) -> list[tuple[int, float]]:
        """For each pause, how many runs go on after it, and at which share of the steps it is.

        Successive halving (Jamieson and Talwalkar, 2016).
        """
        every, kept = self.config.halving, [trials]
        while every and kept[-1] > finalists:
            kept.append(max(finalists, -(-kept[-1] // every)))
        rounds = len(kept) - 1
        return [(keep, float(every or 1) ** (number - rounds)) for number, keep in enumerate(kept[1:])]

    def pause_step(self, run: PlannedRun, share: float) -> int:
        """The step of the first evaluation of a run after this share of its steps."""
        config = run.config
        plan = Plan(config.training, self.read_data(config).lengths["train"])
        step = max(1, round(share * plan.total_steps))
        while not plan.is_eval_step(State(step=step)):
            step += 1
        return step

    def best(self, jobs: Sequence[Job], count: int) -> list[PlannedRun]:
        """The best `count` runs by their validation scores. Raises UserError if none has a score."""
        ranked = self.rank(jobs)
        log = self.log_of(jobs[0].run)
        require(
            bool(ranked), f"none of the {len(jobs)} runs has a validation score; {log} says what happened to the first"
        )
        return [run for _, run in ranked[:count]]

    def rank(self, jobs: Sequence[Job]) -> list[tuple[float, PlannedRun]]:
        """The runs that have a validation score, with it, the best first; of equal ones, the first."""
        scored = [(job.run.score(self.metric, job.until), job.run) for job in jobs if job.run not in self.failed]
        known = [(score, run) for score, run in scored if score is not None]
        sign = 1 if self.metric in LOWER_IS_BETTER else -1
        return sorted(known, key=lambda item: sign * item[0])

    # ------------------------------------------------------------------------------------------------ running

    def print_commands(self) -> None:
        """Print the command of each run of the first stage."""
        for job in next(iter(self.stages_without_data())):
            print(shlex.join(["python", "train.py", *job.run.flags]))
        if self.config.chooses:
            print(
                "when these are finished, the same command without --list chooses the finalists and trains them",
                file=sys.stderr,
            )

    def stages_without_data(self) -> Iterator[list[Job]]:
        if self.config.chooses is None:
            return self.stages()
        return iter([self.planned([PlannedRun(recipe, 0, score_test=False) for recipe in self.recipes])])

    def log_of(self, run: PlannedRun) -> Path:
        """The file with what a run prints."""
        return self.folder / "logs" / f"{run.folder.name}.log"

    def run(self, jobs: Sequence[Job], slots: Slots) -> None:
        """Bring all jobs to their end, several at once; a run that fails is noted, and the others go on.

        Raises Stopped once its runs have saved, if a signal came. After an error of the sweep itself they save, too.
        """
        waiting = [job for job in jobs if not job.is_done and job.run not in self.failed]
        running: list[Running] = []
        if waiting:
            with Bar(self, jobs) as bar, interruptible() as stop:
                bar.show(len(jobs) - len(waiting))
                try:
                    self.carry_out(waiting, running, slots, bar, stop)
                finally:
                    end_runs(running, bar)
        for job in jobs:
            self.remove_claim(job)

    def carry_out(
        self, waiting: list[Job], running: list["Running"], slots: Slots, bar: "Bar", stop: threading.Event
    ) -> None:
        """Start the waiting jobs one after the other, and note how they end."""
        next_look = 0.0
        while waiting or running:
            for ended in [one for one in running if one.process.poll() is not None]:
                running.remove(ended)
                slots.give_back(ended.slot)
                ended.claim.release()
                self.note(ended, waiting, bar)
                next_look = 0.0
            if stop.is_set():
                if not running:
                    raise Stopped("the sweep was stopped, and its runs with it")
                for one in running:
                    one.stop()
                time.sleep(POLL_SECONDS)
                continue
            if waiting and time.monotonic() >= next_look and not self.start_one(waiting, running, slots, bar):
                next_look = time.monotonic() + ELSEWHERE_SECONDS
                if not running:
                    bar.waits()
            stop.wait(POLL_SECONDS)

    def start_one(self, waiting: list[Job], running: list["Running"], slots: Slots, bar: "Bar") -> bool:
        """Start the first waiting job that nobody has, if there is a place for it; whether one was started or found done."""
        for job in list(waiting):
            if job.is_done:  # by another machine
                waiting.remove(job)
                bar.done(job)
                return True
            claim = self.claim(job)
            if claim is None:
                continue
            slot = slots.take()
            if slot is None:
                claim.release()
                return False
            waiting.remove(job)
            running.append(Running(job, slot, claim, slot.start(job.command(), self.log_of(job.run))))
            return True
        return False

    def claim(self, job: Job) -> FolderLock | None:
        """The lock that lets this process alone start a run; None if another process starts it, or trains it."""
        lock = FolderLock(self.folder / "claims" / job.run.folder.name)
        try:
            check_free(job.run.folder)
            lock.take()
        except InUse:
            return None
        return lock

    def remove_claim(self, job: Job) -> None:
        """Remove the file of a claim that a sweep left when it was killed, of a run that has come to its end since."""
        lock = FolderLock(self.folder / "claims" / job.run.folder.name)
        if lock.path.exists() and job.is_done:
            with contextlib.suppress(InUse):
                lock.take()
                lock.release()

    def note(self, ended: "Running", waiting: list[Job], bar: "Bar") -> None:
        """Note how a run ended: done, stopped, taken over by another machine, or failed."""
        job, code = ended.job, ended.process.returncode
        if job.is_done:
            bar.done(job)
        elif ended.stopped or code == EXIT_RESUME:
            waiting.append(job)  # by this sweep, or by somebody else
        else:
            with contextlib.suppress(InUse):
                check_free(job.run.folder)
                self.failed[job.run] = how_it_ended(code, self.log_of(job.run))
                bar.failed(job, self.failed[job.run])
                return
            waiting.append(job)  # another machine has it


@dataclasses.dataclass
class Running:
    """A run in a process of its own."""

    job: Job
    slot: Slot
    claim: FolderLock
    process: subprocess.Popen
    stopped: bool = False

    def stop(self) -> None:
        """Ask the run once to save and end."""
        if not self.stopped:
            self.stopped = True
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()


def end_runs(running: Sequence[Running], bar: "Bar") -> None:
    """Have the runs save and end, and wait for them: what ended the sweep is no reason to lose their work."""
    if running:
        bar.write(f"the sweep ends; {len(running)} of its runs save first")
    for one in running:
        one.stop()
    for one in running:
        one.process.wait()
        one.claim.release()


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Within, signals that ask a run to stop set the event."""
    stop = threading.Event()
    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # SIGHUP is not, under nohup
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Bar:
    """Progress over the runs of a stage, with the best so far: a bar on a terminal, a line for each run elsewhere."""

    def __init__(self, sweep: Sweep, jobs: Sequence[Job]) -> None:
        self.sweep, self.jobs, self.said, self.count = sweep, jobs, False, 0
        self.bar = tqdm(total=len(jobs), unit="run", dynamic_ncols=True, disable=not sys.stderr.isatty())

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def show(self, done: int) -> None:
        """Begin with this many runs that were done before."""
        self.count = done
        self.bar.update(done)
        self.write(f"{len(self.jobs)} runs{f', {done} of them done before' if done else ''}")

    def done(self, job: Job) -> None:
        metric = self.sweep.metric
        score, ranked = job.run.score(metric, job.until), self.sweep.rank(self.jobs)
        paused = f", paused at step {job.until}" if job.until is not None and job.run.results() is None else ""
        if ranked:
            self.bar.set_postfix_str(printable("best {} {:.4f} ({})".format(metric, *ranked[0])))
        found = "no score" if score is None else f"{score:.4f}"
        self.end(f"{job.run}: validation {metric} {found}{paused}")

    def failed(self, job: Job, why: str) -> None:
        self.end(f"{job.run} failed: {why}; see {self.sweep.log_of(job.run)}")

    def end(self, how: str) -> None:
        """One more run has ended."""
        self.count += 1
        self.bar.update()
        self.write(f"[{self.count}/{len(self.jobs)}] {how}")

    def waits(self) -> None:
        """Say once that there is no place for a run now, or that another machine has what is left."""
        if not self.said:
            self.write("waiting: every GPU is in use, or other machines train what is left")
        self.said = True

    def write(self, line: str) -> None:
        line = printable(line)
        if self.bar.disable:
            print(line, file=sys.stderr, flush=True)
        else:
            self.bar.write(line, file=sys.stderr)


def name_recipes(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The recipes with the varied options that the names of their runs do not tell apart, such as the columns of the data."""
    alike: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        alike.setdefault(run_name(recipe.config(0)), []).append(recipe)
    pairs = [(dict(group[0].varied), dict(other.varied)) for group in alike.values() for other in group[1:]]
    unsaid = tuple(name for name, _ in recipes[0].varied if any(a[name] != b[name] for a, b in pairs))
    return [dataclasses.replace(recipe, unsaid=unsaid) for recipe in recipes]


def read_options(path: Path) -> dict[str, Any] | None:
    """The options in a sweep.yaml; None if it is that of no sweep."""
    try:
        found = plain_options(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if {"grid", "search_seed", "max_parallel"} <= found.keys() else None


def sweep_name(config: SweepConfig, recipes: Sequence[Recipe]) -> str:
    """Model, data and what is varied; digits tell it from others."""
    first = recipes[0].config(0)
    flat = {k: v for k, v in flatten(config).items() if k not in MAY_CHANGE and k != "name"}
    digits = hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:6]
    varied = [name for name, _ in recipes[0].varied] or ["seeds"]
    name = "-".join([model_name(first.model.model), dataset_name(first.data), *varied])
    plain = re.sub(r"[^\w.-]+", "_", name)
    return f"{plain[:80]}-{digits}"


def how_it_ended(code: int, log: Path) -> str:
    """Why a run failed: the signal that killed it, else the last line of its log."""
    if code == -signal.SIGKILL:
        return "killed by SIGKILL, as the system does when memory is short (dmesg says so)"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return last_line(log) or f"exit code {code}"


def last_line(log: Path) -> str:
    """The last line of a log that says something, without the trace before it."""
    try:
        lines = [
            line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
