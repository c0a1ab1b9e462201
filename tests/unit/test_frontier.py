"""KL estimators against the exact KL of models that can be enumerated, points with intervals, the Pareto frontier."""

from itertools import product
from math import nan

import numpy as np
import pytest

from prefloop.errors import ConfigError, DataError
from prefloop.evaluate.frontier import ESTIMATORS, FrontierPoint, frontier_point, kl, pareto_frontier
from prefloop.rows import Metric

VOCABULARY, LENGTH, END = 3, 3, 0


class Enumerable:
    """Next-token probabilities drawn at random for each prefix; token 0 ends a completion, so lengths are 1 to 3."""

    def __init__(self, seed, flatness=1.0):
        generator = np.random.default_rng(seed)
        prefixes = [p for size in range(LENGTH) for p in product(range(VOCABULARY), repeat=size)]
        self.next = {p: generator.dirichlet([flatness] * VOCABULARY) for p in prefixes}

    def logps(self, tokens):
        return np.log([self.next[tokens[:i]][token] for i, token in enumerate(tokens)])

    def probability(self, tokens):
        return float(np.exp(self.logps(tokens).sum()))


def completions():
    """All of them: each ends with its only end token, or at the full length."""
    every = (tokens for size in range(1, LENGTH + 1) for tokens in product(range(VOCABULARY), repeat=size))
    return [t for t in every if END not in t[:-1] and (t[-1] == END or len(t) == LENGTH)]


def exact_kl(policy, reference):
    """Σ π log(π / π_ref) over whole completions: the definition."""
    odds = [(policy.probability(t), reference.probability(t)) for t in completions()]
    assert sum(p for p, _ in odds) == pytest.approx(1.0)
    return sum(p * np.log(p / q) for p, q in odds)


def near(policy, distance, seed=9):
    """A reference that differs from `policy` by noise of size `distance` in its logits."""
    generator = np.random.default_rng(seed)
    found = Enumerable(0)
    for prefix, shares in policy.next.items():
        tilted = shares * np.exp(distance * generator.normal(size=VOCABULARY))
        found.next[prefix] = tilted / tilted.sum()
    return found


PAIRS = [
    (Enumerable(1, 3.0), Enumerable(2, 3.0)),
    (Enumerable(3), Enumerable(3)),
    (Enumerable(4, 3.0), near(Enumerable(4, 3.0), 0.1)),
]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize(("policy", "reference"), PAIRS)
def test_the_expectation_is_the_exact_kl(policy, reference, estimator):
    expected = 0.0
    for tokens in completions():
        one = kl([policy.logps(tokens)], [reference.logps(tokens)], estimator=estimator)
        expected += policy.probability(tokens) * one.value
    assert expected == pytest.approx(exact_kl(policy, reference), abs=1e-12)


def draw(policy, n, seed):
    every = completions()
    chosen = np.random.default_rng(seed).choice(len(every), size=n, p=[policy.probability(t) for t in every])
    return [every[i] for i in chosen]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_intervals_hold_the_exact_kl(estimator):
    policy, reference = PAIRS[0]
    truth, hits = exact_kl(policy, reference), []
    for seed in range(150):
        drawn = draw(policy, 200, seed)
        found = kl(
            [policy.logps(t) for t in drawn], [reference.logps(t) for t in drawn], estimator=estimator, seed=seed
        )
        hits.append(found.low <= truth <= found.high)
    assert 93 <= 100 * np.mean(hits) <= 97.5


def test_k3_is_never_negative_and_varies_less_between_close_policies():
    policy, reference = PAIRS[2]
    drawn = draw(policy, 2000, 0)
    ratios = [policy.logps(t) - reference.logps(t) for t in drawn]
    terms = {name: np.array([rule(r).sum() for r in ratios]) for name, rule in ESTIMATORS.items()}
    assert terms["k1"].min() < 0 <= terms["k3"].min()
    assert terms["k3"].std() < terms["k1"].std() / 5


def test_per_token_is_the_sum_over_all_tokens_by_their_number():
    ours, theirs = [[-1.0, -1.0], [-2.0]], [[-1.5, -2.0], [-2.25]]
    found = kl(ours, theirs, per="token", clusters=["a", "b"])
    assert (found.value, found.n, found.unit) == (pytest.approx(1.75 / 3), 2, "nats per token")
    assert kl(ours, theirs).value == pytest.approx((1.5 + 0.25) / 2)
    assert kl(ours, theirs).estimator == "KL(policy ‖ reference), k1, per completion"


