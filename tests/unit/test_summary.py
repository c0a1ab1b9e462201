"""What the summary says: metrics as JSON, the verdict sentence, the table in the terminal."""

import json
from math import inf, nan

import pytest
from rich.console import Console

from prefloop.errors import DataError
from prefloop.evaluate.summary import (
    interval,
    metric_from_json,
    metric_json,
    metrics_from_json,
    number,
    verdict,
    with_interval,
)
from prefloop.evaluate.terminal import summary_table
from prefloop.rows import Metric


def entry(value, low, high, unit="%", n=128):
    return metric_json(Metric(value, low, high, n, unit, "e"))


def a_round(number_of_round, accepted=True, win=(78.1, 70.3, 85.2), score=0.72, why=("because",)):
    return {
        "round": number_of_round,
        "accepted": accepted,
        "why": list(why),
        "metrics": {
            "judge_score": entry(score, score - 0.05, score + 0.05, "score"),
            "win_rate_vs_start": entry(*win),
            "win_rate_vs_best": entry(*win),
            "kl_policy_start": entry(0.21, 0.2, 0.22, "nats per token"),
            "length": entry(101.25, 99.0, 103.0, "tokens"),
            "repetition": entry(0.05, 0.04, 0.06, "share"),
        },
    }


def summary(*rounds, best=None, state="done"):
    accepted = [r["round"] for r in rounds if r["accepted"]]
    best = (accepted[-1] if accepted else -1) if best is None else best
    return {
        "name": "demo",
        "state": state,
        "policy_best": {"path": "p", "digest": "d", "round": best},
        "start": {"metrics": {"judge_score": entry(0.31, 0.3, 0.32, "score")}},
        "rounds": list(rounds),
    }


def test_metrics_survive_json():
    for metric in (Metric(61.2, 57.0, 65.3, 128, "%", "how"), Metric(0.5, -inf, inf, 1, "score")):
        assert metric_from_json(json.loads(json.dumps(metric_json(metric), allow_nan=False))) == metric


def test_a_value_that_is_not_a_number_is_left_out():
    stored = json.loads(json.dumps({"a": metric_json(Metric(nan, nan, nan, 0, "score"))}, allow_nan=False))
    assert metrics_from_json(stored) == {}


def test_a_metric_without_its_fields():
    with pytest.raises(DataError, match="a metric needs value, low, high, n and unit"):
        metric_from_json({"value": 1.0})
    with pytest.raises(DataError, match="a metric needs"):
        metric_from_json({"value": None, "low": 0, "high": 1, "n": 3, "unit": "%"})


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (61.25, "%", "61.2"),
        (101.26, "tokens", "101.3"),
        (0.0512, "nats per token", "0.051"),
        (-0.25, "score", "−0.250"),
        (-0.0001, "score", "0.000"),
        (inf, "score", "∞"),
        (-inf, "score", "−∞"),
        (nan, "score", "unknown"),
    ],
)
def test_numbers(value, unit, expected):
    assert number(value, unit) == expected


def test_intervals():
    assert with_interval(Metric(0.1, 0.05, 0.2, 9, "nats per token")) == "0.100 nats per token [0.050, 0.200]"
    assert interval(Metric(0.1, -inf, inf, 1, "score")) == "no interval"


def test_all_accepted():
    assert verdict(summary(a_round(0), a_round(1), a_round(2))) == (
        "3 of 3 rounds were accepted; the final policy beats the start on 128 held-out prompts: "
        "win rate 78.1 % [70.3, 85.2]; score 0.310 → 0.720."
    )


def test_the_best_is_not_always_the_last():
    said = verdict(summary(a_round(0), a_round(1, accepted=False)))
    assert said.startswith("1 of 2 rounds was accepted; the best policy, of round 0, beats the start")


def test_claims_no_more_than_the_interval():
    # As a gate that always accepts leaves it.
    said = verdict(summary(a_round(0, win=(53.0, 48.0, 58.0))))
    assert said.startswith("1 of 1 round was accepted; the final policy cannot be told from the start on 128")
    assert "is worse than the start" in verdict(summary(a_round(0, win=(30.0, 25.0, 35.0))))


def test_nothing_accepted():
    refusals = [a_round(n, accepted=False, why=(f"reason {n}.", "what held")) for n in range(2)]
    assert verdict(summary(*refusals)) == (
        "None of 2 rounds was accepted, so the start policy is still the best; round 1: reason 1."
    )
    assert verdict(summary(a_round(0, accepted=False, why=()))) == (
        "The only round was refused, so the start policy is still the best."
    )


def test_unfinished_and_failed():
    assert verdict(summary(state="running")) == "The run is not finished: no round has a result yet."
    assert verdict(summary(state="failed")) == "The run failed: no round has a result yet."
    assert verdict(summary()) == "The run is done: no round has a result yet."
    said = verdict(summary(a_round(0), state="failed"))
    assert said.startswith(
        "The run failed; so far 1 of 1 round was accepted; the best policy, of round 0, beats the start"
    )


def test_without_win_rates_the_gain_in_score_counts():
    only = a_round(0)
    only["metrics"] = {"judge_score_gain": entry(0.2, 0.1, 0.3, "score", n=40)}
    assert "beats the start on 40 held-out prompts: gain in score 0.200 [0.100, 0.300]." in verdict(summary(only))
    only["metrics"] = {}
    assert verdict(summary(only)).endswith("; the final policy was not compared with the start.")


def test_accepted_but_the_start_is_best():
    assert verdict(summary(a_round(0), best=-1)) == "1 of 1 round was accepted, and the start policy is still the best."


def printed(stored, width=100):
    console = Console(width=width, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(summary_table(stored))
    return capture.get()


def test_the_table_has_a_row_for_each_round():
    text = printed(summary(a_round(0), a_round(1, accepted=False)))
    start, first, second = [line.split() for line in text.splitlines() if line.startswith((" start", " 0", " 1"))]
    assert start == ["start", "0.310", "–", "–", "–", "–", "–"]
    assert first[:4] == ["0", "0.720", "78.1", "[70.3,"]
    assert first[-5:] == ["0.210", "101.2", "0.050", "accepted", "★"]
    assert second[-1] == "refused"


def test_the_table_fits_100_columns_at_its_widest():
    widest = a_round(10, win=(100.0, 100.0, 100.0), score=-0.125)
    text = printed(summary(widest))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    assert text.count("100.0 [100.0, 100.0]") == 2
    assert "accepted ★" in text
    assert "…" not in text


def test_the_table_reads_no_markup():
    stored = summary(a_round(0)) | {"name": "[red]demo[/red]"}
    assert "[red]demo[/red]" in printed(stored)


def test_the_table_of_a_run_that_has_only_begun():
    text = printed({**summary(), "start": None})
    assert " start" in text
    assert "★" in text


def test_the_table_of_a_run_without_a_name():
    assert "None" not in printed({**summary(), "name": None})
