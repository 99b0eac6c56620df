"""Options of sweep.py."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Annotated

import tyro

from lib.config.cli import options_of, parse
from lib.config.limits import COUNT, OUTPUT_NAME, OUTPUT_PATH, SEED, Within, check_values, shorten
from lib.config.sections import flatten
from lib.config.train import TrainConfig
from lib.errors import UserError, require

OWN_FLAGS = {
    "--seed": "--seeds",
    "--output_dir": "nothing: each run has the folder of its name",
    "--run_name": "nothing: each run has a name of its own",
    "--pause_at_step": "--halving",
    "--score_test": "--finalists",
    "--fold": "--folds",
}
"""Flags of train.py that a sweep sets itself, and what to give instead."""

PART = r'"[^"]*"|\[(?:"[^"]*"|[^"\[\]])*\]|[^",\[\]]'
"""A piece of a value in which no comma ends it: in quotes, in brackets, or a character that is neither."""


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Train many runs, several seeds of each, and choose among them: each is one train.py command.

    Started again, the same command reads the runs that are finished, resumes those that were stopped, and trains the rest.
    """

    flags: tyro.conf.Positional[tuple[str, ...]] = ()
    """Flags of train.py that all runs share, after `--`."""
    seeds: Annotated[int, COUNT] = 1
    """Runs of each recipe, with the seeds 0, 1, 2, ..."""
    grid: tuple[str, ...] = ()
    """Recipes: all combinations of the values of options of train.py, such as lr=1e-5,2e-5 bs=16,32. Of an option with
    several values at once each stands in brackets: 'metrics=[f1_macro,accuracy],[accuracy]'."""
    search: tuple[str, ...] = ()
    """Recipes drawn evenly from ranges of options of train.py: lr=1e-5:1e-4:log warmup_steps=0:0.2 max_length=32:128:int,
    or from a list of values, as in --grid. They are compared on validation only."""
    trials: Annotated[int, Within("[2, 100000]")] = 16
    """Number of recipes that --search draws."""
    search_seed: Annotated[int, SEED] = 0
    """Seed of the recipes that --search draws. More --trials keep those that were drawn before."""
    folds: Annotated[int | None, Within("[2, 1000]")] = None
    """Cross-validation of one recipe: n runs, each of which leaves out another n-th of the training data and predicts it.
    The predictions of all rows are collected, with the labels that they contradict."""
    halving: Annotated[int | None, Within("[2, 100]")] = None
    """With --search or --finalists: pause the runs early, and go on with the best 1/n of them only, time and again."""
    finalists: Annotated[int | None, COUNT] = None
    """Compare one run of each recipe on validation; then train the best n recipes with --seeds fresh seeds, and score those
    on test. [default: 1 with --search, else every recipe is trained with all seeds and scored on test]"""
    name: Annotated[str | None, OUTPUT_NAME] = None
    """Name of the sweep. [default: made of model, data and what is varied]"""
    output_dir: Annotated[str | None, OUTPUT_PATH] = None
    """Folder of the sweep: its table, picture and logs. The runs are in outputs/. [default: sweeps/{name}]"""
    gpus: str = "all"
    """GPUs to use, one for each run: `all` that CUDA_VISIBLE_DEVICES names, `free:2` for two that nobody uses, or numbers
    such as 0,2. A GPU with memory of other programs on it is waited for."""
    max_parallel: Annotated[int | None, COUNT] = None
    """Runs at the same time. [default: one for each GPU; one on a CPU]"""
    list: bool = False
    """Print the commands of the runs, one a line, and run none: for a Slurm array, xargs or a queue."""

    def __post_init__(self) -> None:
        check_values(self)
        require(
            not (self.grid and self.search), "--grid and --search exclude each other; a list in --search is drawn from"
        )
        for flag, items in (("--grid", self.grid), ("--search", self.search)):
            for item in items:
                require(
                    bool(re.fullmatch(r"\w[\w-]*=\S.*", item)), f"{flag} takes option=values, got {shorten(item)!r}"
                )
        require(
            not (self.folds and (self.grid or self.search)), "--folds is for one recipe; leave --grid and --search out"
        )
        chosen = self.search or (self.finalists and self.grid)
        require(
            self.halving is None or bool(chosen),
            "--halving chooses among recipes: give --search, or --grid with --finalists",
        )
        require(self.finalists is None or bool(chosen), "--finalists chooses among recipes: give --grid or --search")
        name = self.name
        plain = name is None or (all(char.isalnum() or char in "._-" for char in name) and name not in (".", ".."))
        require(plain, f"--name takes letters, digits and . _ -, got {shorten(name)!r}")
        known = self.gpus == "all" or re.fullmatch(r"free:[1-9]\d*|[\w-]+(,[\w-]+)*", self.gpus)
        require(bool(known), f"--gpus takes all, free:N, or numbers such as 0,2; got {shorten(self.gpus)!r}")

    @property
    def chooses(self) -> int | None:
        """How many recipes are chosen on validation; None if all are trained to the end."""
        return self.finalists or (1 if self.search else None)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run is trained with apart from its seed: the flags that all runs share, and the varied ones, in order.

    `unsaid` are the varied ones of which a run's default name tells not all values apart.
    """

    shared: tuple[str, ...]
    varied: tuple[tuple[str, str], ...] = ()
    unsaid: tuple[str, ...] = ()

    def flags(self, seed: int, *more: str) -> list[str]:
        """The flags of train.py for a run of this recipe, with `more`."""
        varied = [part for name, value in self.varied for part in (f"--{name}", *items_of(value))]
        return [*self.shared, *varied, "--seed", str(seed), *more]

    def config(self, seed: int, *more: str) -> TrainConfig:
        """The options of such a run. Raises UserError if train.py would not take them."""
        return parse(TrainConfig, self.flags(seed, *more))

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.varied) or "as given"


def build_recipes(config: SweepConfig) -> list[Recipe]:
    """The recipes of a sweep, in order. Raises UserError for flags that train.py does not take, and for none to choose from."""
    for flag in config.flags:
        name = f"--{flag[2:].partition('=')[0].replace('-', '_')}" if flag[:2] == "--" else ""
        require(name not in OWN_FLAGS, f"{name} after --: a sweep sets it itself; give {OWN_FLAGS.get(name)}")
    given, default = flatten(parse(TrainConfig, config.flags)), flatten(TrainConfig())
    for flag, instead in OWN_FLAGS.items():  # in the file of a --config
        name = flag[2:]
        require(
            given[name] == default[name],
            f"{name} in the file of --config: a sweep sets it itself; remove the line, and give {instead}",
        )
    varied = draw(config) if config.search else combine(config.grid)
    recipes = [Recipe(config.flags, settings) for settings in varied]
    for recipe in recipes:
        solved = recipe.config(0).model.head_solver is not None
        require(
            not (config.halving and solved),
            "--halving pauses runs between their steps, and --head_solver makes only one; leave one of them out",
        )
    wanted = config.chooses or 1
    require(len(recipes) >= wanted, f"--finalists {wanted} of {len(recipes)} recipes: there is nothing to choose")
    return recipes


def combine(grid: Sequence[str]) -> list[tuple[tuple[str, str], ...]]:
    """All combinations of the values in `name=a,b ...`, the last name varying fastest."""
    axes = [(name, values_of("--grid", name, text)) for name, text in pairs("--grid", grid)]
    return [
        tuple(zip([name for name, _ in axes], row, strict=True)) for row in itertools.product(*(v for _, v in axes))
    ]


def draw(config: SweepConfig) -> list[tuple[tuple[str, str], ...]]:
    """`--trials` points that fill the space of `--search` evenly: a scrambled Halton sequence (Owen, 2017)."""
    from scipy.stats import qmc

    axes = list(pairs("--search", config.search))
    points = qmc.Halton(len(axes), rng=config.search_seed).random(config.trials)
    rows = [tuple((name, value_at(name, text, u)) for (name, text), u in zip(axes, row, strict=True)) for row in points]
    return list(dict.fromkeys(rows))


def value_at(name: str, text: str, share: float) -> str:
    """The value of an axis of `--search` at `share` of its way: of `low:high`, `low:high:log`, `low:high:int` or `a,b,c`."""
    low, _, rest = text.partition(":")
    if not rest or "," in text or text[0] in '["':
        values = values_of("--search", name, text)
        return values[int(share * len(values))]
    high, _, scale = rest.partition(":")
    wrong = f"--search {name}={shorten(text)}: expected low:high, low:high:log or low:high:int, or a list of values"
    require(scale in ("", "log", "int"), wrong)
    try:
        a, b = float(low), float(high)
    except ValueError:
        raise UserError(wrong) from None
    require(math.isfinite(a) and math.isfinite(b) and a < b, f"{wrong}, and {low} is not below {high}")
    if scale == "log":
        require(a > 0, f"--search {name}={shorten(text)}: a range on a logarithmic scale begins above 0")
        return f"{math.exp(math.log(a) + share * (math.log(b) - math.log(a))):.3g}"
    if scale == "int":
        return str(math.floor(a + share * (b - a + 1)))
    return f"{a + share * (b - a):.3g}"


def values_of(flag: str, name: str, text: str) -> list[str]:
    """The values in `a,b`, `[a,b],[c]` or `"a,b",c`, as written. Raises UserError for text that is no such list."""
    values = split_values(text)
    if values is None or any(re.match(r"\[", value) and value[-1] != "]" for value in values):
        raise UserError(
            f"{flag} {name}={shorten(text)}: a bracket or a quote is not closed, or something follows it. Commas are between "
            "values; of an option that takes several at once each stands in brackets, [a,b],[c], and a value with a comma in "
            "double quotes, within the single ones of the shell"
        )
    option = options_of(TrainConfig).get(f"--{name}")
    listed = next((value for value in values if value[:1] == "["), None)
    require(
        listed is None or option is None or option.takes_many,
        f"{flag} {name}={shorten(text)}: --{name} takes one value; for several recipes leave the brackets out",
    )
    twice = next((value for value in values if values.count(value) > 1), None)
    require(all(values), f"{flag} {name}={shorten(text)}: a value between the commas is empty")
    require(twice is None, f"{flag} {name}={shorten(text)} names {twice} twice")
    return values


def split_values(text: str) -> list[str] | None:
    """The parts between commas that are in no quotes or brackets; None if one of these is not closed."""
    found, rest = [], text + ","
    while rest:
        match = re.match(rf"((?:{PART})*),", rest)
        if match is None:
            return None
        found.append(match[1].strip())
        rest = rest[match.end() :]
    return found


def items_of(value: str) -> list[str]:
    """What a value of `--grid` or `--search` gives to its flag: the items of `[a,b]`, or the value itself; without quotes."""
    items = split_values(value[1:-1]) or [] if value[:1] == "[" else [value]
    return [item.replace('"', "") for item in items if item]


def pairs(flag: str, items: Sequence[str]) -> Iterator[tuple[str, str]]:
    """`name=values` items as pairs. Raises UserError for an option that train.py does not have, or that is given twice."""
    seen = set[str]()
    known = options_of(TrainConfig)
    for item in items:
        name, _, text = item.partition("=")
        name = name.replace("-", "_")
        field = known[f"--{name}"].name if f"--{name}" in known else name
        require(
            f"--{field}" not in OWN_FLAGS, f"{flag} {item}: a sweep sets it itself; give {OWN_FLAGS.get(f'--{field}')}"
        )
        require(field not in seen, f"{flag} varies {name} twice")
        seen.add(field)
        yield name, text
