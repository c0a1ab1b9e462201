"""The gate's decisions and the sentences it gives for them."""

from math import inf, nan

import pytest

from prefloop.errors import ConfigError
from prefloop.evaluate.always import Always
from prefloop.evaluate.gate import Gate
from prefloop.protocols import Gate as GateProtocol
from prefloop.rows import Metric


def metric(value, unit, spread=0.0):
    return Metric(value, value - spread, value + spread, 128, unit)


BASELINE = {
    "judge_score": metric(0.3, "score"),
    "length": metric(100.0, "tokens"),
    "repetition": metric(0.08, "share"),
    "stopped": metric(80.0, "%"),
}


def measured(**changes):
    found = {
        "win_rate_vs_best": Metric(61.2, 57.0, 65.3, 128, "%"),
        "win_rate_vs_start": Metric(70.0, 65.0, 75.0, 128, "%"),
        "judge_score_gain": metric(0.2, "score", 0.1),
        "judge_score_gain_best": metric(0.05, "score", 0.1),
        "kl_policy_start": metric(0.21, "nats per token"),
        "length": metric(120.0, "tokens"),
        "repetition": metric(0.1, "share"),
        "stopped": metric(75.0, "%"),
    }
    return {name: m for name, m in (found | changes).items() if m is not None}


def decide(gate=None, **changes):
    return (gate or Gate())(measured(**changes), BASELINE)


def test_both_satisfy_the_protocol():
    gates: list[GateProtocol] = [Gate(), Always()]
    assert all(gate(measured(), BASELINE).accepted for gate in gates)


def test_a_better_policy_with_sound_text_is_accepted():
    decision = decide()
    assert decision.accepted
    assert decision.why == (
        "win_rate_vs_best 61.2 % [57.0, 65.3] excludes 50 %: better than the best so far",
        "within all guards: kl_policy_start is 0.210 nats per token; "
        "repetition 0.100 is 0.020 above the start's 0.080; length 120.0 tokens is 1.20 times the start's 100.0; "
        "stopped 75.0 % is 5.0 points below the start's 80.0 %",
    )


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (49.0, 60.0, "does not exclude 50 %: not shown to be better than the best so far"),
        (50.0, 60.0, "does not exclude 50 %"),
        (30.0, 45.0, "lies below 50 %: worse than the best so far"),
        (-inf, inf, "no interval does not exclude 50 %"),
    ],
)
def test_a_gain_that_is_not_shown_is_refused(low, high, words):
    decision = decide(win_rate_vs_best=Metric((max(low, 0) + min(high, 100)) / 2, low, high, 128, "%"))
    assert not decision.accepted
    assert words in decision.why[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"kl_policy_start": metric(1.342, "nats per token")},
            "kl_policy_start is 1.342 nats per token; gate.max_kl allows 1",
        ),
        (
            {"repetition": metric(0.41, "share")},
            "repetition 0.410 is 0.330 above the start's 0.080; gate.max_repetition_increase allows 0.1",
        ),
        (
            {"length": metric(210.0, "tokens")},
            "length 210.0 tokens is 2.10 times the start's 100.0; gate.max_length_ratio allows 2",
        ),
        (
            {"length": metric(2.0, "tokens")},
            "length 2.0 tokens is 0.02 times the start's 100.0; gate.min_length_ratio allows 0.5",
        ),
        (
            {"stopped": metric(40.0, "%")},
            "stopped 40.0 % is 40.0 points below the start's 80.0 %; gate.max_stopped_drop allows 20",
        ),
    ],
)
def test_each_guard_refuses_what_wrecks_the_text(changes, sentence):
    decision = decide(**changes)
    assert not decision.accepted
    assert decision.why == (sentence, "win_rate_vs_best 61.2 % [57.0, 65.3] excludes 50 %: better than the best so far")


@pytest.mark.parametrize(
    ("setting", "changes"),
    [
        ("max_kl", {"kl_policy_start": metric(9.0, "nats per token")}),
        ("max_repetition_increase", {"repetition": metric(0.9, "share")}),
        ("max_length_ratio", {"length": metric(900.0, "tokens")}),
        ("min_length_ratio", {"length": metric(1.0, "tokens")}),
        ("max_stopped_drop", {"stopped": metric(0.0, "%")}),
    ],
)
def test_none_switches_a_guard_off(setting, changes):
    assert not decide(**changes).accepted
    assert decide(Gate(**{setting: None}), **changes).accepted


