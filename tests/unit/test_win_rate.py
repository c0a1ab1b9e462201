"""Win rates: published values, coverage with ties and clusters, sample sizes, several looks, rankings."""

from itertools import product
from math import inf, log, nan, sqrt
from statistics import NormalDist

import numpy as np
import pytest

from prefloop.errors import ConfigError, DataError
from prefloop.evaluate.win_rate import (
    bradley_terry,
    elo_from_strengths,
    looks,
    paired_preference,
    prompts_needed,
    sample_size_advice,
    wilson,
    win_rate,
)
from prefloop.rows import Metric


@pytest.mark.parametrize(
    ("wins", "losses", "draws", "value", "error"),
    [
        # tatsu-lab/alpaca_eval, leaderboards/data_AlpacaEval_2/alpaca_eval_gpt4_turbo_fn_leaderboard.csv: annotations
        # that are all wins, losses and draws, so their counts are the complete rows.
        (199, 600, 6, 25.093167701863354, 1.5214127388761767),
        (51, 204, 1, 20.1171875, 2.5027450749439604),
        (92, 164, 0, 35.9375, 3.00473227657999),
        (17, 238, 1, 6.8359375, 1.56818626781799),
        (0, 0, 805, 50.0, 0.0),
    ],
)
def test_published_win_rates_and_standard_errors(wins, losses, draws, value, error):
    found = win_rate([1.0] * wins + [0.0] * losses + [0.5] * draws)
    assert isinstance(found, Metric)
    assert (found.value, found.standard_error) == (pytest.approx(value, abs=1e-9), pytest.approx(error, abs=1e-9))
    assert (found.n, found.unit) == (wins + losses + draws, "%")
    assert found.low <= value <= found.high


def test_wilson_as_printed():
    # R. Newcombe (1998, Statist. Med. 17, 857–872), table I, method 3: score interval without continuity correction.
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(successes / n, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert wilson(1 / 29, 29) == (pytest.approx(0.0061, abs=5e-5), pytest.approx(0.1718, abs=5e-5))


def test_wilson_of_plain_wins_is_the_textbook_one_and_ties_narrow_it():
    plain = win_rate([1.0] * 81 + [0.0] * 182, interval="wilson")
    assert (plain.low, plain.high) == (pytest.approx(25.53, abs=5e-3), pytest.approx(36.62, abs=5e-3))
    tied = win_rate([1.0] * 50 + [0.0] * 50 + [0.5] * 100, interval="wilson")
    decided = win_rate([1.0] * 100 + [0.0] * 100, interval="wilson")
    assert tied.high - tied.low == pytest.approx((decided.high - decided.low) / sqrt(2), rel=0.01)
    # Nothing but ties, or nothing but wins: as uncertain as that many plain wins and losses.
    for value in (0.5, 1.0):
        found = win_rate([value] * 40, interval="wilson")
        assert (found.low, found.high) == tuple(100 * end for end in wilson(value, 40))


def preferences(generator, n, kind):
    """`[prompt sample]` preferences with mean 0.6 over the population."""
    if kind == "plain":
        return (generator.random((n, 1)) < 0.6).astype(float)
    if kind == "ties":
        return generator.choice([0.0, 0.5, 1.0], size=(n, 1), p=[0.25, 0.3, 0.45])
    quality = generator.beta(3, 2, (n, 1))  # prompts differ: their 4 samples are alike
    draws = generator.random((n, 4))
    return (draws < quality).astype(float)


@pytest.mark.parametrize("n", [50, 200, 1000])
@pytest.mark.parametrize("kind", ["plain", "ties", "clusters"])
def test_coverage_of_the_wilson_interval(n, kind):
    generator = np.random.default_rng(n)
    found = [win_rate(preferences(generator, n, kind).mean(1), interval="wilson") for _ in range(1500)]
    assert 93 <= 100 * np.mean([m.low <= 60 <= m.high for m in found]) <= 97


@pytest.mark.parametrize(("n", "data_sets"), [(50, 800), (200, 600), (1000, 300)])
@pytest.mark.parametrize("kind", ["ties", "clusters"])
def test_coverage_of_the_bootstrap_interval(n, data_sets, kind):
    generator = np.random.default_rng(n)
    values = [preferences(generator, n, kind).mean(1) for _ in range(data_sets)]
    found = [win_rate(v, seed=i, resamples=300) for i, v in enumerate(values)]
    assert 93 <= 100 * np.mean([m.low <= 60 <= m.high for m in found]) <= 97


def test_samples_of_a_prompt_stay_together():
    values = preferences(np.random.default_rng(0), 100, "clusters")
    names = [f"p{i}" for i in range(100) for _ in range(4)]
    clustered = win_rate(values.ravel(), clusters=names)
    assert (clustered.value, clustered.n) == (pytest.approx(100 * values.mean()), 100)
    assert clustered == win_rate(values.mean(1))
    # As if all 400 were independent: too narrow, covers less than it says.
    generator = np.random.default_rng(1)
    naive = [win_rate(preferences(generator, 200, "clusters").ravel(), interval="wilson") for _ in range(1000)]
    assert 100 * np.mean([m.low <= 60 <= m.high for m in naive]) < 91


def test_prompts_count_the_same_however_many_samples_they_have():
    found = win_rate([1.0, 1.0, 1.0, 0.0], clusters=["a", "a", "a", "b"])
    assert (found.value, found.n) == (50.0, 2)


def test_few_prompts_are_said_to_be_few():
    assert "only 19 prompts" in win_rate([1.0, 0.0] * 9 + [1.0]).estimator
    assert "only" not in win_rate([1.0, 0.0] * 10).estimator


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "at least one"),
        ([0.5, nan], "nan for comparison 1"),
        ([1.5], "1.5"),
        ([-0.1], "-0.1"),
        ([2, 1], "0–1 first"),
    ],
)
def test_preferences_that_are_refused(values, message):
    with pytest.raises(DataError, match=message):
        win_rate(values)


