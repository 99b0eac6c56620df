"""Who runs: the command of each contender, and what is read from its run.

Every run is a process of its own with empty caches: it loads, tokenises, trains and ends as a user's would.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Setting:
    """What contenders that are compared share; `folder` holds what `materials.py` wrote."""

    folder: Path
    epochs: int = 1
    batch_size: int = 32
    max_length: int = 128
    device: str = "cpu"

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    @property
    def data(self) -> str:
        return str(self.folder / "data")

    @property
    def files(self) -> list[str]:
        """The flags that name data and model to train.py and to trainer.py, which reads the same."""
        files = [(f"--{split}_file", f"{self.data}/{split}.jsonl") for split in ("train", "validation", "test")]
        flags = ["--model", self.model, *(part for pair in files for part in pair)]
        return [*flags, "--max_length", str(self.max_length), "--metrics", "accuracy", "--report_to", "none"]


Command = Callable[[Setting, int, Path], list[str]]
HEAD_RATE = ["--lr", "1e-3", "--adam_epsilon", "1e-6", "--weight_decay", "0", "--warmup_steps", "300"]
HEAD_RATE += ["--max_grad_norm", "None"]
"""The note's run as it was: its `--lr` never reached the optimizer, which had these by default (recipes/sst5_head.yaml)."""
FULL_RATE = ["--lr", "5e-5"]
FIRST_STEP = ["--max_steps", "2", "--logging_steps", "1", "--max_eval_samples", "32"]
"""Two steps, as an evaluation follows the last one."""


def shared_flags(setting: Setting, seed: int, out: Path) -> list[str]:
    size = ["--bs", str(setting.batch_size), "--epochs", str(setting.epochs)]
    return [*setting.files, *size, "--seed", str(seed), "--output_dir", str(out / "run")]


def ours(*flags: str, launcher: tuple[str, ...] = ()) -> Command:
    return lambda setting, seed, out: [*launcher, str(ROOT / "train.py"), *shared_flags(setting, seed, out), *flags]


def trainer(*flags: str) -> Command:
    script = str(ROOT / "benchmarks" / "trainer.py")
    return lambda setting, seed, out: [script, *shared_flags(setting, seed, out), *flags]


def note(setting: Setting, seed: int, out: Path) -> list[str]:
    size = ["--epoch", str(setting.epochs), "--bs", str(setting.batch_size), "--max_length", str(setting.max_length)]
    return [str(ROOT / "benchmarks" / "note_script.py"), "--model", setting.model, "--data", setting.data, *size]


def manual(*flags: str) -> Command:
    def command(setting: Setting, seed: int, out: Path) -> list[str]:
        size = ["--epochs", str(setting.epochs), "--batch_size", str(setting.batch_size), "--seed", str(seed)]
        data = ["--model", setting.model, "--data", setting.data, "--max_length", str(setting.max_length)]
        return [str(ROOT / "benchmarks" / "manual_loop.py"), *data, *size, *flags]

    return command


def score(setting: Setting, seed: int, out: Path) -> list[str]:
    """Our eval.py on the train split, as a file to be tested on: the largest there is."""
    flags = ["--model", setting.model, "--test_file", f"{setting.data}/train.jsonl", "--split", "test"]
    flags += ["--max_length", str(setting.max_length), "--metrics", "accuracy", "--output_dir", str(out / "run")]
    return [str(ROOT / "eval.py"), *flags]


def linked(way: str) -> Command:
    """Steps of two processes that a limited link joins; `way` is how they sum gradients."""
    size = ["--bs", "128", "--max_steps", "15", "--rate", "1gbit"]
    script = str(ROOT / "benchmarks" / "limited_link.py")
    return lambda setting, seed, out: [script, "--way", way, *size, *setting.files, "--seed", str(seed)]


RANDOM_FP32 = ("--train_sampling_strategy", "random", "--mixed_precision", "no")
GROUPED = ("--train_sampling_strategy", "group_by_length", "--mixed_precision", "auto")
LAUNCHER = ("-m", "accelerate.commands.launch", "--num_processes", "1")
TWO = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")

