"""How often compare.py's test calls two groups of one recipe different, and how often it finds a true difference.

    python benchmarks/false_alarms.py

Simulated runs on 1,078 samples, the size of the test split of movie_reviews: no training, minutes on one core.
"""

import math
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lib.evaluation.tables import format_table  # noqa: E402
from lib.experiments.significance import LEVEL, two_way  # noqa: E402

SIZE, REPETITIONS = 1078, 20_000


class Simulation:
    """Runs of a recipe: a sample is right where difficulty + noise of the seed + drift of the seed + shift is above 0.

    Two seeds of a recipe differ on one sample in nine, and accuracy is about 0.6. A shift of 0.035 is 1.25 points of
    accuracy; a drift of 0.01 moves a seed's accuracy by 0.4 points.
    """

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def difficulty(self) -> np.ndarray:
        """float64 (samples,): what all runs share."""
        return self.rng.normal(0.33, 1, SIZE)

    def group(self, difficulty: np.ndarray, seeds: int, shift: float = 0.0, drift: float = 0.01) -> np.ndarray:
        """float64 (seeds, samples): 1 where a run is right."""
        noise = self.rng.normal(0, 0.25, (seeds, SIZE)) + self.rng.normal(0, drift, (seeds, 1))
        return (difficulty + noise + shift > 0).astype(np.float64)

    def significant(
        self, seeds: int, repetitions: int, shift: float = 0.0, drift: float = 0.01, other: float | None = None
    ) -> float:
        """The share of comparisons that `two_way` calls significant; `other` is the drift of the second group."""
        found = 0
        for _ in range(repetitions):
            difficulty = self.difficulty()
            baseline = self.group(difficulty, seeds, drift=drift)
            found += (
                two_way(baseline, self.group(difficulty, seeds, shift, drift if other is None else other)).p < LEVEL
            )
        return found / repetitions


def main() -> None:
    columns: dict[str, dict[str, float]] = {
        "false alarms": {},
        "with drift 0.03": {"drift": 0.03},
        "with drift 0.01 and 0.06": {"other": 0.06},
        "finds +1.25 points": {"shift": 0.035},
    }
    rows = [["seeds in each group", *columns]]
    for seeds in (2, 3, 5, 10):
        found = [Simulation(seeds).significant(seeds, REPETITIONS, **given) for given in columns.values()]
        rows.append([str(seeds), *(f"{share:.1%}" for share in found)])
    print(format_table(rows))
    error = math.sqrt(LEVEL * (1 - LEVEL) / REPETITIONS)
    print(f"{REPETITIONS:,} comparisons each, standard error of 5 %: {100 * error:.2f} points")


if __name__ == "__main__":
    main()
