"""Held-out metrics against values worked out by hand."""

from math import inf, nan

import numpy as np
import pytest

from prefloop.errors import DataError
from prefloop.evaluate.heldout import baseline_metrics, candidate_metrics, repetition, words
from prefloop.rows import HOLDOUT, VERBATIM, Completion, JudgedGroup, Message, Prompt

OWN = {"judge_score", "length", "repetition", "distinct_2", "stopped"}
COMPARED = {
    "judge_score_gain",
    "judge_score_gain_best",
    "win_rate_vs_start",
    "win_rate_vs_best",
    "kl_policy_start",
}


def group(name, scores, texts=None, *, policy="p", judge="j", temperature=1.0, top_p=1.0, **fields):
    prompt = Prompt(name, (Message(VERBATIM, name),), None, HOLDOUT, "here")
    completions = tuple(
        Completion(
            f"{policy}-{name}-{i}",
            (texts or ["one two three"] * len(scores))[i],
            fields.get("token_ids", [(1, 2)] * len(scores))[i],
            fields.get("logps", [(-1.0, -2.0)] * len(scores))[i],
            fields.get("finish", ["stop"] * len(scores))[i],
            i,
            policy,
        )
        for i in range(len(scores))
    )
    return JudgedGroup(
        prompt, completions, policy, 0, temperature, top_p, tuple(scores), None, judge, (None,) * len(scores)
    )


def start_logps(groups, shift=0.5):
    return {c.completion_id: tuple(x - shift for x in c.sampler_logps) for g in groups for c in g.completions}


def compare(candidate, start, best=None, logps=None):
    logps = start_logps(candidate) if logps is None else logps
    return candidate_metrics(candidate, start, best or start, logps, resamples=200)


def test_names_and_units():
    candidate, start = [group("a", [1.0]), group("b", [2.0])], [group("a", [0.0]), group("b", [3.0])]
    assert set(baseline_metrics(start, resamples=100).metrics) == OWN
    found = compare(candidate, start).metrics
    assert set(found) == OWN | COMPARED
    assert {name: m.unit for name, m in found.items()} == {
        "judge_score": "score",
        "judge_score_gain": "score",
        "judge_score_gain_best": "score",
        "win_rate_vs_start": "%",
        "win_rate_vs_best": "%",
        "kl_policy_start": "nats per token",
        "length": "tokens",
        "repetition": "share",
        "distinct_2": "share",
        "stopped": "%",
    }
    assert all(m.low <= m.value <= m.high and m.n == 2 for m in found.values())


def test_scores_gains_and_wins_by_hand():
    candidate = [group("a", [1.0, 3.0]), group("b", [0.0, 2.0])]
    start = [group("b", [2.0, 2.0]), group("a", [1.0, 0.0])]
    best = [group("a", [3.0, 3.0]), group("b", [-1.0, -1.0])]
    found = {name: m.value for name, m in compare(candidate, start, best).metrics.items()}
    assert found["judge_score"] == pytest.approx((2 + 1) / 2)
    assert found["judge_score_gain"] == pytest.approx(((2 - 0.5) + (1 - 2)) / 2)
    assert found["judge_score_gain_best"] == pytest.approx(((2 - 3) + (1 + 1)) / 2)
    # a: 1>1 no (tie), 1>0, 3>1, 3>0 → 3.5 of 4; b: 0<2 twice, 2=2 twice → 1 of 4
    assert found["win_rate_vs_start"] == pytest.approx(100 * (3.5 / 4 + 1 / 4) / 2)
    # a: 1<3 twice, 3=3 twice → 1 of 4; b: all → 4 of 4
    assert found["win_rate_vs_best"] == pytest.approx(100 * (1 / 4 + 1) / 2)


def test_numbers_of_completions_may_differ():
    found = compare([group("a", [1.0, 2.0, 3.0])], [group("a", [2.0])]).metrics
    assert found["win_rate_vs_start"].value == pytest.approx(50.0)


def test_policy_against_itself():
    generator = np.random.default_rng(0)
    groups = [group(f"{i:02d}", list(generator.normal(size=3))) for i in range(30)]
    found = compare(groups, groups, logps=start_logps(groups, 0.0)).metrics
    assert found["win_rate_vs_start"].value == found["win_rate_vs_start"].low == 50.0
    assert found["judge_score_gain"].value == 0.0
    assert found["kl_policy_start"].value == 0.0


def test_pairing_makes_the_interval_of_a_gain_narrow():
    generator = np.random.default_rng(0)
    hard = generator.normal(0, 10, 100)
    start = [group(f"{i:03d}", [h]) for i, h in enumerate(hard)]
    candidate = [group(f"{i:03d}", [h + 1 + generator.normal(0, 0.1)]) for i, h in enumerate(hard)]
    found = compare(candidate, start).metrics
    gain, score = found["judge_score_gain"], found["judge_score"]
    assert 0.9 < gain.low < 1.0 < gain.high < 1.1
    assert score.high - score.low > 3


