"""Tests between groups of runs: they keep their false alarms, find what is there, and agree with the libraries."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.false_alarms import SIZE, Simulation
from lib.experiments.significance import (
    adjust_for_several,
    exact_mcnemar,
    multi_bootstrap,
    paired_bootstrap,
    two_way,
)


@pytest.mark.parametrize("drift", [0.01, 0.03])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_false_alarms_between_groups_of_one_recipe_stay_near_five_percent(seeds, drift):
    assert 0.02 < Simulation(0).significant(seeds, 1000, drift=drift) < 0.065


def test_more_seeds_find_a_true_difference_more_often():
    power = [Simulation(1).significant(seeds, 200, shift=0.035) for seeds in (3, 5, 10)]
    assert power[0] < power[1] < power[2]
    assert power[2] > 0.8


def test_smallest_difference_that_is_named_is_found_in_about_80_percent_of_all_comparisons():
    simulation, found, named = Simulation(2), 0, []
    for _ in range(200):
        difficulty = simulation.difficulty()
        baseline, other = (simulation.group(difficulty, 10, shift) for shift in (0.0, 0.029))
        result = two_way(baseline, other)
        found += result.p < 0.05
        named.append(result.detectable)
    assert np.median(named) == pytest.approx(0.0105, abs=0.0015)  # 0.029 shifts accuracy by as much
    assert 0.7 < found / 200 < 0.95


def test_one_seed_copied_ten_times_does_not_become_significant():
    baseline, other = np.zeros((1, 400)), np.zeros((1, 400))
    baseline[0, :40] = other[0, 40:98] = 1.0
    assert exact_mcnemar(baseline[0] > 0, other[0] > 0) > 0.05
    assert stats.binomtest(580, 980).pvalue < 0.001  # pooling the copies would call it significant
    assert two_way(np.repeat(baseline, 10, axis=0), np.repeat(other, 10, axis=0)).p > 0.05


def test_without_seeds_effects_two_way_is_the_paired_t_test_over_samples():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=200), rng.normal(0.2, 1, 200)
    found = two_way(np.stack([a, a]), np.stack([b, b]))
    reference = stats.ttest_rel(b, a)
    assert found.p == pytest.approx(reference.pvalue)
    interval = reference.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_equal_groups_do_not_differ():
    same = np.tile(np.arange(50) % 2, (3, 1)).astype(np.float64)
    assert (two_way(same, same).value, two_way(same, same).p) == (0.0, 1.0)
    assert paired_bootstrap(same[0], same[0]).p == 1.0
    assert exact_mcnemar(same[0] > 0, same[0] > 0) == 1.0


def test_mcnemar_is_the_exact_binomial_test_of_the_changed_answers():
    before = np.array([True] * 12 + [False] * 4 + [True] * 30)
    after = np.array([False] * 12 + [True] * 4 + [True] * 30)
    assert exact_mcnemar(before, after) == pytest.approx(stats.binomtest(4, 16).pvalue)


def test_bootstrap_interval_of_a_mean_is_the_normal_one_of_many_samples():
    rng = np.random.default_rng(5)
    for gaps in (rng.normal(0.1, 1, 3000), rng.integers(-1, 2, 3000).astype(np.float64)):
        found = paired_bootstrap(np.zeros(3000), gaps)
        error = gaps.std() / np.sqrt(3000)
        expected = (gaps.mean() - 1.96 * error, gaps.mean() + 1.96 * error)
        assert (found.low, found.high) == pytest.approx(expected, abs=0.1 * error)
        assert found.detectable == pytest.approx((1.96 + 0.84) * error, rel=0.05)


def test_multi_bootstrap_is_more_careful_than_two_way():
    simulation = Simulation(6)
    difficulty = simulation.difficulty()
    baseline, other = simulation.group(difficulty, 5), simulation.group(difficulty, 5, 0.05)

    def scores(group):
        return [lambda times, run=run: times @ run / times.sum(axis=1) for run in group]

    found, reference = multi_bootstrap(scores(baseline), scores(other), SIZE), two_way(baseline, other)
    assert found.value == pytest.approx(reference.value)
    assert found.low < reference.low < found.value < reference.high < found.high
    assert found.p > reference.p


def test_several_comparisons_are_adjusted_and_undefined_ones_left_out():
    adjusted = adjust_for_several([0.01, 0.04, float("nan"), 0.03])
    assert adjusted[:2] == pytest.approx([0.03, 0.04])
    assert np.isnan(adjusted[2])
    assert adjust_for_several([float("nan")])[0] != adjust_for_several([0.02])[0] == 0.02
