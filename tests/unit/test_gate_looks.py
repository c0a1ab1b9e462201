"""The gate over the rounds of a run: how often it promotes a round that is no better, and what it says."""

import numpy as np
import pytest

from prefloop.errors import ConfigError
from prefloop.evaluate.bootstrap import LEVEL, RESAMPLES
from prefloop.evaluate.deciding import advice, at_level, resamples_at
from prefloop.evaluate.gate import Gate
from prefloop.evaluate.heldout import candidate_metrics, differences
from prefloop.evaluate.looks import looks
from prefloop.evaluate.win_rate import prompts_needed
from prefloop.protocols import SharesAlpha
from prefloop.rows import VERBATIM, Completion, JudgedGroup, Message, Metric, Prompt

NAME = "win_rate_vs_best"


def drawn(scores):
    """One completion for each prompt, with the score that the judge gave it."""
    groups = []
    for i, score in enumerate(scores):
        prompt = Prompt(f"{i:016x}", (Message(VERBATIM, "x"),), None, "holdout", "t")
        completion = Completion(f"c{i}", "x", (1,), None, "stop", 0, "p")
        groups.append(JudgedGroup(prompt, (completion,), "p", 0, 1.0, 1.0, (float(score),), None, "judge", (None,)))
    return groups


def promotes(gate, generator, rounds, prompts, worse=0.0):
    """Whether a run promotes any round, where every round's policy is `worse` than the start's, or equal to it.

    Prompts differ in difficulty, scores are rounded so that some tie, and what was promoted is compared with from then
    on: all as in the loop.
    """
    difficulty = generator.normal(size=prompts)

    def policy(shift=worse):
        return drawn(np.round(difficulty + generator.normal(size=prompts) - shift, 1))

    best, any_promoted = policy(0.0), False
    for number in range(rounds):
        candidate = policy()
        wins = differences(NAME, candidate, best)
        metric = Metric(float(np.mean(wins)), 0.0, 100.0, prompts, "%")
        level = gate.level(number, rounds)
        # Level 95 % would be left as it was measured; a hair below makes it compute that too.
        measured = at_level({NAME: metric}, NAME, candidate, best, level - 1e-9 * (level == LEVEL), seed=number)
        if gate(measured, {}).accepted:
            best, any_promoted = candidate, True
    return any_promoted


def test_equal_rounds_are_promoted_less_often_than_alpha_says():
    """By the gate's own decision: 4 rounds of equal policies, 40 prompts; α = 0.2 needs fewer runs to be seen."""
    generator = np.random.default_rng(0)
    found = [promotes(Gate(alpha=0.2), generator, 4, 40) for _ in range(300)]
    assert np.mean(found) < 0.2
    # Half of α is for "better"; three standard errors of 300 runs at 10 % are 5.2 points.
    assert np.mean(found) <= 0.1 + 0.052
    generator = np.random.default_rng(0)
    unshared = [promotes(Gate(alpha=0.2, spending="each"), generator, 4, 40) for _ in range(300)]
    assert np.mean(unshared) > 0.2


def test_the_default_alpha_holds_and_worse_rounds_are_hardly_ever_promoted():
    generator = np.random.default_rng(1)
    assert np.mean([promotes(Gate(), generator, 3, 40) for _ in range(200)]) < 0.05
    assert not any(promotes(Gate(), generator, 3, 40, worse=0.5) for _ in range(60))


@pytest.mark.parametrize("spending", ["even", "pocock", "obrien_fleming"])
@pytest.mark.parametrize("rounds", [2, 5, 20])
def test_many_runs_in_the_normal_limit(spending, rounds):
    """Every round is compared with the same start, so the looks are correlated by one half."""
    generator = np.random.default_rng(rounds)
    gains = (generator.normal(size=(200_000, rounds)) - generator.normal(size=(200_000, 1))) / np.sqrt(2)
    bounds = np.array([look.z for look in looks(rounds, spending=spending)])
    assert (gains > bounds).any(1).mean() < 0.0265
    assert (gains > 1.959964).any(1).mean() > {2: 0.04, 5: 0.08, 20: 0.19}[rounds]  # what happens without


