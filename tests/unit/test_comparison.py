"""Comparisons of methods: planted differences are found, equal methods are not called different, Holm by hand."""

from itertools import combinations

import numpy as np
import pytest

from prefloop.errors import ConfigError, DataError
from prefloop.evaluate import comparison
from prefloop.evaluate.comparison import compare, sweep
from prefloop.evaluate.student import critical, holm, two_sided_p


def planted(means, *, seeds=3, prompts=60, between=0.15, seed=0):
    """Scores with a common difficulty of each prompt, a shift of each seed's policy, and noise of each completion."""
    generator = np.random.default_rng(seed)
    difficulty = generator.normal(size=prompts)
    return {
        name: [
            {
                f"p{k}": [float(mean + shift + difficulty[k] + noise)]
                for k, noise in enumerate(generator.normal(size=prompts))
            }
            for shift in generator.normal(scale=between, size=seeds)
        ]
        for name, mean in means.items()
    }


@pytest.mark.parametrize(
    ("level", "freedom", "printed"),
    [(0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 10, 2.228), (0.99, 5, 4.032), (0.95, 120, 1.980), (0.9, 30, 1.697)],
)
def test_student_s_quantiles_are_those_of_printed_tables(level, freedom, printed):
    assert critical(level, freedom) == pytest.approx(printed, abs=5e-4)


def test_student_s_tail_has_its_closed_forms():
    for t in (0.0, 0.3, 1.0, 4.0, 40.0):
        assert two_sided_p(t, 1) == pytest.approx(1 - 2 * np.arctan(t) / np.pi, abs=1e-12)
        assert two_sided_p(t, 2) == pytest.approx(1 - t / np.sqrt(2 + t * t), abs=1e-12)
    assert two_sided_p(1.959964, 1e12) == pytest.approx(0.05, abs=1e-6)


def test_holm_by_hand():
    # Sorted: 0.01·4, 0.02·3, 0.03·2 (raised to the one before), 0.04·1 (raised).
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ConfigError, match="in \\[0, 1\\]"):
        holm([0.1, float("nan")])


def test_planted_differences_are_found_and_ranked():
    found = compare(planted({"start": 0.0, "good": 1.5, "same": 1.5, "bad": -1.5}))
    assert {found.standings[0].name, found.standings[1].name} == {"good", "same"}
    assert found.standings[-1].name == "bad"
    assert found.duel("good", "start").better == "good"
    assert found.duel("bad", "start").better == "start"
    assert found.duel("good", "same").better is None
    # With noise of 1 on both sides a difference of 1.5 is won with probability Φ(1.5 / √2) = 85.6 %.
    assert found.duel("good", "start").win_rate.value == pytest.approx(100 - 85.6, abs=6)
    versus = {s.name: s.versus_start for s in found.standings}
    assert versus["good"].low > 50 > versus["bad"].high
    assert versus["start"] is None
    elo = {s.name: s.elo for s in found.standings}
    # Odds of 85.6 to 14.4 are 310 points; Bradley-Terry fits all pairs at once, so only near that.
    assert elo["good"].value - elo["start"].value == pytest.approx(310, abs=90)
    assert all(e.low < e.value < e.high for e in elo.values())


def test_equal_methods_are_not_called_different():
    sets = 250
    false = sum(any_real(planted(dict.fromkeys("abcd", 0.0), seed=s, prompts=40)) for s in range(sets))
    # 5 % may be. 250 sets at 5 % exceed 8.5 % with probability below 0.01.
    assert false / sets < 0.085


def any_real(arms):
    """As `compare`, without the ranking, whose jackknife takes longest."""
    return min(holm([estimated(arms, *pair)[1] for pair in combinations(arms, 2)])) < 0.05


def estimated(arms, one, other):
    return comparison._estimate(comparison._preference(arms[one], arms[other], sorted(arms[one][0])), 0.95)


def test_seeds_count_as_clusters():
    """A method whose seeds differ much is not told from the rest by many prompts."""
    wild = planted({"a": 0.0, "b": 0.4}, between=1.0, prompts=200, seed=3)
    one_seed = {name: runs[:1] for name, runs in wild.items()}
    many, single = compare(wild).duels[0].win_rate, compare(one_seed).duels[0].win_rate
    assert many.high - many.low > 2 * (single.high - single.low)
    assert "one seed" in single.estimator
    assert "seeds and prompts" in many.estimator


def test_interval_of_the_win_rate_covers_the_truth():
    truth = 50.0  # equal means: the median of the difference is 0 whatever the seeds do
    hits = 0
    for s in range(300):
        arms = planted({"a": 0.0, "b": 0.0}, seed=1000 + s, prompts=40)
        rate = estimated(arms, "a", "b")[0]
        hits += rate.low <= truth <= rate.high
    assert hits / 300 > 0.93


def test_a_policy_that_wins_everything_is_real_and_has_no_elo():
    arms = {"a": [{f"p{i}": [1.0] for i in range(30)}], "b": [{f"p{i}": [0.0] for i in range(30)}]}
    found = compare(arms)
    assert found.duels[0].better == "a"
    assert found.duels[0].win_rate.low == pytest.approx(90.2, abs=0.1)
    assert found.standings[0].elo is None
    assert "no Elo" in found.notes[0]
    same = compare({"a": arms["a"], "b": arms["a"]})
    assert same.duels[0].p == 1.0
    assert not same.duels[0].real


def test_what_cannot_be_compared_is_refused():
    good = {f"p{i}": [float(i)] for i in range(30)}
    with pytest.raises(DataError, match="other prompts"):
        compare({"a": [good], "b": [{k: v for k, v in good.items() if k != "p3"}]})
    with pytest.raises(DataError, match="NaN or infinite, for prompt p3"):
        compare({"a": [good], "b": [good | {"p3": [float("nan")]}]})
    with pytest.raises(DataError, match="two methods"):
        compare({"a": [good]})
    with pytest.raises(DataError, match="1 prompts"):
        compare({"a": [{"p": [1.0]}], "b": [{"p": [0.0]}]})


def test_a_sweep_shows_more_than_its_peak():
    found = sweep("simpo", {"a": 20.0, "b": 70.0, "c": 60.0, "d": 50.0}, {"a": False, "b": True, "c": True, "d": False})
    assert (found.best, found.best_rate, found.beat_start) == ("b", 70.0, 0.5)
    assert found.quartiles == pytest.approx((42.5, 55.0, 62.5))
