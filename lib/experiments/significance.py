"""Whether two groups of runs differ: tests that keep their false alarms near the 5 % they promise.

A group is a recipe trained with several seeds. Its runs vary for two reasons, the seed and the samples of the split, and a
test that looks at one of them only calls differences significant that another seed or another split would not show.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

LEVEL = 0.05
"""p below this is called significant; intervals hold 1 - LEVEL."""

METHODS = {
    "t": "seeds × samples, t",
    "multi": "Multi-Bootstrap (conservative)",
    "single": "paired bootstrap, one seed",
}
POWER = 0.8
"""The chance to find the smallest difference that `Difference.detectable` names."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """The other group's mean score minus the baseline's, with a 95 % interval and a two-sided p value.

    `detectable` is the smallest true difference that this many seeds and samples find in 80 % of all cases; of a method that
    resamples it is that of a normal distribution with the deviation of the resamples.
    """

    value: float
    low: float
    high: float
    p: float
    method: str
    detectable: float = math.nan


def two_way(baseline: np.ndarray, other: np.ndarray) -> Difference:
    """Compare means of per-sample scores, of two or more seeds each: seeds and samples are both random.

    Arrays (seeds, samples). The squared standard error is var(d_i) / n + s_A² / k_A + s_B² / k_B, where d_i is the mean
    difference of sample i over the seeds, and s² = max(0, variance of the runs' scores - noise of the samples / n) the
    variance between seeds. Degrees of freedom by Satterthwaite (Biometrics 1946), from the observed variances of the runs'
    scores where s² is above 0: with s² itself, two or three seeds would give 8 % false alarms.
    """
    from scipy.special import stdtr, stdtrit  # Student's t: its distribution function, and the inverse

    value, size = float(other.mean() - baseline.mean()), baseline.shape[1]
    squared = float((other.mean(axis=0) - baseline.mean(axis=0)).var(ddof=1) / size)
    weighted = squared**2 / (size - 1)
    for scores in (baseline, other):
        seeds, observed = len(scores), float(scores.mean(axis=1).var(ddof=1))
        between = observed - float(scores.var(axis=0, ddof=1).mean()) / size
        if between > 0:
            squared += between / seeds
            weighted += (observed / seeds) ** 2 / (seeds - 1)
    if squared == 0.0:
        return Difference(value, value, value, 1.0 if value == 0 else 0.0, METHODS["t"], 0.0)
    error, freedom = math.sqrt(squared), squared**2 / weighted
    margin = error * float(stdtrit(freedom, 1 - LEVEL / 2))
    p = 2 * float(stdtr(freedom, -abs(value) / error))
    smallest = margin + error * float(stdtrit(freedom, POWER))
    return Difference(value, value - margin, value + margin, p, METHODS["t"], smallest)


def paired_bootstrap(baseline: np.ndarray, other: np.ndarray, resamples: int = 10_000, seed: int = 42) -> Difference:
    """Compare means of per-sample scores of one run each, (samples,): how the difference varies with other samples.

    The interval is the percentile one, the p value that of the sign of the resampled differences (Efron and Tibshirani
    1993). It says nothing about other seeds.
    """
    gaps, rng = np.asarray(other, dtype=np.float64) - baseline, np.random.default_rng(seed)
    values, counts = np.unique(gaps, return_counts=True)
    if len(values) < 100:  # resampling rows draws the counts of the few different gaps from a multinomial distribution
        means = rng.multinomial(len(gaps), counts / len(gaps), size=resamples) @ values / len(gaps)
    else:
        means = np.array([rng.choice(gaps, len(gaps)).mean() for _ in range(resamples)])
    return from_resamples(float(gaps.mean()), means, METHODS["single"])


def exact_mcnemar(baseline: np.ndarray, other: np.ndarray) -> float:
    """p value of McNemar's exact test on one run each: bool (samples,), whether each sample is right (McNemar 1947)."""
    from scipy.stats import binomtest

    gained, lost = int((other & ~baseline).sum()), int((baseline & ~other).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


Score = Callable[[np.ndarray], np.ndarray]
"""The score of a run for each row of `times` (resamples, samples), where sample i counts `times[:, i]` times: (resamples,)."""


def multi_bootstrap(
    baseline: Sequence[Score], other: Sequence[Score], size: int, resamples: int = 1000, seed: int = 42
) -> Difference:
    """Compare scores that are no means over samples, such as F1, of one or more seeds each, by resampling both.

    The Multi-Bootstrap (Sellam et al., ICLR 2022) with independent seeds: conservative, its false alarms stay near 1 %.
    With one seed each it is the paired bootstrap over samples.
    """
    rng = np.random.default_rng(seed)
    times = rng.multinomial(size, np.full(size, 1 / size), size=resamples)
    means, values = [], []
    for group in (baseline, other):
        scores = np.stack([score(times) for score in group])
        chosen = rng.integers(len(group), size=(len(group), resamples))
        means.append(scores[chosen, np.arange(resamples)].mean(axis=0))
        values.append(float(np.mean([score(np.ones((1, size), dtype=np.int64))[0] for score in group])))
    single = len(baseline) == len(other) == 1
    return from_resamples(values[1] - values[0], means[1] - means[0], METHODS["single" if single else "multi"])


def from_resamples(value: float, resampled: np.ndarray, method: str) -> Difference:
    """A difference with the percentile interval and the two-sided p value of its resamples."""
    from scipy.stats import norm

    resampled = resampled[np.isfinite(resampled)]
    if not len(resampled):
        return Difference(value, math.nan, math.nan, math.nan, method)
    low, high = np.percentile(resampled, [100 * LEVEL / 2, 100 * (1 - LEVEL / 2)])
    smaller = min((resampled <= 0).sum(), (resampled >= 0).sum())
    p = min(1.0, 2 * (smaller + 1) / (len(resampled) + 1))
    detectable = float(norm.ppf(1 - LEVEL / 2) + norm.ppf(POWER)) * float(resampled.std())
    return Difference(value, float(low), float(high), float(p), method, detectable)


def adjust_for_several(p_values: Sequence[float]) -> list[float]:
    """p values adjusted so that at most 5 % of the differences called significant are false (Benjamini and Hochberg 1995)."""
    from scipy.stats import false_discovery_control

    known = [p for p in p_values if not math.isnan(p)]
    adjusted = iter(false_discovery_control(known).tolist() if known else [])
    return [p if math.isnan(p) else next(adjusted) for p in p_values]