def test_completions_of_a_prompt_stay_together():
    ours, theirs = [[-1.0], [-1.0], [-3.0]], [[-2.0], [-4.0], [-3.5]]
    clusters = ["a", "a", "b"]
    found = kl(ours, theirs, clusters=clusters)
    assert (found.value, found.n) == (pytest.approx((2.0 + 0.5) / 2), 2)
    assert kl(ours, theirs, clusters=clusters, per="token").value == pytest.approx(4.5 / 3)


def test_a_point_has_both_intervals():
    policy, reference = PAIRS[0]
    drawn = draw(policy, 400, 3)
    logps = [[model.logps(t) for t in drawn] for model in (policy, reference)]
    rewards = [float(sum(t)) for t in drawn]
    found = frontier_point("round 1", rewards, *logps, estimator="k3", clusters=[i // 4 for i in range(400)])
    assert found.name == "round 1"
    assert (found.reward.value, found.reward.n) == (pytest.approx(np.mean(rewards)), 100)
    assert found.reward.low < sum(policy.probability(t) * sum(t) for t in completions()) < found.reward.high
    assert found.kl.low < exact_kl(policy, reference) < found.kl.high
    assert "k3" in found.kl.estimator


def point(name, reward, divergence, spread=0.0, estimator="k1"):
    return FrontierPoint(
        name,
        Metric(reward, reward - spread, reward + spread, 100, "score"),
        Metric(divergence, divergence - spread, divergence + spread, 100, "nats", estimator),
    )


def test_the_frontier_by_hand():
    points = [
        point("start", 0.0, 0.0),
        point("good", 1.0, 2.0),
        point("same reward, farther", 1.0, 3.0),
        point("worse, farther", 0.5, 2.5),
        point("twin of good", 1.0, 2.0),
        point("best", 2.0, 9.0),
    ]
    assert [p.name for p in pareto_frontier(points)] == ["start", "good", "twin of good", "best"]
    assert pareto_frontier([]) == []


def test_the_frontier_is_what_the_definition_says():
    places = np.random.default_rng(0).integers(0, 12, (60, 2))
    points = [point(str(i), float(r), float(d)) for i, (r, d) in enumerate(places)]
    kept = {p.name for p in pareto_frontier(points)}
    for i, (reward, divergence) in enumerate(places):
        beaten = any((r > reward and d <= divergence) or (r >= reward and d < divergence) for r, d in places)
        assert (str(i) in kept) == (not beaten)


def test_sure_leaves_out_only_what_is_beaten_beyond_doubt():
    points = [point("a", 1.0, 1.0, 0.3), point("b", 0.9, 1.1, 0.3), point("c", 0.0, 3.0, 0.3)]
    assert [p.name for p in pareto_frontier(points)] == ["a"]
    assert [p.name for p in pareto_frontier(points, sure=True)] == ["a", "b"]


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ([[-1.0]], [], "1 completions under the policy and 0"),
        ([[-1.0]], [[-1.0, -2.0]], "completion 0 has 1 log-probs"),
        ([[]], [[]], "at least one token"),
        ([[-1.0]], [[nan]], "NaN or infinite"),
        ([], [], "at least one prompt"),
    ],
)
def test_what_is_refused(ours, theirs, message):
    with pytest.raises(DataError, match=message):
        kl(ours, theirs)


def test_other_bad_input():
    with pytest.raises(ConfigError, match="estimator must be k1 or k3, got 'k2'"):
        kl([[-1.0]], [[-1.0]], estimator="k2")
    with pytest.raises(DataError, match="r1 has 1 completions and 2 rewards"):
        frontier_point("r1", [1.0, 2.0], [[-1.0]], [[-1.0]])
    with pytest.raises(DataError, match="name of its own"):
        pareto_frontier([point("a", 1, 1), point("a", 2, 2)])
    with pytest.raises(DataError, match="KL of different kinds"):
        pareto_frontier([point("a", 1, 1), point("b", 2, 2, estimator="k3")])
