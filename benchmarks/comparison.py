"""What is compared: pairs of contenders by one measure, medians and ranges, as tables."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

Run = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: `measure` gives the seconds of a run and, for what it is paired with, of the other."""

    work: str
    against: str
    ours: str
    peer: str
    measure: Callable[[Run, Run], float | None]
    at_least: float | None = None
    reach_for: float | None = None
    digits: int = 1
    """Of seconds and ratios, after the point."""


def seconds(key: str) -> Callable[[Run, Run], float | None]:
    return lambda run, other: run.get(key)


def seconds_to_accuracy(run: Run, note: Run) -> float | None:
    """Seconds until `run` first had the validation accuracy that `note` ended with; None if it never had."""
    goal = note["evaluations"][-1][1]
    return next((moment for moment, accuracy in run["evaluations"] if accuracy >= goal), None)


def seconds_to_end_accuracy(run: Run, note: Run) -> float | None:
    """The same, but `note` has the accuracy that it ends with when its last epoch is validated: nobody stops it before."""
    return note["evaluations"][-1][0] if run is note else seconds_to_accuracy(run, note)


NOTE, MANUAL, GROUPED, PLAIN = "note's script", "manual loop", "Trainer, grouped", "Trainer, fp32"
ROWS = {
    "head": Row(
        "{head_epochs} of the head alone, whole process",
        "the note's script",
        "ours: head",
        NOTE,
        seconds("whole_seconds"),
        40,
        100,
    ),
    "accuracy": Row(
        "time to the validation accuracy the note's script ends with",
        "the note's script, {head_epochs}",
        "ours: head",
        NOTE,
        seconds_to_end_accuracy,
        50,
        150,
    ),
    "accuracy_first": Row(
        "time to the same accuracy",
        "the note's script, when it first had it",
        "ours: head",
        NOTE,
        seconds_to_accuracy,
    ),
    "manual": Row(
        "{epochs} of full fine-tuning, its steps",
        "manual Accelerate loop, its defaults",
        "ours: full",
        MANUAL,
        seconds("train_seconds"),
        4,
        7,
    ),
    "trainer": Row(
        "{epochs} of full fine-tuning, its steps",
        "Trainer, {fast} + length grouping",
        "ours: full",
        GROUPED,
        seconds("train_seconds"),
        1.3,
        2,
    ),
    "trainer_fp32": Row(
        "{epochs} of full fine-tuning, its steps",
        "Trainer, fp32, random batches",
        "ours: full",
        PLAIN,
        seconds("train_seconds"),
    ),
    "score": Row(
        "scoring a split, tokens at hand",
        "manual Accelerate loop",
        "ours: scoring",
        "manual loop: scoring",
        seconds("eval_seconds"),
        4,
        8,
    ),
    "start": Row(
        "process start to first step",
        "Trainer script",
        "ours: start",
        "Trainer: start",
        seconds("first_step_at"),
        1.3,
        2,
    ),
    "launch": Row(
        "the same through accelerate launch",
        "Trainer script, by python",
        "ours: start by accelerate launch",
        "Trainer: start",
        seconds("first_step_at"),
    ),
    "processes": Row(
        "{epochs} of full fine-tuning, its steps, on two processes",
        "one process on the same cores",
        "ours: two processes",
        "ours: full",
        seconds("train_seconds"),
        0.9,
        1,
        digits=2,
    ),
    "overlap": Row(
        "12 steps of two processes over 1 Gbit/s",
        "the same, gradients copied and summed after backward, as before",
        "limited link: overlap",
        "limited link: sum after backward",
        seconds("train_seconds"),
        1.15,
        digits=2,
    ),
    "ddp": Row(
        "12 steps of two processes over 1 Gbit/s",
        "DistributedDataParallel of the same model",
        "limited link: overlap",
        "limited link: DDP",
        seconds("train_seconds"),
        0.97,
        1,
        digits=2,
    ),
    "fsdp2": Row(
        "12 steps of two processes over 1 Gbit/s, the model in shards by FSDP2",
        "DistributedDataParallel of the same model",
        "limited link: FSDP2",
        "limited link: DDP",
        seconds("train_seconds"),
        digits=2,
    ),
}
ONCE_PER_HEAD = ("head", "accuracy", "accuracy_first")
"""Rows of the long runs, whose samples and repeats are set apart."""
LINKED = ("overlap", "ddp", "fsdp2")
"""Rows that need two network namespaces, see `limited_link.py`."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A row as measured: seconds of each repeat, ours and the peer's, in pairs that ran next to each other."""

    name: str
    row: Row
    ours: list[float]
    peer: list[float]
    missed: int = 0
    """Pairs in which one of the two never came to what is measured."""

    @property
    def ratio(self) -> float:
        """Ratio of the medians, the peer's by ours."""
        return statistics.median(self.peer) / statistics.median(self.ours)

    @property
    def ratios(self) -> list[float]:
        """Ratio of each pair."""
        return [peer / ours for ours, peer in zip(self.ours, self.peer, strict=True)]


