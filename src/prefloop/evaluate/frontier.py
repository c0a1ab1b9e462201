"""Reward against KL: what a policy gained, and how far it went from the start for it.

A point is a checkpoint or a method: its mean reward on held-out prompts, and KL(policy ‖ reference), both with
intervals over prompts. More reward at less KL is better; the Pareto frontier are the points that no other one beats in
both.

KL estimators, named as by J. Schulman (2020, "Approximating KL Divergence", blog post), on completions that the policy
drew at temperature 1 from its whole vocabulary, r = log π − log π_ref of a token:

- `k1`: r. Unbiased; can be negative.
- `k3`: e^{−r} − 1 + r. Unbiased where the reference gives no probability to what the policy never says; never
  negative, and of less variance while the policies are close. Far apart, e^{−r} of rare tokens dominates it.

Both are summed over a completion's tokens. By the chain rule the sum of the tokens' expectations is the KL of whole
completions, for k3 too: its tokens' terms are unbiased for the KL at that token, given what comes before.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from prefloop.errors import ConfigError, DataError
from prefloop.evaluate.bootstrap import FloatArray, Interval, paired_bootstrap, ratio_bootstrap
from prefloop.evaluate.win_rate import prompt_means
from prefloop.rows import Metric

KL_UNITS = {"completion": "nats", "token": "nats per token"}

Logps = Sequence[Sequence[float] | FloatArray]
"""`[completion][token]` log-probabilities in nats; completions may differ in length."""


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """A checkpoint or method: its name, mean reward, and KL from the reference."""

    name: str
    reward: Metric
    kl: Metric


def k1(log_ratio: FloatArray) -> FloatArray:
    """Return the k1 term of each token, nats; see the module."""
    return log_ratio


def k3(log_ratio: FloatArray) -> FloatArray:
    """Return the k3 term of each token, nats, ≥ 0; see the module.

    Example:
        >>> k3(np.array([0.0, 1.0])).round(4).tolist()
        [0.0, 0.3679]

    """
    terms: FloatArray = np.expm1(-log_ratio) + log_ratio
    return terms


ESTIMATORS: dict[str, Callable[[FloatArray], FloatArray]] = {"k1": k1, "k3": k3}


def kl(
    policy_logps: Logps,
    reference_logps: Logps,
    *,
    estimator: str = "k1",
    per: str = "completion",
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Metric:
    """Return KL(policy ‖ reference) with its interval over prompts.

    Args:
        policy_logps: of each token of each completion that the policy drew, the end token included, at temperature 1.
        reference_logps: of the same tokens under the reference.
        estimator: `k1` or `k3`, see the module.
        per: `completion`: mean over prompts of the mean over completions of the sum over tokens. `token`: sum over all
            tokens divided by their number, as `kl_policy_start` of `heldout`.
        clusters: the prompt of each completion. Default: each has a prompt of its own.
        seed: of the bootstrap.

    Raises:
        ConfigError: another estimator or unit.
        DataError: no completions, one without tokens, not one log-prob of both policies for each token, or one that is
            NaN or infinite.

    """
    if estimator not in ESTIMATORS or per not in KL_UNITS:
        raise ConfigError(
            f"kl: estimator must be {' or '.join(ESTIMATORS)}, got {estimator!r}; per must be {' or '.join(KL_UNITS)}, "
            f"got {per!r}"
        )
    ratios = _log_ratios(policy_logps, reference_logps)
    sums = np.array([float(ESTIMATORS[estimator](ratio).sum()) for ratio in ratios])
    if per == "completion":
        found = paired_bootstrap(prompt_means(sums, clusters), seed=seed)
    else:
        tokens = np.array([float(len(ratio)) for ratio in ratios])
        # A ratio of means of equal-sized prompts would do too; sums keep prompts with more completions as heavy as
        # their tokens, as in `heldout`.
        found = ratio_bootstrap(_sums(sums, clusters), _sums(tokens, clusters), seed=seed)
    return _metric(found, KL_UNITS[per], f"KL(policy ‖ reference), {estimator}, per {per}")


def frontier_point(
    name: str,
    rewards: Sequence[float] | FloatArray,
    policy_logps: Logps,
    reference_logps: Logps,
    *,
    estimator: str = "k1",
    clusters: Sequence[Hashable] | None = None,
) -> FrontierPoint:
    """Return a policy's place in the plane of KL and reward, from one reward for each of its completions.

    Arguments as in `kl`; KL is per completion. `rewards` are in the judge's unit.

    Raises:
        ConfigError: another estimator.
        DataError: as `kl`, or not one finite reward for each completion.

    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.shape != (len(policy_logps),):
        raise DataError(
            f"frontier: {name} has {len(policy_logps)} completions and {values.size} rewards; give one each"
        )
    reward = paired_bootstrap(prompt_means(values, clusters))
    divergence = kl(policy_logps, reference_logps, estimator=estimator, clusters=clusters)
    return FrontierPoint(name, _metric(reward, "score", "mean over prompts"), divergence)