def test_kl_is_per_token_over_all_tokens():
    a = group("a", [0.0, 0.0], logps=[(-1.0, -1.0), (-2.0,)], token_ids=[(1, 2), (3,)])
    b = group("b", [0.0], logps=[(-0.5,) * 4], token_ids=[(1,) * 4], temperature=0.7, top_p=0.9)
    logps = {"p-a-0": (-1.5, -2.0), "p-a-1": (-1.0,), "p-b-0": (-1.0,) * 4}
    found = compare([a, b], [a, b], logps=logps).metrics["kl_policy_start"]
    # a: 0.5 + 1.0 − 1.0 over 3 tokens; b: 4 × 0.5 over 4 tokens
    assert found.value == pytest.approx((0.5 + 2.0) / 7)
    assert found.n == 2
    assert found.estimator == "k1, samples at temperature 0.7, top-p 0.9 and temperature 1"


def test_kl_estimates_the_kl_of_known_distributions():
    generator = np.random.default_rng(0)
    policy, start = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    groups, logps = [], {}
    for i in range(300):
        drawn = generator.choice(3, size=generator.integers(5, 15), p=policy)
        groups.append(group(f"{i:03d}", [0.0], logps=[tuple(np.log(policy[drawn]))], token_ids=[tuple(drawn.tolist())]))
        logps[f"p-{i:03d}-0"] = tuple(np.log(start[drawn]))
    found = compare(groups, groups, logps=logps).metrics["kl_policy_start"]
    assert found.low < float((policy * np.log(policy / start)).sum()) < found.high


def test_completions_without_logps_are_left_out_and_counted():
    candidate = [group("a", [0.0, 0.0], logps=[None, (-1.0, -2.0)]), group("b", [0.0, 0.0])]
    logps = {"p-a-0": (-1.0, -1.0), "p-a-1": (-2.0, -3.0), "p-b-0": None}
    result = compare(candidate, candidate, logps=logps)
    assert result.metrics["kl_policy_start"].value == pytest.approx(1.0)
    assert result.metrics["kl_policy_start"].n == 1
    assert result.facts["without_logps"] == 3


def test_no_logps_at_all_is_a_warning():
    groups = [group("a", [0.0]), group("b", [0.0])]
    result = compare(groups, groups, logps={})
    assert "kl_policy_start" not in result.metrics
    assert any(w.startswith("kl_policy_start was not measured") for w in result.warnings)


def test_an_empty_completion_has_no_tokens():
    groups = [group("a", [0.0], [""], token_ids=[()], logps=[()]), group("b", [0.0], ["x y"])]
    result = compare(groups, groups)
    assert result.metrics["length"].value == 1.0
    assert result.metrics["kl_policy_start"].n == 1
    assert result.metrics["repetition"].value == 0.0


def test_length_and_stopped():
    groups = [
        group("a", [0.0, 0.0], token_ids=[(1, 2, 3), (1,)], finish=["stop", "length"]),
        group("b", [0.0, 0.0], token_ids=[(1,) * 6, None], finish=["length", "length"]),
    ]
    result = baseline_metrics(groups, resamples=100)
    assert result.metrics["length"].value == pytest.approx((2 + 6) / 2)
    assert result.metrics["stopped"].value == pytest.approx(25.0)
    assert result.facts == {"prompts": 2, "completions": 4, "without_token_ids": 1, "unscored": 0}


def test_texts_without_tokens_have_no_length():
    groups = [group("a", [0.0], token_ids=[None])]
    result = baseline_metrics(groups, resamples=100)
    assert "length" not in result.metrics
    assert "length was not measured: no held-out prompt has what it needs" in result.warnings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("two words", 0.0),
        ("a b c", 0.0),
        ("a b c a b c", 0.25),  # abc bca cab abc
        ("happy happy happy happy happy", 2 / 3),
        ("Happy HAPPY happy happy", 0.5),
        ("!!!!!!", 0.75),
        ("哈哈哈哈哈", 2 / 3),
        ("one two three four five six", 0.0),
    ],
)
def test_repetition_by_hand(text, expected):
    assert repetition(text) == pytest.approx(expected)


def test_words():
    assert words("Don't  stop,\nTom’s here…") == ["don't", "stop", ",", "tom’s", "here", "…"]
    assert words("我爱cats 3x") == ["我", "爱", "cats", "3x"]
    assert words("naïve Ünïcode_x") == ["naïve", "ünïcode_x"]


def test_distinct_2_by_hand():
    groups = [group("a", [0.0, 0.0], ["a b c", "a b"]), group("b", [0.0], ["b c d"])]
    found = baseline_metrics(groups, resamples=100).metrics["distinct_2"]
    # ab bc | ab | bc cd: 3 distinct of 5
    assert found.value == pytest.approx(3 / 5)
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0


