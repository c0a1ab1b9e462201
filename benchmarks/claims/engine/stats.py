"""From measured runs to a verdict: statistics of one run, intervals over seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from statistics import mean, stdev

from benchmarks.claims.engine.records import Statistic
from prefloop.evaluate.bootstrap import paired_bootstrap
from prefloop.evaluate.student import holm, two_sided_p

# Student's t, 97.5 % quantile, by degrees of freedom from 1; beyond 30 the last one is used and is a little wide.
T_975: tuple[float, ...] = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
T_975 += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
T_975 += (2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95 % interval; one seed has none."""

    value: float
    low: float
    high: float
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of one value for each seed, with Student's interval."""
    middle, n = mean(values), len(values)
    if n < 2:
        return Estimate(middle, -inf, inf, n)
    reach = T_975[min(n - 1, len(T_975)) - 1] * stdev(values) / sqrt(n)
    return Estimate(middle, middle - reach, middle + reach, n)


def verdict(found: Estimate, sign: int = 1) -> str:
    """Return `reproduced`, `opposite`, or `not reproduced` where the interval holds 0 (or there is none)."""
    low, high = (found.low, found.high) if sign > 0 else (-found.high, -found.low)
    return "reproduced" if low > 0 else "opposite" if high < 0 else "not reproduced"


def p_value(found: Estimate, by: float = 0.0) -> float:
    """Return the two-sided p of a mean that differs from `by`, from its interval; 1 where there is none."""
    if found.n < 2:
        return 1.0
    distance, reach = found.value - by, (found.high - found.low) / 2
    if reach == 0.0:
        return 1.0 if distance == 0.0 else 0.0
    freedom = found.n - 1
    return two_sided_p(distance / reach * T_975[min(freedom, len(T_975)) - 1], freedom)


def corrected(verdicts: Sequence[str], p_values: Sequence[float]) -> list[tuple[str, float]]:
    """Return the verdicts on a claim's comparisons that Holm's correction for their number leaves, and its p-values."""
    pairs = zip(verdicts, holm(p_values), strict=True)
    return [(said if p < ALPHA else "not reproduced", p) for said, p in pairs]


ALPHA = 0.05


def overall(verdicts: Sequence[str]) -> str:
    """Return the verdict on a claim of several parts: reproduced only if all of them are."""
    kinds = set(verdicts)
    if len(kinds) == 1:
        return verdicts[0]
    return "partly reproduced" if "reproduced" in kinds else "opposite in part"


@dataclass(frozen=True)
class Trace:
    """One run: quality of each prompt under the start (first) and every round's policy, and what was promoted."""

    quality: Sequence[Sequence[float]]
    promoted: Sequence[bool]

    def in_force(self) -> list[int]:
        """Return after each round, the start included, which policy the loop stands on."""
        standing = [0]
        for index, accepted in enumerate(self.promoted, 1):
            standing.append(index if accepted else standing[-1])
        return standing

    def curve(self) -> list[float]:
        """Return mean quality of the policy in force: at the start, after the first round, …"""
        return [mean(self.quality[index]) for index in self.in_force()]

    def worse(self, index: int, than: int) -> bool:
        """Whether policy `index` is worse than policy `than`: the interval over prompts lies below 0."""
        pairs = zip(self.quality[index], self.quality[than], strict=True)
        return paired_bootstrap([ours - theirs for ours, theirs in pairs]).high < 0

    def rounds_worse(self) -> tuple[int, int, int]:
        """Return how many rounds made a policy worse than the one they started from: promoted, refused; and refused
        ones that were not worse.
        """
        standing = self.in_force()
        promoted = refused = spared = 0
        for index, accepted in enumerate(self.promoted, 1):
            bad = self.worse(index, standing[index - 1])
            promoted += bad and accepted
            refused += bad and not accepted
            spared += not bad and not accepted
        return promoted, refused, spared


STATISTICS: Mapping[Statistic, tuple[str, Callable[[Trace], float]]] = {
    "final": ("quality at the end", lambda run: run.curve()[-1]),
    "first": ("quality after the first round", lambda run: run.curve()[1]),
    "later_gain": ("gain in quality after the first round", lambda run: run.curve()[-1] - run.curve()[1]),
    "last_gain": ("gain in quality in the second half of the rounds", lambda run: _second_half(run.curve())),
    "drafts": ("quality without revision", lambda run: run.curve()[1]),
    "revised": ("quality after the last revision", lambda run: run.curve()[-1]),
    "revision_gain": ("gain in quality by revisions", lambda run: run.curve()[-1] - run.curve()[1]),
    "regressions": ("promoted rounds that made the policy worse", lambda run: float(run.rounds_worse()[0])),
}
"""What of a run is compared, by name: in words, and how it is found."""


def _second_half(curve: Sequence[float]) -> float:
    return curve[-1] - curve[len(curve) // 2]