def test_other_bad_input():
    with pytest.raises(DataError, match="one prompt for each of 2 values, got 1"):
        win_rate([1.0, 0.0], clusters=["a"])
    with pytest.raises(ConfigError, match="interval must be one of bootstrap, wilson"):
        win_rate([1.0], interval="wald")
    with pytest.raises(ConfigError, match="level"):
        wilson(0.5, 10, 1.0)


def test_paired_preference_counts_all_pairs_and_refuses_unpaired_prompts():
    found = paired_preference({"b": [1.0, 2.0], "a": [0.0]}, {"a": [1.0], "b": [1.0, 3.0]})
    assert found == {"a": 0.0, "b": (0.5 + 0 + 1 + 0) / 4}
    with pytest.raises(DataError, match=r"2 prompts have scores of one policy only \(a, c\)"):
        paired_preference({"a": [1.0], "b": [1.0]}, {"b": [1.0], "c": [1.0]})
    with pytest.raises(DataError, match="prompt a needs a finite score"):
        paired_preference({"a": [nan]}, {"a": [1.0]})


def test_prompts_needed():
    # (1.959964 + 0.841621)² = 7.848880 for 5 % and 80 %: the constant of every textbook.
    assert prompts_needed(2.0) == int(7.848880 * 625) + 1
    assert prompts_needed(2.0, power=0.5) == 2401  # 95 % interval of ± 2 points at 50 %
    assert prompts_needed(2.0, spread=25.0) == pytest.approx(prompts_needed(2.0) / 4, abs=1)
    with pytest.raises(ConfigError, match="points > 0"):
        prompts_needed(0.0)


def test_that_many_prompts_show_it_with_the_power_asked_for():
    n = prompts_needed(8.0, spread=100 * sqrt(0.25 * 0.7 - 0.0064))  # 30 % ties, win rate 58 %
    generator = np.random.default_rng(0)
    counts = generator.multinomial(n, [0.27, 0.3, 0.43], size=4000)
    mean = (counts[:, 2] + counts[:, 1] / 2) / n
    error = np.sqrt(((counts[:, 2] + counts[:, 1] / 4) / n - mean**2) / n)
    assert np.mean(mean - 1.959964 * error > 0.5) == pytest.approx(0.8, abs=0.02)


def test_advice_in_words():
    advice = sample_size_advice([1.0, 0.0] * 400)
    assert advice.startswith("to see 2 points you need 4,9")
    assert "the 800 at hand show 5.0 points and more (80 % power, 95 % interval)" in advice
    assert "you need 2 prompts" in sample_size_advice([0.5, 0.5])
    with pytest.raises(DataError, match="at least 2"):
        sample_size_advice([1.0, 0.0], clusters=["a", "a"])


def test_bounds_of_sequential_looks_as_published():
    # R package ldbounds (Lan-DeMets program of Reboussin et al. 2000), five equal looks, two-sided 5 %.
    found = [look.z for look in looks(5, spending="obrien_fleming", cumulative=True)]
    assert found == pytest.approx([4.8769, 3.3569, 2.6803, 2.2898, 2.0310], abs=2e-4)
    found = [look.z for look in looks(5, spending="pocock", cumulative=True)]
    assert found == pytest.approx([2.4380, 2.4268, 2.4101, 2.3966, 2.3859], abs=2e-4)