CONTENDERS: dict[str, Command] = {
    "ours: head": ours("--freeze", "backbone", *HEAD_RATE),
    "note's script": note,
    "ours: full": ours(*FULL_RATE),
    "manual loop": manual(),
    "Trainer, grouped": trainer(*FULL_RATE, *GROUPED),
    "Trainer, fp32": trainer(*FULL_RATE, *RANDOM_FP32),
    "ours: scoring": score,
    "manual loop: scoring": manual("--score", "train"),
    "ours: start": ours(*FULL_RATE, *FIRST_STEP),
    "ours: start by accelerate launch": ours(*FULL_RATE, *FIRST_STEP, launcher=LAUNCHER),
    "ours: two processes": ours(*FULL_RATE, launcher=TWO),
    "limited link: overlap": linked("overlap"),
    "limited link: sum after backward": linked("after"),
    "limited link: DDP": linked("ddp"),
    "limited link: FSDP2": linked("fsdp2"),
    "Trainer: start": trainer(*FULL_RATE, *FIRST_STEP, *RANDOM_FP32),
}


NOT_PASSED_ON = ("OMP_NUM_THREADS", "HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE")
"""What would give some fewer threads, or caches that are not empty."""


class RunFailed(Exception):
    """A contender ended with an error; the message has the end of what it wrote."""


def devices(device: str) -> dict[str, str]:
    """The variables that show a process the CPU alone, or one GPU: Trainer would take all that it sees."""
    if device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


def environment(setting: Setting, out: Path) -> dict[str, str]:
    """No network, no tracker, empty caches, all cores or one GPU for everyone."""
    kept = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
    fixed = {"HF_HOME": str(out / "cache"), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    return kept | fixed | devices(setting.device)


def run(name: str, setting: Setting, seed: int, out: Path) -> dict[str, Any]:
    """Run a contender once; returns its measures, moments as seconds after its start. Raises RunFailed."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *CONTENDERS[name](setting, seed, out)]
    with (out / "stdout.txt").open("w") as stdout, (out / "stderr.txt").open("w") as stderr:
        started = time.time()
        done = subprocess.run(
            command, cwd=out, env=environment(setting, out), stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL
        )
        seconds = time.time() - started
    if done.returncode:
        end = "\n".join((out / "stderr.txt").read_text().splitlines()[-15:])
        raise RunFailed(f"{name} ended with code {done.returncode}: {' '.join(command)}\n{end}")
    text = (out / "stdout.txt").read_text()
    measures = read_ours(out / "run", text) if name.startswith("ours") else json.loads(text.splitlines()[-1])
    return from_start(measures, started) | {"whole_seconds": seconds}


def from_start(measures: dict[str, Any], started: float) -> dict[str, Any]:
    """`measures` with moments counted from the start of the process."""
    first = measures.get("first_step_at")
    return measures | {
        "first_step_at": None if first is None else first - started,
        "evaluations": [(moment - started, accuracy) for moment, accuracy in measures.get("evaluations", [])],
    }


def read_ours(folder: Path, text: str) -> dict[str, Any]:
    """The measures of a run of train.py or eval.py from its files and, for the padding, its first words."""
    results = json.loads((folder / "results.json").read_text())
    if "seconds" in results:
        memory = results["run/peak_memory_gib"]
        return {"eval_seconds": results["seconds"], "eval_samples": results["samples"], "peak_memory_gib": memory}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    padding = re.search(r"^padding +([\d.]+)%", text, re.MULTILINE)
    return {
        "first_step_at": lines[0]["time"] if lines[0]["step"] == 1 else None,
        "train_seconds": results["train_seconds"],
        "train_samples": results["samples_seen"],
        "evaluations": [(line["time"], line["eval/accuracy"]) for line in lines if "eval/accuracy" in line],
        "padding_share": float(padding[1]) / 100 if padding else None,
        "peak_memory_gib": results["run/peak_memory_gib"],
        "precision": results["run/mixed_precision"],
    }
