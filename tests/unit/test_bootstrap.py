"""Intervals: closed forms, coverage by simulation, and what is refused."""

from math import inf, sqrt

import numpy as np
import pytest

from prefloop.errors import DataError
from prefloop.evaluate.bootstrap import jackknife, paired_bootstrap, ratio_bootstrap


def covered(make, truth: float, data_sets: int, seed: int = 1) -> float:
    """Share of simulated data sets, in %, whose interval holds `truth`. `make` returns an interval."""
    generator = np.random.default_rng(seed)
    intervals = [make(generator, number) for number in range(data_sets)]
    return 100 * float(np.mean([i.low <= truth <= i.high for i in intervals]))


@pytest.mark.parametrize(("n", "data_sets"), [(50, 1000), (200, 600), (1000, 300)])
def test_coverage_of_the_mean(n, data_sets):
    make = lambda g, i: paired_bootstrap(g.normal(0.3, 2.0, n), seed=i, resamples=1000)  # noqa: E731
    assert 93 <= covered(make, 0.3, data_sets) <= 97


@pytest.mark.parametrize("n", [50, 200])
def test_coverage_of_a_win_rate_of_four_comparisons_a_prompt(n):
    # Prompts differ in how often the policy wins: clusters, not 4 n independent comparisons.
    def make(g, i):
        wins = g.binomial(4, g.beta(3, 2, n)) / 4
        return paired_bootstrap(100 * wins, seed=i, resamples=1000, bounds=(0.0, 100.0))

    assert 93 <= covered(make, 60.0, 600) <= 97


@pytest.mark.parametrize("n", [50, 200])
def test_coverage_of_a_ratio_of_sums(n):
    # Tokens of a prompt share its mean, and longer prompts have another mean: ratio 0.2 + 0.001 E[t²]/E[t].
    def make(g, i):
        tokens = g.integers(50, 151, n).astype(float)
        return ratio_bootstrap(tokens * (0.2 + 0.001 * tokens + g.normal(0, 0.1, n)), tokens, seed=i, resamples=1000)

    support = np.arange(50, 151)
    truth = 0.2 + 0.001 * float((support**2).mean() / support.mean())
    assert 93 <= covered(make, truth, 600) <= 97


def test_small_samples_get_the_wider_interval():
    make = lambda g, i: paired_bootstrap(g.normal(size=10), seed=i)  # noqa: E731
    assert covered(make, 0.0, 600) >= 93  # the plain percentile interval covers 90.6 % here


def test_the_interval_is_about_student_t():
    values = np.random.default_rng(3).normal(size=400)
    found = paired_bootstrap(values, resamples=20_000)
    half = 1.9659 * values.std(ddof=1) / sqrt(400)  # t quantile of 399 degrees of freedom
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.04 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.04 * half)
    assert found.n == 400


def test_another_statistic():
    values = np.random.default_rng(0).exponential(size=300)
    found = paired_bootstrap(values, lambda v: np.median(v, axis=-1))
    assert found.value == np.median(values)
    # Var(median) = 1 / (4 n f(m)²), f(ln 2) = 1/2
    assert (found.high - found.low) / 2 == pytest.approx(1.96 / sqrt(300), rel=0.25)


def test_same_seed_same_interval_and_chunks_do_not_matter(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    one = paired_bootstrap(values, seed=5)
    assert paired_bootstrap(list(values), seed=5) == one
    assert paired_bootstrap(values, seed=6) != one
    monkeypatch.setattr("prefloop.evaluate.bootstrap._CELLS_AT_ONCE", 50 * 64)
    assert paired_bootstrap(values, seed=5) == one


def test_a_ratio_is_not_the_mean_of_ratios():
    found = ratio_bootstrap([1.0, 30.0], [10.0, 100.0])
    assert found.value == pytest.approx(31 / 110)
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.3))


def test_all_on_one_end_gets_the_exact_binomial_bound():
    # Clopper and Pearson: with k = n of n the lower end is (α/2)^(1/n).
    found = paired_bootstrap([100.0] * 20, bounds=(0.0, 100.0))
    assert found.low == pytest.approx(100 * 0.025 ** (1 / 20))
    assert found.high == 100.0
    lost = paired_bootstrap([0.0] * 20, bounds=(0.0, 100.0))
    assert (lost.low, lost.high) == (0.0, pytest.approx(100 - found.low))
    # Three prompts won prove nothing; six do.
    assert (
        paired_bootstrap([100.0] * 3, bounds=(0.0, 100.0)).low
        < 50
        < paired_bootstrap([100.0] * 6, bounds=(0.0, 100.0)).low
    )


def test_equal_values_inside_the_range_have_no_spread():
    found = paired_bootstrap([50.0] * 20, bounds=(0.0, 100.0))
    assert (found.low, found.high) == (50.0, 50.0)


def test_one_prompt_has_no_interval():
    assert paired_bootstrap([0.5]).low == -inf
    assert paired_bootstrap([0.5], bounds=(0.0, 1.0)).high == 1.0
    assert ratio_bootstrap([1.0], [2.0]).high == inf
    assert jackknife(0.5, [0.4], bounds=(0.0, 1.0)).low == 0.0


def test_jackknife_of_a_mean_is_the_t_interval():
    values = np.random.default_rng(2).normal(size=30)
    left_out = [np.delete(values, i).mean() for i in range(30)]
    found = jackknife(float(values.mean()), left_out)
    half = 2.0452 * values.std(ddof=1) / sqrt(30)  # t quantile of 29 degrees of freedom
    assert found.high - found.low == pytest.approx(2 * half, rel=1e-3)
    assert jackknife(0.99, [0.9, 1.0], bounds=(0.0, 1.0)).high == 1.0


@pytest.mark.parametrize(
    ("values", "message"), [([], "at least one"), ([1.0, float("nan")], "nan for prompt 1"), ([inf], "inf")]
)
def test_what_is_refused(values, message):
    with pytest.raises(DataError, match=message):
        paired_bootstrap(values)


def test_ratios_that_are_refused():
    with pytest.raises(DataError, match="must be > 0, got 0"):
        ratio_bootstrap([0.0, 1.0], [0.0, 1.0])
    with pytest.raises(DataError, match="2 numerators for 1"):
        ratio_bootstrap([0.0, 1.0], [1.0])
