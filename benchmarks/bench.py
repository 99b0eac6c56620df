"""This project and its peers side by side: same model, data, batch and epochs, every run a whole process, interleaved.

    python benchmarks/bench.py                        all rows; see --help for what it takes by default
    python benchmarks/bench.py --quick                64 samples, 2 epochs, one repeat: does it work?
    python benchmarks/bench.py --only manual score    some rows: {rows}
    python benchmarks/bench.py --resume               go on; finished runs are read, not repeated
    python benchmarks/bench.py --device cuda          on a GPU, with a model of roberta-base's shape

Prints a table, and leaves runs.jsonl, results.json, RESULTS.md and speed.png in --folder; `--publish` puts the last three
into benchmarks/. Stopped by Ctrl-C, it reports what is finished.
"""

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

from benchmarks.comparison import (  # noqa: E402
    LINKED,
    ONCE_PER_HEAD,
    ROWS,
    Outcome,
    Row,
    compare,
    markdown,
    measure_rows,
    ratio_rows,
)
from benchmarks.contenders import RunFailed, Setting, devices, run  # noqa: E402
from benchmarks.limited_link import unavailable  # noqa: E402

NUMBERS: dict[str, tuple[int, str]] = {
    "samples": (1000, "training samples [default: 1000]"),
    "head_samples": (2000, "of the rows head and accuracy [default: 2000]"),
    "eval_samples": (300, "of validation and test each [default: 300]"),
    "epochs": (1, "of full fine-tuning [default: 1]"),
    "head_epochs": (20, "of the head alone [default: 20]"),
    "repeats": (3, "runs of each contender [default: 3]"),
    "head_repeats": (2, "of the head alone [default: 2]"),
    "batch_size": (32, "in training [default: 32]"),
}
ARTEFACTS = ("results.json", "RESULTS.md", "speed.png")


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows that share data, epochs and repeats: the short runs, or the long ones of the head alone."""

    kind: str
    rows: list[str]
    samples: int
    epochs: int
    repeats: int

    def folder(self, options: argparse.Namespace) -> Path:
        return options.folder.resolve() / f"{options.device}-{self.samples}-{options.eval_samples}"

    @property
    def contenders(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in (ROWS[row].peer, ROWS[row].ours)))

    def signature(self, options: argparse.Namespace) -> dict[str, Any]:
        """What a finished run must agree in to be used again."""
        names = ("eval_samples", "batch_size", "device")
        shared = {name: getattr(options, name) for name in names}
        return {"kind": self.kind, "asked": shared | {"samples": self.samples, "epochs": self.epochs}}


def parts_of(options: argparse.Namespace) -> list[Part]:
    head = [row for row in options.only if row in ONCE_PER_HEAD]
    full = [row for row in options.only if row not in ONCE_PER_HEAD]
    parts = [
        Part("full", full, options.samples, options.epochs, options.repeats),
        Part("head", head, options.head_samples, options.head_epochs, options.head_repeats),
    ]
    return [part for part in parts if part.rows]


def skipped(options: argparse.Namespace) -> dict[str, str]:
    """Of the rows asked for, those that this machine cannot show, with the reason."""
    unshown = {}
    if options.device == "cuda":
        unshown = dict.fromkeys(("processes", *LINKED), "it compares processes on CPUs")
    elif {*options.only} & {*LINKED} and (reason := unavailable()):
        unshown = dict.fromkeys(LINKED, f"two network namespaces with a link between them cannot be made: {reason}")
    return {row: why for row, why in unshown.items() if row in options.only}


def make_materials(part: Part, options: argparse.Namespace) -> dict[str, Any]:
    """Data, model, FLOPs and rates, made in another process: this one stays small, so that it takes nothing away."""
    folder = part.folder(options)
    path = folder / "materials.json"
    if not (options.resume and path.exists()):
        command = [sys.executable, str(ROOT / "benchmarks" / "materials.py"), "--folder", str(folder)]
        command += ["--batch_size", str(options.batch_size), "--device", options.device]
        command += ["--samples", str(part.samples), "--eval_samples", str(options.eval_samples)]
        done = subprocess.run(command, env=os.environ | devices(options.device), capture_output=True, text=True)
        if done.returncode:
            raise RunFailed(done.stderr.strip().removeprefix("error: "))
    return json.loads(path.read_text())


def read_runs(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finish_runs(
    parts: list[Part], materials: dict[str, dict[str, Any]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """All runs that the parts need, one after another: repeat by repeat, peer and ours in turn."""
    path = options.folder / "runs.jsonl"
    if not options.resume:
        path.unlink(missing_ok=True)
    found, runs = read_runs(path), []
    jobs = [(part, repeat, name) for part in parts for repeat in range(part.repeats) for name in part.contenders]
    bar = tqdm(jobs, unit="run", disable=None)
    try:
        for part, repeat, name in bar:
            wanted = part.signature(options) | {"name": name, "repeat": repeat}
            finished = [old for old in found if wanted.items() <= old.items()]
            if not finished:
                bar.set_postfix_str(f"{name}, repeat {repeat + 1} of {part.repeats}")
                setting = Setting(part.folder(options), part.epochs, options.batch_size, device=options.device)
                out = (
                    options.folder.resolve()
                    / "runs"
                    / f"{part.kind}-{repeat}-{name.replace(' ', '_').replace(':', '')}"
                )
                shutil.rmtree(out, ignore_errors=True)
                samples = {"samples": materials[part.kind]["samples"]["train"]}
                finished = [wanted | samples | run(name, setting, repeat, out)]
                shutil.rmtree(out)
                with path.open("a") as file:
                    file.write(json.dumps(finished[0]) + "\n")
            runs.append(finished[-1])
    except KeyboardInterrupt:
        print("\nstopped: what follows is of the finished runs only", file=sys.stderr)
    return runs


def report(runs: list[dict[str, Any]], materials: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    """Write results.json, RESULTS.md and speed.png; returns the tables as text."""
    from benchmarks.plot import plot

    any_part = next(iter(materials.values()))
    machine, rates = any_part["machine"], any_part["matmul_rates"]
    fast = "bf16" if machine["fast_bf16"] else "fp32 (no bf16 in hardware)"
    words = {"epochs": epochs(options.epochs), "head_epochs": epochs(options.head_epochs), "fast": fast}
    outcomes = [outcome for name in options.only if (outcome := compare(name, runs))]
    flops = {kind: material["forward_flops"] for kind, material in materials.items()}
    text = "\n\n".join(
        [
            "# Speed\n\n![times faster than each peer](speed.png)",
            f"`{command_line()}`\n\n{describe(machine, rates, materials, options)}",
            markdown(ratio_rows(outcomes, words)),
            markdown(measure_rows(runs, flops, max(rates.values()))),
        ]
    )
    (options.folder / "RESULTS.md").write_text(text + "\n", encoding="utf-8")
    summary = {"command": command_line(), "materials": materials, "rows": [as_dict(o, words) for o in outcomes]}
    (options.folder / "results.json").write_text(json.dumps(summary | {"runs": runs}, indent=2) + "\n")
    plot(outcomes, words, f"{machine['device']}, {machine['threads']} threads", options.folder / "speed.png")
    return text


def epochs(number: int) -> str:
    return "one epoch" if number == 1 else f"{number} epochs"


def describe(
    machine: dict[str, Any], rates: dict[str, float], materials: dict[str, Any], options: argparse.Namespace
) -> str:
    """Machine, versions, data and how the numbers came about, as a paragraph."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    products = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in rates.items())
    samples = "; ".join(f"{kind} rows: {material['samples']['train']:,}" for kind, material in materials.items())
    evaluated = next(iter(materials.values()))["samples"]
    model = "a model of roberta-base's shape with random weights" if options.device == "cuda" else "`minilm`"
    return (
        f"{machine['device']}, {machine['threads']} threads; Python {machine['python']}, {versions}. "
        f"{model} on `movie_reviews`, five classes, batch {options.batch_size}; training samples: {samples}; "
        f"{evaluated['validation']:,} validation and {evaluated['test']:,} test samples. Every run is a whole process with "
        "empty caches; peer and ours in turn. Numbers are medians with [least..most] of n runs; times faster: ratio of "
        f"medians with the range of the ratios of pairs. Matrix products of the model's shapes, GFLOP/s: {products}; "
        "the last column of the second table is useful FLOPs (`benchmarks/flops.py`) by the highest of these."
    )


