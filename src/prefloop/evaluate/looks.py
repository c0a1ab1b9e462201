"""Alpha spending: how strict each of several looks must be, so that all of them together keep one error rate.

Two situations, told apart by `cumulative`:

- A gate looks at the same held-out prompts in every round, each time at another policy. Looks then depend on each
  other in ways that nobody knows, so the error rate is divided (Bonferroni): right under any dependence.
- One comparison is looked at again and again while prompts come in, and stops as soon as it is decided. Looks are then
  sums that grow, their joint distribution is known, and the bounds of Lan and DeMets (1983, Biometrika 70(3), 659–663)
  are wider than needed by nothing. They are computed by the recursion of Armitage, McPherson and Rowe (1969, JRSS A
  132(2), 235–244).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import e, erfc, log, sqrt
from statistics import NormalDist

import numpy as np

from prefloop.errors import ConfigError
from prefloop.evaluate.bootstrap import FloatArray

ALPHA = 0.05

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)  # on which a density is integrated, for [−1, 1]
_FAR = 8.0  # standard deviations beyond which nothing is left to integrate
_HALVINGS = 50
_LEAST = 1e-300

_normal = NormalDist()
_upper = np.frompyfunc(lambda x: 0.5 * erfc(x / sqrt(2)), 1, 1)


@dataclass(frozen=True, slots=True)
class Look:
    """One look. All error rates are two-sided.

    `fraction`: of the looks, or of the prompts, that are done after this one, (0, 1]. `spent`: error rate spent so far,
    this look included. `alpha`: what this look alone is tested at. `level` = 1 − `alpha`: of the interval that decides.
    `z`: the normal quantile of that interval.
    """

    fraction: float
    spent: float
    alpha: float
    level: float
    z: float


def looks(
    fractions: int | Sequence[float], *, alpha: float = ALPHA, spending: str = "even", cumulative: bool = False
) -> tuple[Look, ...]:
    """Return what each look is tested at, so that all together err with probability `alpha` at most.

    Args:
        fractions: number of equal looks, or after which fraction of all rounds, or prompts, each look comes: rising,
            in (0, 1].
        alpha: error rate of all looks together, two-sided, in (0, 0.5].
        spending: `even` (α t), `pocock` (α ln(1 + (e − 1) t)) or `obrien_fleming` (for each side
            2 − 2 Φ(z / √t), z the 1 − α/4 quantile: next to nothing at first). Lan and DeMets (1983).
        cumulative: every look is at the same comparison with more prompts. False: at another policy each time.

    Raises:
        ConfigError: no looks, fractions that do not rise within (0, 1], another α or spending.

    Example:
        >>> [round(look.level, 3) for look in looks(5)]
        [0.99, 0.99, 0.99, 0.99, 0.99]

    """
    if spending not in SPENDING:
        raise ConfigError(f"looks: spending must be one of {', '.join(SPENDING)}, got {spending!r}")
    if not 0 < alpha <= 0.5:
        raise ConfigError(f"looks: alpha must be in (0, 0.5], got {alpha}")
    times = [i / fractions for i in range(1, fractions + 1)] if isinstance(fractions, int) else list(fractions)
    if not times or times[0] <= 0 or times[-1] > 1 or any(b <= a for a, b in pairwise(times)):
        raise ConfigError(f"looks: fractions must rise within (0, 1], one for each look, got {fractions}")
    spent = [SPENDING[spending](alpha, t) for t in times]
    steps = [b - a for a, b in pairwise([0.0, *spent])]
    bounds = _bounds(times, steps) if cumulative else [_bound(step) for step in steps]
    alphas = [2 * float(_upper(z)) for z in bounds]
    return tuple(Look(t, s, a, 1 - a, z) for t, s, a, z in zip(times, spent, alphas, bounds, strict=True))


def _obrien_fleming(alpha: float, time: float) -> float:
    return 4 * float(_upper(_normal.inv_cdf(1 - alpha / 4) / sqrt(time)))


SPENDING: dict[str, Callable[[float, float], float]] = {
    "even": lambda alpha, time: alpha * time,
    "pocock": lambda alpha, time: alpha * log(1 + (e - 1) * time),
    "obrien_fleming": _obrien_fleming,
}
"""(α, fraction) → two-sided error rate that may be spent by then."""


def _bound(step: float) -> float:
    """Return z with two-sided error rate `step`; of next to nothing, as of a first of many looks, a very large one."""
    return -_normal.inv_cdf(max(step, _LEAST) / 2)


def _bounds(times: Sequence[float], steps: Sequence[float]) -> list[float]:
    """Return z of each look: a Brownian motion seen at `times` first leaves ±z√t at look k with probability step k."""
    bounds = [min(_bound(steps[0]), _FAR)]
    points, masses = _first(bounds[0], times[0])
    for (before, now), step in zip(pairwise(times), steps[1:], strict=True):
        spread = sqrt(now - before)
        bounds.append(_solve(points, masses, spread, sqrt(now), step))
        points, masses = _next(points, masses, spread, bounds[-1] * sqrt(now))
    return bounds


def _first(bound: float, time: float) -> tuple[FloatArray, FloatArray]:
    edge = bound * sqrt(time)
    points = edge * _NODES
    return points, edge * _WEIGHTS * np.exp(-(points**2) / (2 * time)) / sqrt(2 * np.pi * time)


def _next(points: FloatArray, masses: FloatArray, spread: float, edge: float) -> tuple[FloatArray, FloatArray]:
    new = edge * _NODES
    steps = (new[:, None] - points[None, :]) / spread
    return new, edge * _WEIGHTS * (np.exp(-(steps**2) / 2) @ masses) / (spread * sqrt(2 * np.pi))


def _solve(points: FloatArray, masses: FloatArray, spread: float, deviation: float, step: float) -> float:
    low, high = 0.0, _FAR
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        edge = middle * deviation
        leaves = _upper((edge - points) / spread) + _upper((edge + points) / spread)
        low, high = (middle, high) if float((masses * leaves.astype(np.float64)).sum()) > step else (low, middle)
    return (low + high) / 2