def test_the_interval_of_distinct_2_covers():
    # Truth: the mean of the statistic over many data sets of the same size.
    generator = np.random.default_rng(0)

    def measure():
        texts = [" ".join(map(str, generator.zipf(1.7, 12).clip(max=200))) for _ in range(40)]
        groups = [group(f"{i:02d}", [0.0], [t]) for i, t in enumerate(texts)]
        return baseline_metrics(groups, resamples=2).metrics["distinct_2"]

    found = [measure() for _ in range(200)]
    truth = float(np.mean([m.value for m in found]))
    assert 0.93 <= np.mean([m.low <= truth <= m.high for m in found]) <= 1.0


def test_texts_of_one_word_have_no_distinct_2():
    result = baseline_metrics([group("a", [0.0], ["x"]), group("b", [0.0], ["y"])], resamples=100)
    assert "distinct_2" not in result.metrics


def test_a_missing_score_is_left_out_and_counted():
    candidate = [group("a", [None, 1.0]), group("b", [None, None]), group("c", [3.0, 3.0])]
    start = [group("a", [0.0, 2.0]), group("b", [0.0, 0.0]), group("c", [None, None])]
    result = compare(candidate, start)
    assert result.metrics["judge_score"].value == pytest.approx(2.0)
    assert result.metrics["judge_score"].n == 2
    assert result.metrics["win_rate_vs_start"].value == pytest.approx(50.0)
    assert result.metrics["win_rate_vs_start"].n == 1
    assert result.metrics["length"].n == 3
    assert (result.facts["unscored"], result.facts["unscored_start"], result.facts["unscored_best"]) == (3, 2, 2)
    assert "the judge gave no score to 3 of 6 held-out completions; their notes say why" in result.warnings


def test_no_scores_at_all():
    groups = [group("a", [None]), group("b", [None])]
    result = compare(groups, groups)
    assert "judge_score" not in result.metrics
    assert "win_rate_vs_best" not in result.metrics
    assert "length" in result.metrics


def test_few_prompts_warn():
    few, enough = ([group(f"{i:02d}", [0.0]) for i in range(n)] for n in (19, 20))
    assert "only 19 held-out prompts" in baseline_metrics(few, resamples=10).warnings[0]
    assert baseline_metrics(enough, resamples=10).warnings == ()


def test_other_sampling_warns():
    candidate = [group(f"{i:02d}", [0.0]) for i in range(20)]
    start = [group(f"{i:02d}", [0.0], temperature=0.7) for i in range(20)]
    assert compare(candidate, start, candidate).warnings == (
        "the policy was sampled at temperature 1, the start at temperature 0.7: they differ in more than the policy",
    )


def test_the_order_of_prompts_does_not_matter():
    generator = np.random.default_rng(0)
    groups = [group(f"{i:02d}", [float(generator.normal())]) for i in range(25)]
    assert baseline_metrics(groups) == baseline_metrics(groups[::-1])
    assert baseline_metrics(groups, seed=1) != baseline_metrics(groups)


@pytest.mark.parametrize("score", [nan, inf, -inf])
def test_scores_must_be_finite(score):
    with pytest.raises(DataError, match="completion 1 of prompt a of the policy has score"):
        baseline_metrics([group("a", [0.0, score])])


def test_prompts_must_match():
    a, b, c = (group(name, [0.0]) for name in "abc")
    with pytest.raises(DataError, match=r"1 held-out prompts have completions of the policy but not the start \(b\)"):
        compare([a, b], [a])
    with pytest.raises(DataError, match=r"the start but not the policy \(b, c\)"):
        compare([a], [a, b, c], [a])
    with pytest.raises(DataError, match="the best so far but not the policy"):
        compare([a], [a], [a, b])
    many = [group(f"{i}", [0.0]) for i in range(9)]
    with pytest.raises(DataError, match=r"8 held-out .* \(1, 2, 3, 4, 5, …\)"):
        compare(many, [many[0]])


def test_other_misfits():
    a = group("a", [0.0])
    with pytest.raises(DataError, match="no held-out prompts"):
        baseline_metrics([])
    with pytest.raises(DataError, match="stands twice in the groups of the start"):
        compare([a], [a, a])
    with pytest.raises(DataError, match=r"different judges \(j, k\)"):
        compare([a], [group("a", [0.0], judge="k")])
    with pytest.raises(DataError, match="0 completions"):
        baseline_metrics([group("a", [])])
    with pytest.raises(DataError, match=r"2 sampler log-probs and 1 of the start"):
        compare([a], [a], logps={"p-a-0": (-1.0,)})
    with pytest.raises(DataError, match="p-a-0 has a log-prob that is NaN or infinite"):
        compare([a], [a], logps={"p-a-0": (-1.0, -inf)})