def as_dict(outcome: Outcome, words: dict[str, Any]) -> dict[str, Any]:
    row: Row = outcome.row
    return {
        "name": outcome.name,
        "work": row.work.format(**words),
        "against": row.against.format(**words),
        "ours_seconds": outcome.ours,
        "peer_seconds": outcome.peer,
        "times_faster": outcome.ratio if outcome.ours else None,
        "paired_ratios": outcome.ratios,
        "not_reached": outcome.missed,
        "at_least": row.at_least,
        "reach_for": row.reach_for,
    }


def command_line() -> str:
    return shlex.join(["python", "benchmarks/bench.py", *sys.argv[1:]])


def parse() -> argparse.Namespace:
    text = (__doc__ or "").format(rows=" ".join(ROWS))
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="rows of the table")
    for name, (default, what) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=what)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"), help="[default: outputs/bench]")
    parser.add_argument("--quick", action="store_true", help="as small as can be; the numbers mean nothing")
    parser.add_argument("--resume", action="store_true", help="use what is finished in --folder")
    parser.add_argument("--publish", action="store_true", help="put table, plot and numbers into benchmarks/")
    options = parser.parse_args()
    if options.quick:
        options.samples = options.head_samples = 64
        options.eval_samples, options.head_epochs, options.repeats, options.head_repeats = 32, 2, 1, 1
    return options


def main() -> None:
    options = parse()
    options.folder.mkdir(parents=True, exist_ok=True)
    for row, why in skipped(options).items():
        print(f"row {row} is skipped: {why}", file=sys.stderr)
        options.only.remove(row)
    parts = parts_of(options)
    if not parts:
        sys.exit("error: no row is left")
    try:
        materials = {part.kind: make_materials(part, options) for part in parts}
        runs = finish_runs(parts, materials, options)
    except RunFailed as error:
        sys.exit(f"error: {error}")
    print(report(runs, materials, options))
    for name in ARTEFACTS if options.publish else ():
        shutil.copy(options.folder / name, ROOT / "benchmarks" / name)


if __name__ == "__main__":
    main()