def test_one_round_is_decided_by_the_interval_of_the_report_and_more_rounds_by_wider_ones():
    gate = Gate()
    assert isinstance(gate, SharesAlpha)
    assert gate.level(0, 1) == LEVEL
    assert [gate.level(i, 3) for i in range(3)] == pytest.approx([1 - 0.05 / 3] * 3)
    assert gate.level(2, 3) == Gate(rounds=3).level(0, 1)
    assert Gate(spending="each").level(7, 20) == LEVEL
    falling = [Gate(spending="pocock").level(i, 4) for i in range(4)]
    assert falling == sorted(falling)
    rising = [Gate(spending="obrien_fleming").level(i, 4) for i in range(4)]
    assert rising == sorted(rising, reverse=True)
    assert sum(1 - level for level in falling) == pytest.approx(0.05)


def test_more_rounds_than_planned_are_refused():
    with pytest.raises(ConfigError, match=r"gate\.rounds: 3 rounds share gate\.alpha, and the run has 5: nothing is"):
        Gate(rounds=3).level(0, 5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 0.0}, r"gate\.alpha must be in \(0, 0\.5\], got 0\.0"),
        ({"alpha": float("nan")}, r"gate\.alpha must be in"),
        ({"spending": "odd"}, r"gate\.spending must be one of even, pocock, obrien_fleming, each, got 'odd'"),
        ({"rounds": 0}, r"gate\.rounds must be ≥ 1"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(ConfigError, match=message):
        Gate(**fields)


def test_the_deciding_interval_is_wider_and_named():
    generator = np.random.default_rng(3)
    candidate, start = drawn(generator.normal(0.5, 1, 60)), drawn(generator.normal(0, 1, 60))
    measured = candidate_metrics(candidate, start, start, {}).metrics
    wide = at_level(measured, NAME, candidate, start, 0.99)[NAME]
    assert (wide.value, wide.n, wide.unit, wide.level) == (measured[NAME].value, 60, "%", 0.99)
    # Normal quantiles of 99 % and 95 %: 2.576 / 1.960 = 1.314.
    assert (wide.high - wide.low) / (measured[NAME].high - measured[NAME].low) == pytest.approx(1.314, rel=0.06)
    assert "(99 % interval)" in Gate()({NAME: wide}, {}).why[0]
    assert at_level(measured, NAME, candidate, start, LEVEL) == measured
    assert at_level({}, NAME, candidate, start, 0.99) == {}
    gain = at_level(measured, "judge_score_gain", candidate, start, 0.99)["judge_score_gain"]
    assert gain.low < measured["judge_score_gain"].low < gain.value


def test_a_stricter_level_draws_more_resamples():
    assert resamples_at(0.95) == resamples_at(0.8) == RESAMPLES
    assert resamples_at(0.99) == pytest.approx(5 * RESAMPLES, abs=1)
    assert resamples_at(0.99999) == 100_000


def test_an_inconclusive_round_says_how_many_prompts_would_tell():
    generator = np.random.default_rng(4)
    candidate, start = drawn(generator.normal(0, 1, 64)), drawn(generator.normal(0, 1, 64))
    metric = at_level({NAME: Metric(50.0, 0.0, 100.0, 64, "%")}, NAME, candidate, start, 0.98)[NAME]
    said = advice(metric, NAME, candidate, start)
    spread = float(np.std(differences(NAME, candidate, start), ddof=1))
    needed = prompts_needed(2.0, spread=spread, level=0.98)
    assert f"to see 2 points you need {needed:,} prompts; the 64 at hand show" in said
    assert "98 % interval" in said
    assert said.endswith("evaluate.prompts and prompts.holdout")
    assert advice(Metric(70.0, 60.0, 80.0, 64, "%"), NAME, candidate, start) is None  # it is settled
    assert advice(Metric(0.1, -0.1, 0.3, 64, "score"), "judge_score_gain", candidate, start) is None