@pytest.mark.parametrize("spending", ["even", "pocock", "obrien_fleming"])
def test_looks_at_a_growing_sample_err_as_often_as_they_may(spending):
    generator = np.random.default_rng(2)
    steps = generator.normal(size=(200_000, 4)).cumsum(1) / np.sqrt(np.arange(1, 5))
    bounds = np.array([look.z for look in looks(4, spending=spending, cumulative=True)])
    assert (np.abs(steps) > bounds).any(1).mean() == pytest.approx(0.05, abs=0.0015)
    assert (np.abs(steps) > 1.96).any(1).mean() > 0.12  # what happens without


def test_looks_at_other_policies_divide_the_rate():
    found = looks(5)
    assert [look.alpha for look in found] == pytest.approx([0.01] * 5)
    assert found[-1].spent == pytest.approx(0.05)
    assert found[0].z == pytest.approx(NormalDist().inv_cdf(0.995))
    assert [look.level for look in looks([1.0])] == pytest.approx([0.95])
    assert sum(look.alpha for look in looks([0.5, 0.6, 1.0], spending="pocock")) == pytest.approx(0.05)


@pytest.mark.parametrize("wrong", [0, [], [0.5, 0.5], [0.0, 1.0], [0.5, 1.1]])
def test_looks_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match="fractions must rise"):
        looks(wrong)
    with pytest.raises(ConfigError, match="spending must be one of even, pocock"):
        looks(3, spending="obrien")


WINS = np.array([[0, 5, 9, 4], [3, 0, 6, 5], [2, 4, 0, 7], [6, 3, 1, 0]])
TIES = np.array([[0, 2, 1, 0], [2, 0, 3, 1], [1, 3, 0, 2], [0, 1, 2, 0]])


def likelihood(strengths, log_tie, davidson):
    """Log-likelihood of WINS and TIES, one pair and outcome at a time."""
    worth, total = np.exp(strengths), 0.0
    for i, j in product(range(4), repeat=2):
        both = worth[i] + worth[j] + (np.exp(log_tie) * sqrt(worth[i] * worth[j]) if davidson else 0.0)
        points = WINS[i, j] + (0 if davidson else TIES[i, j] / 2)
        total += points * log(worth[i] / both) if i != j else 0.0
        if davidson and i < j:
            total += TIES[i, j] * log(np.exp(log_tie) * sqrt(worth[i] * worth[j]) / both)
    return total


def best_by_search(davidson):
    """The optimum by a search that knows no derivatives: try a step in each coordinate, halve it when none helps."""
    at, step = np.zeros(5), 0.5
    value = likelihood(at[:4], at[4], davidson)
    while step > 1e-7:
        tries = [at + sign * step * np.eye(5)[i] for i in range(4 + davidson) for sign in (1, -1)]
        values = [likelihood(t[:4], t[4], davidson) for t in tries]
        if max(values) > value:
            value, at = max(values), tries[int(np.argmax(values))]
        else:
            step /= 2
    return at[:4] - at[:4].mean(), at[4]


@pytest.mark.parametrize("tie_model", ["half", "davidson"])
def test_bradley_terry_is_the_optimum_that_a_blind_search_finds(tie_model):
    found = bradley_terry(WINS, TIES, tie_model=tie_model, resamples=20)
    strengths, log_tie = best_by_search(tie_model == "davidson")
    assert [s.value for s in found.strengths] == pytest.approx(list(strengths), abs=2e-5)
    assert found.log_tie == (pytest.approx(log_tie, abs=2e-5) if tie_model == "davidson" else None)


def test_bradley_terry_by_the_mm_algorithm():
    # D. Hunter (2004, Ann. Statist. 32(1), 384–406), equation 3: worth_i ← wins_i / Σ_j games_ij / (worth_i + worth_j).
    points = WINS + TIES / 2
    worth = np.ones(4)
    for _ in range(2000):
        worth = points.sum(1) / ((points + points.T) / (worth[:, None] + worth[None, :])).sum(1)
        worth /= np.exp(np.log(worth).mean())
    found = bradley_terry(WINS, TIES, resamples=20)
    assert [s.value for s in found.strengths] == pytest.approx(list(np.log(worth)), abs=1e-9)


