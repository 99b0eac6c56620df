"""Options of compare.py."""

import dataclasses
from typing import Annotated

import tyro

from lib.config.limits import INPUT_PATH, NUMBER, OUTPUT_NAME, OUTPUT_PATH, SEED, Within, check_values
from lib.errors import require


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Compare finished runs: what differs in their settings, and whether their scores differ by more than chance.

    Runs with equal settings but for the seed form one group. The group of the first run is the baseline.
    """

    runs: tyro.conf.Positional[Annotated[tuple[str, ...], INPUT_PATH]] = ()
    """Folders of runs, folders that hold runs, folders of sweeps, or quoted patterns such as 'outputs/minilm-*'."""
    split: Annotated[str, tyro.conf.arg(metavar="STR"), OUTPUT_NAME] = "test"
    """Split whose predictions are compared; `eval.py --run RUN --split SPLIT` makes those that are missing."""
    metrics: tuple[str, ...] | None = None
    """Metrics to compare. [default: those of the baseline]"""
    resamples: Annotated[int, Within("[1, 1000000]")] = 1000
    """Bootstrap resamples behind intervals, and behind tests of scores such as F1."""
    seed: Annotated[int, SEED] = 42
    """Random seed of the bootstrap."""
    examples: Annotated[int, NUMBER] = 10
    """How many of the samples whose answers changed most are listed."""
    output_dir: Annotated[str | None, OUTPUT_PATH] = None
    """Folder for comparison.json, comparison.md and comparison.png. [default: nothing is written]"""

    def __post_init__(self) -> None:
        check_values(self)
        require(bool(self.runs), "give the folders of two or more runs, the baseline first")
