"""Kill a sweep of 2 rates x 3 seeds with SIGKILL at random, start it again each time, and compare it with an undisturbed one.

    make kill-sweeps                                              the default model and data, ten kills
    make kill-sweeps ARGS="--kills 4 -- --max_train_samples 600 --epochs 1"
    make kill-sweeps ARGS=--tiny                                  a tiny model on made-up data, a few minutes

What follows -- are flags of train.py. A kill meets the sweep alone, whose run then goes on by itself; the sweep with all
that it started; or the run alone, which the sweep counts as failed. In the end all runs are compared: scores, predictions,
weights, optimizer, every line of metrics.jsonl, and the tables of the sweep. Exit code 1 if anything differs, is left over,
or hangs.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from tests.conftest import ROOT, tiny_roberta
from tests.resuming import TIMING, become_reaper, differences, leftovers, run_flags, without

KINDS = ("the sweep alone", "the sweep and its runs", "a run alone")
LIMIT = 3600.0
"""Seconds for a start that nothing happens to."""


class Life:
    """A start of the sweep in a folder, and all processes that come of it."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        self.log = (folder / "sweep.log").open("ab")
        self.sweep = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )

    def wait(self, seconds: float) -> int | None:
        """The exit code of the sweep; None if it runs longer."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.sweep.wait(seconds)
        return None

    def kill(self, kind: str) -> bool:
        """SIGKILL to those whom `kind` names; whether somebody was there."""
        below = psutil.Process().children(recursive=True)  # of sweeps that were killed before, too
        runs = [child for child in below if is_run(child)]
        victims = {"the sweep alone": [self.sweep], "the sweep and its runs": below, "a run alone": runs[-1:]}[kind]
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                victim.send_signal(signal.SIGKILL)
        if kind != "a run alone":
            self.sweep.wait(30)
        return bool(victims)


def is_run(process: psutil.Process) -> bool:
    try:
        return str(ROOT / "train.py") in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def running() -> list[psutil.Process]:
    """The runs that are still there."""
    reap()
    return [child for child in psutil.Process().children(recursive=True) if is_run(child)]


def reap(sweep: int = 0) -> None:
    """Take note of the ends of orphans, which are this process's children as the sweep is."""
    for child in psutil.Process().children():
        with contextlib.suppress(ChildProcessError, psutil.NoSuchProcess):
            if child.status() == psutil.STATUS_ZOMBIE and child.pid != sweep:
                os.waitpid(child.pid, os.WNOHANG)


def finish(folder: Path, command: list[str]) -> None:
    """Start the sweep until it ends by itself; it ends with code 2 where a run was killed in its last start."""
    for code in (2, 0):
        ended = Life(folder, command).wait(LIMIT)
        if ended == 0:
            return
        assert ended == code, f"exit code {ended}; see {folder / 'sweep.log'}"
    raise AssertionError(f"no end with exit code 0; see {folder / 'sweep.log'}")


def disturb(folder: Path, command: list[str], kills: int, mean: float, rng: random.Random) -> Counter[str]:
    """Start the sweep and kill it, or a part of it, as often; what was killed."""
    done: Counter[str] = Counter()
    life = Life(folder, command)
    while done.total() < kills:
        kind = KINDS[done.total() % 3] if done.total() < 3 else rng.choice(KINDS)
        code = life.wait(rng.uniform(0, 2 * mean))
        reap(life.sweep.pid)
        if code is not None:  # the end, or one after a run was killed
            assert code in (0, 2), f"exit code {code}; see {folder / 'sweep.log'}"
            life = Life(folder, command)
            continue
        if life.kill(kind):
            done[kind] += 1
            print(f"  killed: {kind}", flush=True)
        if kind != "a run alone":
            life = Life(folder, command)
    if life.wait(0) is None:
        life.kill("the sweep alone")
    return done


def compare(whole: Path, killed: Path) -> list[str]:
    """What differs between the two folders, and what is left of processes."""
    found = []
    left, end = running(), time.monotonic() + 30
    while left and time.monotonic() < end:  # a run that a killed sweep left has just written its results
        time.sleep(0.2)
        left = running()
    names = [sorted(path.name for path in (folder / "outputs").iterdir()) for folder in (whole, killed)]
    if names[0] != names[1]:
        found.append(f"runs: {names}")
    for name in names[0]:
        a, b = (folder / "outputs" / name for folder in (whole, killed))
        unequal = differences(a, b, frozenset({"eval_batch_size", "run_id"}))
        unequal += [
            str(path.relative_to(a))
            for path in sorted(a.glob("eval-*/predictions.jsonl"))
            if digest(path) != digest(b / path.relative_to(a))
        ]
        found += [f"{name}: {what}" for what in [*unequal, *(f"left: {left}" for left in leftovers(b))]]
    a, b = (folder / "sweeps" / "kills" for folder in (whole, killed))
    found += [name for name in ("table.md", "results.json") if (a / name).read_bytes() != (b / name).read_bytes()]
    lines = [
        [without(json.loads(line), TIMING) for line in (folder / "runs.jsonl").read_text().splitlines()]
        for folder in (a, b)
    ]
    found += ["runs.jsonl"] * (lines[0] != lines[1])
    found += [f"left: {path.relative_to(killed)}" for path in b.rglob(".lock")]
    return found + [f"left: process {' '.join(child.cmdline())[:100]}" for child in left]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", nargs="+", help="recipes, as sweep.py takes them; by default lr=2e-5,5e-5")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on made-up data")
    parser.add_argument("--folder", type=Path, help="where both sweeps are kept; by default they are deleted if equal")
    parser.add_argument("flags", nargs="*", help="flags of train.py, after --")
    asked = parser.parse_args()
    become_reaper()
    folder = (asked.folder or Path(tempfile.mkdtemp(prefix="kill-sweeps-"))).absolute()
    whole, killed = folder / "undisturbed", folder / "killed"
    for path in (whole, killed):
        path.mkdir(parents=True)
    flags = ["--report_to", "none", *asked.flags]
    if asked.tiny:
        tiny = run_flags(folder, tiny_roberta(folder / "roberta"))
        flags = [str(flag) for flag in tiny if flag not in ("--lr", "1e-2")] + flags
        asked.grid = asked.grid or ["lr=1e-3,1e-2"]
        os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(ROOT / "sweep.py"), "--name", "kills", "--grid", *(asked.grid or ["lr=2e-5,5e-5"])]
    command += ["--seeds", str(asked.seeds), "--", *flags]
    started = time.monotonic()
    finish(whole, command)
    seconds = time.monotonic() - started
    print(f"undisturbed: {seconds:.0f} s", flush=True)
    print((whole / "sweeps" / "kills" / "table.md").read_text(), flush=True)
    # A start takes a while to import everything: so long that most kills come later, so short that many are before the end.
    done = disturb(killed, command, asked.kills, max(8.0, 1.5 * seconds / asked.kills), random.Random(asked.seed))
    finish(killed, command)
    found = compare(whole, killed)
    print("\n".join(found) or "equal", flush=True)
    kinds = ", ".join(f"{kind} {done[kind]}" for kind in KINDS)
    minutes = (time.monotonic() - started) / 60
    print(f"{done.total()} kills ({kinds}), seed {asked.seed}, {minutes:.1f} minutes: {len(found)} differences")
    if found:
        print(f"kept: {folder}")
    elif asked.folder is None:
        shutil.rmtree(folder)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