def test_a_limit_itself_is_allowed():
    assert decide(kl_policy_start=metric(1.0, "nats per token"), length=metric(200.0, "tokens")).accepted
    assert decide(length=metric(50.0, "tokens"), stopped=metric(60.0, "%")).accepted


def test_a_guard_that_cannot_be_checked_says_so():
    decision = decide(kl_policy_start=None, length=None)
    assert decision.accepted
    assert "gate.max_kl was not checked: kl_policy_start was not measured" in decision.why
    assert "gate.min_length_ratio was not checked: length was not measured" in decision.why


def test_a_collapsed_policy_is_refused_for_every_reason():
    decision = decide(
        win_rate_vs_best=Metric(97.0, 95.0, 99.0, 128, "%"),
        kl_policy_start=metric(2.7, "nats per token"),
        repetition=metric(0.93, "share"),
        stopped=metric(0.0, "%"),
    )
    assert not decision.accepted
    assert len(decision.why) == 4
    assert "better than the best so far" in decision.why[-1]


def test_a_demo_round_is_accepted():
    # Three rounds of DPO on the story model: a little drift, completions at their full length, few that stop.
    for kl, repeated in ((0.05, 0.05), (0.2, 0.08), (0.5, 0.12)):
        baseline = BASELINE | {"stopped": metric(0.0, "%"), "repetition": metric(0.04, "share")}
        found = measured(
            kl_policy_start=metric(kl, "nats per token"),
            repetition=metric(repeated, "share"),
            length=metric(100.0, "tokens"),
            stopped=metric(0.0, "%"),
        )
        assert Gate()(found, baseline).accepted


def test_deciding_by_another_metric():
    assert decide(Gate(metric="win_rate_vs_start")).why[0].endswith("excludes 50 %: better than the start")
    gain = decide(Gate(metric="judge_score_gain")).why[0]
    assert gain == "judge_score_gain 0.200 [0.100, 0.300] excludes 0: better than the start"
    assert not decide(Gate(metric="judge_score_gain_best")).accepted


def test_a_threshold_of_ones_own():
    decision = decide(Gate(threshold=60.0))
    assert not decision.accepted
    assert "does not exclude 60.0 % (gate.threshold)" in decision.why[0]
    assert decide(Gate(threshold=55.0)).accepted
    assert decide(Gate(metric="judge_score_gain", threshold=-0.5)).accepted


@pytest.mark.parametrize("found", [None, metric(nan, "%")])
def test_an_unmeasured_metric_is_no_gain(found):
    decision = decide(win_rate_vs_best=found)
    assert not decision.accepted
    assert decision.why[0].startswith("win_rate_vs_best was not measured")


def test_a_start_without_text():
    empty = BASELINE | {"length": metric(0.0, "tokens")}
    assert not Gate()(measured(), empty).accepted
    assert Gate()(measured(length=metric(0.0, "tokens")), empty).accepted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric": "win_rate_vs_bets"}, r"got 'win_rate_vs_bets'; did you mean win_rate_vs_best"),
        ({"metric": "length"}, r"gate\.metric must be one of"),
        ({"threshold": inf}, r"gate\.threshold must be a finite number"),
        ({"threshold": -1.0}, r"gate\.threshold must be 0 or more"),
        ({"threshold": 100.0}, r"below 100 for a win rate"),
        ({"max_kl": 0.0}, r"gate\.max_kl must be > 0, or none to switch it off; got 0.0"),
        ({"max_kl": nan}, r"gate\.max_kl must be a finite number"),
        ({"max_repetition_increase": -0.1}, r"gate\.max_repetition_increase must be ≥ 0 and ≤ 1"),
        ({"max_repetition_increase": 1.1}, r"got 1\.1"),
        ({"max_length_ratio": -2.0}, r"gate\.max_length_ratio must be > 0"),
        ({"min_length_ratio": 2.0}, r"gate\.min_length_ratio must be ≥ 0 and ≤ 1"),
        ({"max_length_ratio": 0.4}, r"gate\.max_length_ratio must be above gate\.min_length_ratio"),
        ({"max_stopped_drop": 101.0}, r"gate\.max_stopped_drop must be ≥ 0 and ≤ 100"),
    ],
)  # fmt: skip
def test_settings_out_of_range(fields, message):
    with pytest.raises(ConfigError, match=message):
        Gate(**fields)


def test_always_accepts_and_says_so():
    decision = Always()({}, {})
    assert decision.accepted
    assert decision.why == ("gate.kind is always: every round is accepted and no metric was checked",)