def pareto_frontier(points: Sequence[FrontierPoint], *, sure: bool = False) -> list[FrontierPoint]:
    """Return the points that no other one beats in both reward and KL, by rising KL.

    To beat is to have at least the reward at no more KL, and one of the two strictly; equal points stay together.

    Args:
        points: of one reference, judge and set of prompts, else they cannot be compared.
        sure: leave out only what is beaten beyond doubt: another point's whole interval of reward lies above, and its
            whole interval of KL below. Default: values alone decide.

    Raises:
        DataError: two points with one name, rewards in different units, or KL in different units or by different
            estimators.

    """
    names = [point.name for point in points]
    if len(set(names)) != len(names):
        raise DataError(f"frontier: every point needs a name of its own, got {', '.join(names)}")
    for what, kinds in (
        ("rewards", {p.reward.unit for p in points}),
        ("KL", {(p.kl.unit, p.kl.estimator) for p in points}),
    ):
        if len(kinds) > 1:
            raise DataError(f"frontier: {what} of different kinds cannot be compared: {sorted(map(str, kinds))}")
    beats = _surely_beats if sure else _beats
    kept = [point for point in points if not any(beats(other, point) for other in points)]
    return sorted(kept, key=lambda point: (point.kl.value, -point.reward.value))


def _beats(one: FrontierPoint, other: FrontierPoint) -> bool:
    better, closer = one.reward.value - other.reward.value, other.kl.value - one.kl.value
    return min(better, closer) >= 0 and max(better, closer) > 0


def _surely_beats(one: FrontierPoint, other: FrontierPoint) -> bool:
    return one.reward.low > other.reward.high and one.kl.high < other.kl.low


def _metric(found: Interval, unit: str, estimator: str) -> Metric:
    return Metric(found.value, found.low, found.high, found.n, unit, estimator)


def _log_ratios(policy: Logps, reference: Logps) -> list[FloatArray]:
    if len(policy) != len(reference):
        raise DataError(f"kl: {len(policy)} completions under the policy and {len(reference)} under the reference")
    found = []
    for index, (ours, theirs) in enumerate(zip(policy, reference, strict=True)):
        if len(ours) != len(theirs) or not len(ours):
            raise DataError(
                f"kl: completion {index} has {len(ours)} log-probs under the policy and {len(theirs)} under the "
                "reference; there must be one of both for each of at least one token"
            )
        ratio = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
        if not np.isfinite(ratio).all():
            raise DataError(f"kl: completion {index} has a log-prob that is NaN or infinite")
        found.append(ratio)
    return found


def _sums(values: FloatArray, clusters: Sequence[Hashable] | None) -> FloatArray:
    if clusters is None:
        return values
    sizes = dict[Hashable, int]()
    for name in clusters:
        sizes[name] = sizes.get(name, 0) + 1
    return prompt_means(values, clusters) * np.array(list(sizes.values()), dtype=np.float64)