def compare(name: str, runs: Sequence[Run]) -> Outcome | None:
    """The outcome of a row from all runs; None when no pair is finished."""
    row = ROWS[name]
    by_repeat: dict[int, dict[str, Run]] = {}
    for run in runs:
        by_repeat.setdefault(run["repeat"], {})[run["name"]] = run
    outcome, missed = Outcome(name, row, [], []), 0
    for pair in by_repeat.values():
        if row.ours not in pair or row.peer not in pair:
            continue
        ours, peer = pair[row.ours], pair[row.peer]
        values = row.measure(ours, peer), row.measure(peer, peer)
        if None in values:
            missed += 1
            continue
        outcome.ours.append(values[0])  # type: ignore[arg-type]
        outcome.peer.append(values[1])  # type: ignore[arg-type]
    return dataclasses.replace(outcome, missed=missed) if outcome.ours or missed else None


def spread(values: Sequence[float], unit: str = "", digits: int = 1) -> str:
    """`median [min..max]`; of a single value, itself."""
    if not values:
        return "–"
    middle = f"{statistics.median(values):.{digits}f}{unit}"
    return middle if len(values) == 1 else f"{middle} [{min(values):.{digits}f}..{max(values):.{digits}f}]"


def ratio_rows(outcomes: Sequence[Outcome], words: dict[str, Any]) -> list[list[str]]:
    """The table of the targets: who, seconds of both, how many times faster."""
    table = [["work", "against", "ours, s", "peer, s", "times faster", "at least", "reach for", "n"]]
    for outcome in outcomes:
        row = outcome.row
        faster = (
            f"**{outcome.ratio:.{row.digits}f}** {bracket(outcome.ratios, row.digits)}"
            if outcome.ours
            else "not reached"
        )
        missed = f" ({outcome.missed} not reached)" if outcome.missed and outcome.ours else ""
        targets = ["" if goal is None else f"{goal:g}" for goal in (row.at_least, row.reach_for)]
        table.append(
            [
                row.work.format(**words),
                row.against.format(**words),
                spread(outcome.ours, digits=row.digits),
                spread(outcome.peer, digits=row.digits),
                f"{faster.strip()}{missed}",
                *targets,
                str(len(outcome.ours)),
            ]
        )
    return table


def bracket(values: Sequence[float], digits: int = 1) -> str:
    return f"[{min(values):.{digits}f}..{max(values):.{digits}f}]" if len(values) > 1 else ""


def measure_rows(runs: Sequence[Run], forward_flops: dict[str, dict[str, float]], rate: float) -> list[list[str]]:
    """The table of all measures, one line a contender: medians.

    `forward_flops` is that of the splits, by the kind of data a contender ran on; `rate` is the machine's in FLOP/s.
    """
    table = [
        [
            "contender",
            "whole run, s",
            "first step, s",
            "training, samples/s",
            "scoring, samples/s",
            "accuracy",
            "memory, GiB",
            "padding",
            "share of the product rate",
        ]
    ]
    for name in dict.fromkeys(run["name"] for run in runs):
        own = [run for run in runs if run["name"] == name]
        table.append(
            [
                name,
                median(own, lambda run: run["whole_seconds"], "{:.1f}"),
                median(own, lambda run: run.get("first_step_at"), "{:.1f}"),
                median(own, lambda run: per_second(run, "train"), "{:.0f}"),
                median(own, lambda run: per_second(run, "eval"), "{:.0f}"),
                median(own, lambda run: run["evaluations"][-1][1] if run["evaluations"] else None, "{:.3f}"),
                median(own, lambda run: run.get("peak_memory_gib"), "{:.2f}"),
                median(own, lambda run: run.get("padding_share"), "{:.1%}"),
                median(own, lambda run: useful_share(run, forward_flops[run["kind"]], rate), "{:.0%}"),
            ]
        )
    return table


def per_second(run: Run, what: str) -> float | None:
    elapsed = run.get(f"{what}_seconds")
    return run[f"{what}_samples"] / elapsed if elapsed else None


def useful_share(run: Run, forward_flops: dict[str, float], rate: float) -> float | None:
    """Useful FLOPs a second by the machine's rate, of full fine-tuning and of scoring the train split.

    None of the others: what is useful of an epoch of the head alone is a matter of definition, and one step says nothing.
    """
    if run["name"].endswith(": scoring"):
        return forward_flops["train"] / run["eval_seconds"] / rate
    if run["name"] in ("ours: full", MANUAL, GROUPED, PLAIN):
        epochs = run["train_samples"] / run["samples"]
        return 3 * epochs * forward_flops["train"] / run["train_seconds"] / rate
    return None


def median(runs: Sequence[Run], value: Callable[[Run], float | None], form: str) -> str:
    values = [found for run in runs if (found := value(run)) is not None]
    return form.format(statistics.median(values)) if values else ""


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