def test_agresti_baseball():
    # A. Agresti, Categorical Data Analysis, 1987 American League East: wins of row over column; fitted strengths with
    # Baltimore 0: Milwaukee 1.58, Detroit 1.44, Toronto 1.29, New York 1.25, Boston 1.11, Cleveland 0.68.
    table = [
        [0, 7, 9, 7, 7, 9, 11],
        [6, 0, 7, 5, 11, 9, 9],
        [4, 6, 0, 7, 7, 8, 12],
        [6, 8, 6, 0, 6, 7, 10],
        [6, 2, 6, 7, 0, 7, 12],
        [4, 4, 5, 6, 6, 0, 6],
        [2, 4, 1, 3, 1, 7, 0],
    ]
    found = bradley_terry(table, resamples=200)
    last = found.strengths[-1].value
    assert [round(s.value - last, 2) for s in found.strengths] == [1.58, 1.44, 1.29, 1.25, 1.11, 0.68, 0.0]
    assert found.strengths[0].n == np.sum(table)


@pytest.mark.parametrize("by_prompt", [False, True])
def test_intervals_of_strengths_cover(by_prompt):
    generator = np.random.default_rng(5)
    truth = np.array([0.6, 0.1, -0.7])
    worth = np.exp(truth)
    hits = []
    for number in range(150):
        wins = np.zeros((60, 3, 3))
        for i, j in ((0, 1), (0, 2), (1, 2)):
            won = generator.random(60) < worth[i] / (worth[i] + worth[j])
            wins[:, i, j], wins[:, j, i] = won, ~won
        found = bradley_terry(wins if by_prompt else wins.sum(0), seed=number, resamples=200)
        hits += [s.low <= t <= s.high for s, t in zip(found.strengths, truth, strict=True)]
    assert 92 <= 100 * np.mean(hits) <= 97.5


def test_comparisons_of_one_prompt_stay_together():
    # Ten copies of each prompt's verdict add nothing; as single comparisons they would look like ten times as many.
    wins = np.zeros((50, 2, 2))
    wins[:30, 0, 1] = wins[30:, 1, 0] = 10.0
    by_prompt, single = bradley_terry(wins), bradley_terry(wins.sum(0))
    widths = [b.strengths[0].high - b.strengths[0].low for b in (by_prompt, single)]
    assert widths[0] / widths[1] == pytest.approx(sqrt(10), rel=0.15)


def test_no_finite_optimum_is_refused_and_a_fragile_one_has_no_interval():
    for wins in ([[0, 5], [0, 0]], [[0, 2, 0], [1, 0, 0], [0, 0, 0]], [[0, 2, 3], [1, 0, 4], [0, 0, 0]]):
        with pytest.raises(DataError, match="no finite optimum"):
            bradley_terry(wins)
    # 19 wins, 6 ties, no loss: half ties give a strength, Davidson's two parameters run away.
    one_sided = ([[0, 19], [0, 0]], [[0, 6], [6, 0]])
    assert bradley_terry(*one_sided).strengths[0].value == pytest.approx(log(22 / 3) / 2)
    with pytest.raises(DataError, match="wins go in a circle"):
        bradley_terry(*one_sided, tie_model="davidson")
    fragile = bradley_terry([[0, 5], [1, 0]])  # a third of the resamples loses the single win
    assert (fragile.strengths[0].low, fragile.strengths[0].high) == (-inf, inf)


@pytest.mark.parametrize(
    ("wins", "ties", "message"),
    [
        ([[0, 1]], None, "at least 2 policies"),
        ([[0, 1.5], [1, 0]], None, "whole numbers"),
        ([[0, nan], [1, 0]], None, "finite"),
        ([[1, 1], [1, 0]], None, "against itself"),
        ([[0, 1], [1, 0]], [[0, 1], [2, 0]], "symmetric"),
    ],
)
def test_matrices_that_are_refused(wins, ties, message):
    with pytest.raises(DataError, match=message):
        bradley_terry(wins, ties)


def test_elo_is_a_change_of_unit():
    # Odds of 10 to 1 are 400 points; a constant added to all strengths changes nothing.
    found = bradley_terry([[0, 100], [10, 0]])
    one, two = elo_from_strengths(found)
    assert one.value - two.value == pytest.approx(400)
    assert (one.value + two.value) / 2 == pytest.approx(1000)
    assert one.high - one.low == pytest.approx((found.strengths[0].high - found.strengths[0].low) * 400 / log(10))
    shifted = elo_from_strengths([s.value + 3.0 for s in found.strengths])
    assert [s.value for s in shifted] == pytest.approx([one.value, two.value])
    # Elo's own table: an expected score of 0.76 is a difference of 200 points.
    one, two = elo_from_strengths([log(0.76), log(0.24)])
    assert one.value - two.value == pytest.approx(200, abs=1)
    with pytest.raises(DataError, match="finite strength"):
        elo_from_strengths([nan])
