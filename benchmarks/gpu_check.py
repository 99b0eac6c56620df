"""Is the project right on a GPU, and how fast: one command, about ten minutes, no network.

    python benchmarks/gpu_check.py                        everything, on the first visible GPU; on two where there are two
    python benchmarks/gpu_check.py --tiny                 tiny models and data, also without a GPU: does the check itself run?
    python benchmarks/gpu_check.py --only right           only what must be equal; `speed`: only what is measured

The scripts themselves run, each in a process of its own, on the movie reviews that are installed: minilm for what must be
equal, a model of roberta-base's shape with random weights for what is measured. A line is printed for each check; the last
line is JSON, which --output also keeps. A check is ok, failed, or null, where there is nothing to compare with. The exit
code is 1 if one failed.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_type_hints
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402

from benchmarks.materials import write_data, write_model  # noqa: E402
from lib.config.cli import parse_cli  # noqa: E402
from lib.hub.packaged import FIVE_NAMES, minilm_folder  # noqa: E402
from lib.run.record import VERSIONS, version  # noqa: E402
from lib.runtime.precision import uses_gpu  # noqa: E402
from lib.training.step_graphs import StepGraphs  # noqa: E402

SPLITS = ("train", "validation", "test")
FLOAT32 = ("--mixed_precision", "no")
BF16 = ("--mixed_precision", "bf16")
NO_DROPOUT = ("--config_overrides", "hidden_dropout_prob=0.0", "attention_probs_dropout_prob=0.0")
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


# ---------------------------------------------------------------------------------------------------- materials


def write_materials(folder: Path, tiny: bool) -> None:
    """Models `small` and `big`, and data sets `data` and `long`, whose texts are fifteen reviews each."""
    write_data(folder / "data", 256 if tiny else None, 64 if tiny else None)
    (folder / "long").mkdir()
    for split in SPLITS:
        rows = list(map(json.loads, (folder / "data" / f"{split}.jsonl").read_text().splitlines()))[:960]
        joined = [
            rows[start] | {"text": " ".join(row["text"] for row in rows[start : start + 15])}
            for start in range(0, len(rows), 15)
        ]
        (folder / "long" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in joined))
    source = str(minilm_folder())
    if not tiny:
        write_model(folder / "small", source, torch.device("cpu"))
        write_model(folder / "big", source, torch.device("cuda"))
        return
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.from_pretrained(source, num_labels=len(FIVE_NAMES), **TINY)
    )
    for name in ("small", "big"):
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder / name)


# ---------------------------------------------------------------------------------------------------- one process


@dataclasses.dataclass
class Done:
    """A process that has ended, and the folder that it wrote to."""

    code: int
    seconds: float
    out: str
    err: str
    folder: Path

    @functools.cached_property
    def results(self) -> dict[str, Any]:
        """results.json, empty where there is none."""
        file = self.folder / "results.json"
        return json.loads(file.read_text()) if self.code == 0 and file.is_file() else {}

    def logged(self, key: str = "train/loss") -> list[float]:
        """The values of `key` in metrics.jsonl, step by step."""
        file = self.folder / "metrics.jsonl"
        lines = map(json.loads, file.read_text().splitlines()) if self.code == 0 and file.is_file() else ()
        return [line[key] for line in lines if key in line]

    @property
    def checkpoints(self) -> list[Path]:
        """Those that are kept, the first one first."""
        return sorted(self.folder.glob("checkpoints/step-*"), key=lambda path: int(path.name.split("-")[1]))

    @property
    def end(self) -> str:
        """The last lines of what it wrote, for a report of its failure."""
        return f"code {self.code}: " + " | ".join((self.err.strip() or self.out.strip()).splitlines()[-5:])[-800:]


class Runner:
    """Starts processes for the checks, and keeps what they find."""

    def __init__(self, folder: Path, tiny: bool, seconds: float) -> None:
        self.folder, self.tiny, self.on_gpu = folder, tiny, uses_gpu()
        self.until = time.monotonic() + seconds
        self.found: dict[str, dict[str, Any]] = {}

    @property
    def stand_in(self) -> dict[str, Any]:
        """For runs with CUDA graphs: without a GPU, Python's code is called again where a graph would be replayed."""
        return {} if self.on_gpu else {"stand_in": True}

    def note(self, name: str, ok: bool | None, **figures: Any) -> None:
        """Keep and print the outcome of a check."""
        self.found[name] = {"ok": ok} | figures
        print(f"{name}: {ok}  {json.dumps(figures, default=str)[:400]}", flush=True)

    def run(self, name: str, *command: object, cpu: bool = False, **environment: str) -> Done:
        """A Python program with its arguments; it gets at most the time that is left."""
        fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
        if cpu or not self.on_gpu:
            fixed["ACCELERATE_USE_CPU"] = "true"
        else:
            fixed["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        started, out, code = time.perf_counter(), self.folder / "logs" / name, 124
        out.mkdir(parents=True)
        with (
            (out / "out").open("w") as stdout,
            (out / "err").open("w") as stderr,
            contextlib.suppress(subprocess.TimeoutExpired),
        ):
            code = subprocess.run(
                [sys.executable, *map(str, command)],
                cwd=self.folder,
                env=os.environ | fixed | environment,
                stdout=stdout,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                timeout=max(5.0, self.until - time.monotonic()),
                check=False,
            ).returncode
        seconds = round(time.perf_counter() - started, 1)
        said, erred = ((out / end).read_text(errors="replace") for end in ("out", "err"))
        return Done(code, seconds, said, erred, self.folder / "runs" / name)

    def files(self, data: str) -> list[object]:
        return [part for split in SPLITS for part in (f"--{split}_file", self.folder / data / f"{split}.jsonl")]

    def flags(self, name: str, model: str = "small", data: str = "data") -> list[object]:
        """Options that every run of train.py has."""
        words = ["--model", self.folder / model, *self.files(data), "--metrics", "accuracy", "--report_to", "none"]
        return [*words, "--label_column", "label_text", "--output_dir", self.folder / "runs" / name]

    def train(
        self, name: str, *flags: object, model: str = "small", data: str = "data", cpu: bool = False, **watch: Any
    ) -> Done:
        """train.py; with `watch` in a process that `watched` prepares."""
        words = [*self.flags(name, model, data), *flags]
        start = [ROOT / "train.py"] if not watch else [__file__, "--watched", json.dumps({"script": "train"} | watch)]
        return self.run(name, *start, *words, cpu=cpu)

    def evaluate(self, name: str, run: Done, *flags: object, cpu: bool = False, **watch: Any) -> Done:
        """eval.py on the test split of a run."""
        words = ["--run", run.folder, "--split", "test", "--output_dir", self.folder / "runs" / name, *flags]
        start = [ROOT / "eval.py"] if not watch else [__file__, "--watched", json.dumps({"script": "eval"} | watch)]
        return self.run(name, *start, *words, cpu=cpu)


def gap(first: list[float], second: list[float]) -> float:
    """The largest relative difference; infinite for lists that are empty or of different lengths."""
    if not first or len(first) != len(second):
        return math.inf
    return max(abs(a - b) / max(1e-6, abs(b)) for a, b in zip(first, second, strict=True))


def probabilities(done: Done) -> list[float]:
    rows = map(json.loads, (done.folder / "predictions.jsonl").read_text().splitlines())
    return [value for row in rows for value in row["probabilities"].values()]


def same_weights(first: Path, second: Path) -> bool:
    names = [folder / "model.safetensors" for folder in (first, second)]
    return all(name.is_file() for name in names) and names[0].read_bytes() == names[1].read_bytes()


def same_runs(first: Done, second: Done) -> bool:
    """Whether all losses, and the weights of all checkpoints, are equal bit by bit."""
    pairs = zip(first.checkpoints, second.checkpoints, strict=False)
    as_many = len(first.checkpoints) == len(second.checkpoints) > 0
    return as_many and first.logged() == second.logged() and all(same_weights(*pair) for pair in pairs)


# ---------------------------------------------------------------------------------------------------- what must be equal


def check_right(runner: Runner, jobs: int) -> None:
    """Numbers on the GPU against those of the CPU, of a second run, of a resumed one, of smaller micro-batches."""
    tiny = runner.tiny
    steps, every, crowd = (6, 2, 64) if tiny else (24, 8, 1024)
    short = ("--max_steps", steps, "--logging_steps", 1)
    plain = (*short, *FLOAT32, *NO_DROPOUT)
    kept = (*short, *BF16, "--save_steps", every, "--save_total_limit", 9)
    long = ("--max_steps", 6, "--logging_steps", 1, "--max_length", 512, "--bs", 16, *BF16)
    crowded = ("--bs", crowd, "--max_steps", 2, "--logging_steps", 1, *FLOAT32, *NO_DROPOUT)
    learn = ("--max_steps", 8 if tiny else 266, "--lr", "1e-4")
    frozen = (*short, *FLOAT32, "--freeze", "backbone", "--lr", "1e-3")
    graphs, one_length = ("--cuda_graphs", True), ("--pad_to_max_length", True, "--max_length", 64)
    tasks: dict[str, tuple[tuple, dict[str, Any]]] = {
        "float32": (plain, {}),
        "float32 on the CPU": (plain, {"cpu": True}),
        "eager": ((*plain, "--attn_implementation", "eager"), {}),
        "compiled": ((*plain, "--compile", True), {}),
        "bf16": ((*learn, *BF16), {}),
        "fp16": ((*learn, "--mixed_precision", "fp16"), {}),
        "overflow": ((*short, "--mixed_precision", "fp16"), {"scale": 2.0**30}),
        "short 1": (kept, {}),
        "short 2": (kept, {}),
        "long 1": (long, {"data": "long"}),
        "long 2": (long, {"data": "long"}),
        "frozen, cached": (frozen, {}),
        "frozen, run": ((*frozen, "--no_cache_features", True), {}),
        "roomy": (crowded, {}),
        "graphs": ((*plain, *graphs), runner.stand_in),
        "one length": ((*short, *BF16, *one_length), {}),
        "one length, graphs": ((*kept, *one_length, *graphs), runner.stand_in),
        "casts of autocast": ((*kept, "--bf16_weights", False), {}),
        "bf16 copies": ((*kept, "--bf16_weights", True), {}),
        "checkpoints at once": ((*kept, "--async_save", False), {}),
        "checkpoints meanwhile": ((*kept, "--async_save", True), {}),
    }
    if not runner.on_gpu:
        for name in ("fp16", "overflow", "compiled"):
            del tasks[name]
            runner.note(name, None, why="only on a GPU")
    with ThreadPoolExecutor(jobs) as pool:
        futures = {name: pool.submit(runner.train, name, *flags, **more) for name, (flags, more) in tasks.items()}
    done = {name: future.result() for name, future in futures.items()}
    for name, run in done.items():
        if not run.results:
            runner.note(name, False, why=run.end)
    good = {name: run for name, run in done.items() if run.results}

    def compare(what: str, one: str, other: str, most: float, keys: tuple[str, ...] = ("train/loss",)) -> None:
        if {one, other} <= good.keys():
            gaps = {key: gap(good[one].logged(key), good[other].logged(key)) for key in keys}
            runner.note(what, all(found <= most for found in gaps.values()), gaps=gaps)

    compare("float32 equals the CPU", "float32", "float32 on the CPU", 1e-3, ("train/loss", "train/grad_norm"))
    compare("eager attention equals sdpa", "eager", "float32", 1e-3)
    compare("compiled layers equal plain ones", "compiled", "float32", 2e-3)
    compare("cached features equal the frozen part", "frozen, cached", "frozen, run", 2e-3)
    compare("CUDA graphs equal plain steps", "graphs", "float32", 1e-3, ("train/loss", "train/grad_norm"))
    compare(
        "CUDA graphs draw the dropout of plain steps, at one padded length", "one length, graphs", "one length", 1e-3
    )
    for name in good.keys() & {"bf16", "fp16"}:
        accuracy = good[name].results["test/accuracy"]
        runner.note(f"{name} learns", accuracy > (0.0 if tiny else 0.4), accuracy=accuracy)
    if "overflow" in good:
        norms = good["overflow"].logged("train/grad_norm")
        skipped = norms.count(0.0)
        runner.note(
            "steps that overflow in fp16 are skipped", 0 < skipped < len(norms), steps=len(norms), skipped=skipped
        )
    for what, one, other in (
        ("equal runs are equal bit by bit, short texts", "short 1", "short 2"),
        ("equal runs are equal bit by bit, long texts", "long 1", "long 2"),
        ("bf16 copies of weights change no bit", "bf16 copies", "casts of autocast"),
        ("checkpoints written meanwhile change no bit", "checkpoints meanwhile", "checkpoints at once"),
    ):
        if {one, other} <= good.keys():
            runner.note(what, same_runs(good[one], good[other]), gap=gap(good[one].logged(), good[other].logged()))
    if "short 1" in good:
        check_resume(runner, "a resumed run", good["short 1"], kept)
    if "one length, graphs" in good:
        flags = (*kept, *one_length, *graphs)
        check_resume(runner, "a resumed run with CUDA graphs", good["one length, graphs"], flags, **runner.stand_in)
    if "roomy" in good:
        check_memory(runner, good["roomy"], crowded)
    if "float32" in good:
        check_evaluation(runner, good["float32"])
    check_padding_free(runner)
    if runner.on_gpu and torch.cuda.device_count() > 1 and "float32" in good:
        check_processes(runner, good["float32"], plain)


def check_resume(runner: Runner, name: str, whole: Done, flags: tuple, **watch: Any) -> None:
    """From its first checkpoint on, a run must end as it ended before."""
    first, target = whole.checkpoints[0], runner.folder / "runs" / name
    shutil.copytree(first, target / "checkpoints" / first.name)
    shutil.copy(whole.folder / "config.yaml", target)
    resumed = runner.train(name, *flags, "--resume_from_checkpoint", "must", **watch)
    if not resumed.results:
        runner.note(f"{name} is equal bit by bit", False, why=resumed.end)
        return
    after = whole.logged()[int(first.name.split("-")[1]) :]
    equal = same_weights(whole.checkpoints[-1], resumed.checkpoints[-1]) and after == resumed.logged()[-len(after) :]
    runner.note(f"{name} is equal bit by bit", equal)


def check_memory(runner: Runner, roomy: Done, flags: tuple) -> None:
    """With less memory than a step takes, micro-batches are cut, and the losses stay."""
    name = "out of memory cuts micro-batches and changes nothing"
    if not runner.on_gpu:
        runner.note(name, None, why="only on a GPU")
        return
    peak, weights = roomy.results["run/peak_memory_gib"], roomy.results["run/parameters"] * 16 / 2**30
    limit = weights + 0.4 * (peak - weights) + 0.1
    cramped = runner.train("cramped", *flags, gib=limit)
    said = [line for line in cramped.err.splitlines() if "out of memory with" in line]
    difference = gap(cramped.logged(), roomy.logged())
    figures = {"gap": difference, "peak_gib": peak, "limit_gib": round(limit, 2), "said": said}
    runner.note(name, bool(said) and difference < 1e-3, **figures, **({} if cramped.results else {"why": cramped.end}))


def check_evaluation(runner: Runner, run: Done) -> None:
    """Probabilities of eval.py on the GPU and on the CPU."""
    scored = [
        runner.evaluate(name, run, *FLOAT32, cpu=cpu) for name, cpu in (("scored", False), ("scored on the CPU", True))
    ]
    failed = next((one for one in scored if not one.results), None)
    if failed:
        runner.note("eval.py equals the CPU", False, why=failed.end)
        return
    one, two = map(probabilities, scored)
    largest = max(abs(a - b) for a, b in zip(one, two, strict=True))
    runner.note("eval.py equals the CPU", largest < 1e-4, largest=largest)


def check_padding_free(runner: Runner) -> None:
    """Texts in one row, without padding, get the logits of padded ones: in bf16 on a GPU, tiny ones in float32 on a CPU."""
    tiny = [] if runner.on_gpu and not runner.tiny else ["--tiny"]
    done = runner.run("padding_free", ROOT / "benchmarks" / "padding_free.py", *tiny)
    name = "texts in one row equal padded ones"
    try:
        found = json.loads(done.out.strip().splitlines()[-1])
        runner.note(name, found["largest_difference"] < (0.05 if runner.on_gpu else 1e-5), **found)
    except (IndexError, ValueError, KeyError):
        runner.note(name, False, why=done.end)


def check_processes(runner: Runner, one: Done, flags: tuple) -> None:
    """Two processes on two GPUs must give the losses of one."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--main_process_port", 0]
    visible = ",".join((os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1").split(",")[:2])
    two = runner.run("two", *launcher, ROOT / "train.py", *runner.flags("two"), *flags, CUDA_VISIBLE_DEVICES=visible)
    difference = gap(two.logged(), one.logged())
    runner.note(
        "two processes equal one", difference < 1e-3, gap=difference, **({} if two.results else {"why": two.end})
    )


# ---------------------------------------------------------------------------------------------------- what is measured


def check_speed(runner: Runner) -> None:
    """One process after another on the big model in bf16: train.py, its variants, a hand-written loop, Trainer, eval.py."""
    steps = 8 if runner.tiny else 261
    flags = ("--max_steps", steps, *BF16, "--logging_steps", max(1, steps // 13))
    ours = runner.train("ours", *flags, model="big", profile=2 if runner.tiny else 60)
    report(runner, "train.py", ours)
    for name, more in {
        "without deterministic algorithms": ("--deterministic", False),
        "eager attention": ("--attn_implementation", "eager"),
        "in float32": FLOAT32,
    }.items():
        report(runner, f"train.py, {name}", runner.train(f"ours, {name}", *flags, *more, model="big"))
    profile = {"profile": 2 if runner.tiny else 200} | runner.stand_in  # when most lengths are recorded
    graphed = runner.train("ours, graphs", *flags, "--cuda_graphs", True, model="big", **profile)
    report(runner, "train.py, CUDA graphs", graphed)
    if runner.on_gpu:
        report(runner, "train.py, cuDNN's attention", runner.train("ours, cudnn", *flags, model="big", cudnn=True))
        report(runner, "train.py, compiled", runner.train("ours, compiled", *flags, "--compile", True, model="big"))
    words = ["--model", runner.folder / "big", "--data", runner.folder / "data"]
    loop = runner.run("loop", ROOT / "benchmarks" / "manual_loop.py", *words, ACCELERATE_MIXED_PRECISION="bf16")
    peer(runner, "hand-written loop, bf16", loop)
    trainer = [ROOT / "benchmarks" / "trainer.py", *runner.flags("trainer", "big"), *flags]
    peer(runner, "Trainer, bf16", runner.run("trainer", *trainer))
    for name, watch in (("eval.py", {}), ("eval.py, cuDNN's attention", {"cudnn": True})):
        if ours.results and (not watch or runner.on_gpu):
            scored = runner.evaluate(name, ours, **watch)
            seconds, samples = (scored.results.get(key, math.nan) for key in ("seconds", "samples"))
            speed = round(samples / seconds) if scored.results else scored.end
            runner.note(name, None if scored.results else False, samples_per_second=speed, seconds=seconds)


def report(runner: Runner, name: str, done: Done) -> None:
    """The speed of a run of train.py between its log lines, its memory, and what `watched` saw."""
    if not done.results:
        runner.note(name, False, why=done.end)
        return
    speeds = done.logged("train/samples_per_second")
    figures = {
        "samples_per_second": round(statistics.median(speeds[1:] or speeds)),
        "train_seconds": done.results["train_seconds"],
        "peak_memory_gib": done.results["run/peak_memory_gib"],
        "process_seconds": done.seconds,
    }
    seen = done.folder / "seen.json"
    runner.note(name, None, **figures, **(json.loads(seen.read_text()) if seen.is_file() else {}))


def peer(runner: Runner, name: str, done: Done) -> None:
    """The speed of a peer, which is the last line that it prints."""
    try:
        found = json.loads(done.out.strip().splitlines()[-1])
        speed = round(found["train_samples"] / found["train_seconds"])
        runner.note(name, None, samples_per_second=speed, train_seconds=found["train_seconds"])
    except (IndexError, ValueError, KeyError):
        runner.note(name, False, why=done.end)


# ---------------------------------------------------------------------------------------------------- inside a process


def watched(watch: dict[str, Any], flags: list[str]) -> None:
    """A script in this process: with a limit on the GPU's memory, another loss scale, cuDNN's attention, or a profile."""
    module = importlib.import_module(watch["script"])
    config = parse_cli(get_type_hints(module.main)["config"], flags)
    with contextlib.ExitStack() as stack:
        if "gib" in watch:
            total = torch.cuda.get_device_properties(0).total_memory / 2**30
            torch.cuda.set_per_process_memory_fraction(min(1.0, watch["gib"] / total), 0)
        if "scale" in watch:
            scaler = functools.partial(torch.amp.GradScaler, init_scale=watch["scale"])
            for name in ("torch.amp.GradScaler", "torch.cuda.amp.GradScaler"):
                stack.enter_context(mock.patch(name, scaler))
        if "stand_in" in watch:
            stack.enter_context(mock.patch("lib.runtime.accelerator.check_graphs"))
            stack.enter_context(mock.patch("lib.training.step_graphs.Recorder", CalledAgain))
        if "cudnn" in watch:
            stack.enter_context(mock.patch("lib.runtime.accelerator.choose_kernels"))
        if "profile" in watch:
            stack.enter_context(profiled(module, watch["profile"], Path(config.tracking.output_dir)))
        module.run_script(module.main, config)


class CalledAgain:
    """Stands in for CUDA graphs without a GPU: calls Python's code again instead of a replay."""

    def __init__(self, _: torch.device) -> None:
        """There is nothing to prepare."""

    def warm_up(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        return work


@contextlib.contextmanager
def profiled(train: Any, first: int, folder: Path) -> Iterator[None]:
    """Within, the five steps of train.py after the `first` are profiled, and saving is timed: seen.json in `folder`.

    With CUDA graphs also: how many were recorded, in which time, and for how much more memory that the process holds.
    """
    from torch.profiler import ProfilerActivity, profile

    on_gpu, count, step, record = uses_gpu(), 5, train.train_step, StepGraphs.record
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    seen: dict[str, Any] = {}
    state: dict[str, Any] = {"steps": 0}

    def profiled_step(*arguments: Any) -> None:
        if state["steps"] == first:
            synchronize(on_gpu)
            state["profile"] = profile(activities=kinds)
            state["profile"].__enter__()
            state["started"] = time.perf_counter()
        step(*arguments)
        state["steps"] += 1
        if state["steps"] == first + count:
            seen["host_ms_per_step"] = round((time.perf_counter() - state["started"]) * 1e3 / count, 3)
            synchronize(on_gpu)
            seen["ms_per_step"] = round((time.perf_counter() - state["started"]) * 1e3 / count, 3)
            state["profile"].__exit__(None, None, None)
            seen.update(count_events(state["profile"].events(), count))

    def recorded(graphs: StepGraphs, work: Callable[[], None], length: int) -> Callable[[], None] | None:
        synchronize(on_gpu)
        started, held = time.perf_counter(), torch.cuda.memory_reserved() if on_gpu else 0
        replay = record(graphs, work, length)
        found = {"graphs": int(replay is not None), "recording_seconds": time.perf_counter() - started}
        found["recording_gib"] = (torch.cuda.memory_reserved() - held) / 2**30 if on_gpu else 0
        seen.update({name: round(seen.get(name, 0) + value, 3) for name, value in found.items()})
        return replay

    def timed(what: str, method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            synchronize(on_gpu)
            started = time.perf_counter()
            result = method(*arguments)
            seen[what] = round(time.perf_counter() - started, 3)
            return result

        return call

    train.train_step = profiled_step
    train.Run.save_checkpoint = timed("checkpoint_seconds", train.Run.save_checkpoint)
    train.Run.save_best = timed("best_model_seconds", train.Run.save_best)
    try:
        with mock.patch.object(StepGraphs, "record", recorded):
            yield
    finally:
        (folder / "seen.json").write_text(json.dumps(seen))


def synchronize(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def count_events(events: Any, steps: int) -> dict[str, Any]:
    """Operations, kernels, their time, and calls of the driver by name (launches, copies, waits), each per step."""
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    calls = Counter(event.name for event in events if event.name.startswith("cuda"))
    attention = {
        event.name[:60] for event in on_device if any(word in event.name.lower() for word in ("flash", "fmha"))
    }
    return {
        "operations_per_step": sum(event.name.startswith("aten::") for event in events) / steps,
        "kernels_per_step": len(on_device) / steps,
        "kernel_ms_per_step": round(sum(event.time_range.elapsed_us() for event in on_device) / steps / 1e3, 3),
        "driver_calls_per_step": {name: number / steps for name, number in calls.most_common(8)},
        "attention_kernels": sorted(attention)[:4],
    }


# ---------------------------------------------------------------------------------------------------- the whole


def describe_environment(on_gpu: bool) -> dict[str, Any]:
    """The card and the versions that matter."""
    found: dict[str, Any] = {"versions": {name: version(name) for name in VERSIONS}, "device": "cpu"}
    if on_gpu:
        found |= {"device": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
        found |= {
            "gpus": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models and data")
    parser.add_argument("--only", choices=("right", "speed"), help="one half of the checks")
    parser.add_argument("--jobs", type=int, default=3, help="runs at a time where nothing is measured")
    parser.add_argument("--seconds", type=float, default=600.0, help="for everything; what does not fit fails")
    parser.add_argument("--output", type=Path, help="file for the JSON of the last line")
    parser.add_argument("--watched", help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args()
    if options.watched:
        watched(json.loads(options.watched), flags)
        return
    if flags:
        parser.error(f"unknown: {' '.join(flags)}")
    if not (options.tiny or uses_gpu()):
        parser.error("no GPU is used here; --tiny runs the checks on the CPU, and says nothing about a GPU")
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as place:
        runner = Runner(Path(place), options.tiny, options.seconds)
        environment = describe_environment(runner.on_gpu)
        print(json.dumps(environment), flush=True)
        write_materials(runner.folder, options.tiny)
        if options.only != "speed":
            check_right(runner, options.jobs)
        if options.only != "right":
            check_speed(runner)
    failed = [name for name, item in runner.found.items() if item["ok"] is False]
    text = json.dumps({"environment": environment, "checks": runner.found, "failed": failed}, default=str)
    if options.output:
        options.output.write_text(text + "\n")
    print(text)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
