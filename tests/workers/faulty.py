"""train.py with an injected fault: faulty.py FAULT FLAG [FLAG ...], where FAULT is a JSON object.

`sleep`: seconds added to every step. `step`: the step at which `do` acts, on process `rank` (default: all).
`do`: oom, oom_backward (above `size` samples), eval_oom (above `size` positions), nan, freeze, kill, raise. `once`: a file
that, once there, stops the fault from acting again. `file_bytes`: the largest file that process `rank` can write. `parts`:
true where a model in shards is saved in parts, whatever its size. `part`: the error of process `rank` before it writes its
part. `free`: free bytes of the disk. `tokenize`: seconds that
the first process takes to load the data. `report_bytes`: the largest file that can be written after training. `locks`: false
where the file system has no locks.
"""

import errno
import fcntl
import json
import os
import resource
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lib.data import load as data
from lib.evaluation import scoring
from lib.model import forward, stored_tensors
from lib.run import checkpoint
from lib.run.run import Run
from lib.training import step

FAULT = json.loads(sys.argv.pop(1))
RANK = int(os.environ.get("RANK", "0"))
attempts, logits, predict, load = step.attempts, forward.compute_logits, scoring.predict_batch, data.load_data
backward = Accelerator.backward


def acts(what: str) -> bool:
    """Whether the fault `what` is to act on this process; with `once`, True only the first time."""
    if FAULT.get("do") != what or FAULT.get("rank", RANK) != RANK:
        return False
    if "once" in FAULT:
        if Path(FAULT["once"]).exists():
            return False
        Path(FAULT["once"]).touch()
    return True


class Now:
    step = 0


def faulty_attempts(learner: Any, *arguments: Any) -> Iterator[Any]:
    Now.step = learner.state.step + 1
    time.sleep(FAULT.get("sleep", 0))
    if Now.step == FAULT.get("step"):
        if acts("freeze"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if acts("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if acts("raise"):
            raise RuntimeError("a fault")
    yield from attempts(learner, *arguments)


def no_memory(size: int) -> None:
    if size > FAULT["size"]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def compute_logits(model: Any, inputs: Any) -> torch.Tensor:
    """For training only: evaluation imported the original before."""
    Now.size = len(inputs["input_ids"])
    if Now.step >= FAULT.get("step", 0) and acts("oom"):
        no_memory(Now.size)
    value = logits(model, inputs)
    return value * float("nan") if Now.step == FAULT.get("step") and acts("nan") else value


def failing_backward(self: Accelerator, *arguments: Any) -> None:
    backward(self, *arguments)
    if Now.step >= FAULT.get("step", 0) and acts("oom_backward"):
        no_memory(Now.size)


def predict_batch(model: Any, inputs: Any, *arguments: Any) -> torch.Tensor:
    if acts("eval_oom"):
        no_memory(inputs["input_ids"].numel())
    return predict(model, inputs, *arguments)


def load_data(*arguments: Any) -> Any:
    if RANK == 0:
        time.sleep(FAULT.get("tokenize", 0))
    return load(*arguments)


def limit_files(size: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def finish(self: Run, *arguments: Any) -> None:
    if "report_bytes" in FAULT:
        limit_files(FAULT["report_bytes"])
    write_all(self, *arguments)


def no_locks(*_: Any) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def no_part(*_: Any) -> None:
    raise RuntimeError(FAULT["part"])


write_all, Run.finish = Run.finish, finish  # type: ignore[method-assign]
step.attempts, forward.compute_logits = faulty_attempts, compute_logits
Accelerator.backward = failing_backward
scoring.predict_batch, data.load_data = predict_batch, load_data
if FAULT.get("parts"):
    stored_tensors.LARGE = 0
if "part" in FAULT and FAULT.get("rank", RANK) == RANK:
    checkpoint.write_held = no_part
if "file_bytes" in FAULT and FAULT.get("rank", RANK) == RANK:
    limit_files(FAULT["file_bytes"])
if not FAULT.get("locks", True):
    fcntl.lockf = no_locks
if "free" in FAULT:
    shutil.disk_usage = lambda _: shutil._ntuple_diskusage(10**12, 10**12, FAULT["free"])
script = Path(__file__).resolve().parent.parent.parent / "train.py"
sys.argv[0] = str(script)
runpy.run_path(str(script), run_name="__main__")
