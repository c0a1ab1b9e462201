"""95 % intervals of a held-out metric, by resampling prompts.

A prompt is the unit of resampling: completions of one prompt are alike, so they stay together, and a
difference between two policies is taken within the prompt before it gets here (which is what makes the
bootstrap *paired*).

The interval is the expanded percentile interval of T. Hesterberg (2014, "What Teachers Should Know about the
Bootstrap", arXiv 1411.5279): percentiles at a level widened by the t quantile and by √(n/(n−1)). It keeps
what is good about percentiles (never outside the range of the data, follows skew) without their narrowness at
small n. Measured coverage in % of nominal 95 % intervals, 2,000 simulated data sets (800 at n = 1000), 2,000
resamples each:

    data                        n =   10     20     50    200   1000
    normal          percentile      90.6   92.9   94.0   95.0   94.1
                    expanded        94.8   95.2   95.0   95.2   94.1
    win rate, K=4   percentile      90.9   93.4   94.4   94.8   94.2
                    expanded        94.8   95.4   95.4   95.2   94.2
    exponential     percentile      86.8   91.0   91.4   94.5   95.9
                    expanded        90.6   93.4   92.6   94.6   95.9
                    BCa             87.8   92.4   92.5   94.7   96.1
                    studentised     94.0   95.5   94.0   94.8   96.1

The studentised interval covers strong skew better below 50 prompts, but leaves 0–100 for win rates and is
undefined for resamples without spread, so it is not used. Where all values lie on one end of a known range
(every prompt won), resampling sees no spread at all; the exact binomial bound of Clopper and Pearson takes
its place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from prefloop.errors import DataError

FloatArray = npt.NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95

_CELLS_AT_ONCE = 1 << 22  # resampled values held in memory at a time: 32 MiB of float64


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its interval, in the unit of the data. `n` counts prompts. No interval is −∞ to ∞."""

    value: float
    low: float
    high: float
    n: int


def mean(values: FloatArray) -> FloatArray:
    """Return the mean over the last axis, prompts."""
    result: FloatArray = values.mean(axis=-1)
    return result


def paired_bootstrap(
    values_per_prompt: Sequence[float] | FloatArray,
    statistic: Callable[[FloatArray], FloatArray] = mean,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    bounds: tuple[float, float] | None = None,
) -> Interval:
    """Return a statistic of one value for each prompt, with its interval over prompts.

    Args: values_per_prompt: one finite number for each prompt; for a comparison, the difference within the
        prompt. statistic: maps an array `[..., prompt]` to `[...]`. seed: of the resampling. The same values
        in the same order give the same interval. resamples: how often prompts are drawn anew. 2,000 leaves
        about 2 % of the interval's width as noise. level: coverage, 0–1. bounds: the range of the values
        where it is known, such as (0, 100) for win rates. One prompt alone, or values
            that all lie on one end of the range, get their interval from it.

    Raises:
        DataError: no values, or one that is NaN or infinite.

    Example:
        >>> paired_bootstrap([1.0, 2.0, 3.0, 4.0]).value
        2.5

    """
    values = _checked(values_per_prompt, "values")
    n, value = len(values), float(statistic(values))
    if bounds is not None and (values == values[0]).all() and values[0] in bounds:
        return Interval(value, *_one_sided(float(values[0]), bounds, n, level), n)
    if n == 1:
        return Interval(value, *(bounds or (-inf, inf)), n)
    return Interval(value, *_resample([values], lambda v: statistic(v[0]), seed, resamples, level), n)


def ratio_bootstrap(
    numerators: Sequence[float] | FloatArray,
    denominators: Sequence[float] | FloatArray,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Return Σ numerators / Σ denominators with its interval over prompts: the mean per token, say.

    Args:
        numerators: one finite number for each prompt, such as a sum over its tokens.
        denominators: one number above zero for each prompt, such as its token count.
        seed: of the resampling.
        resamples: how often prompts are drawn anew.
        level: coverage, 0–1.

    Raises:
        DataError: no values, NaN or infinity, lengths that differ, or a denominator that is not above zero.

    Example:
        >>> ratio_bootstrap([1.0, 5.0], [10.0, 10.0]).value
        0.3

    """
    top, bottom = _checked(numerators, "numerators"), _checked(denominators, "denominators")
    if len(top) != len(bottom):
        raise DataError(f"bootstrap: {len(top)} numerators for {len(bottom)} denominators; give one of each per prompt")
    if not (bottom > 0).all():
        raise DataError(f"bootstrap: denominators must be > 0, got {bottom.min():g}; leave such prompts out")
    value = float(top.sum() / bottom.sum())
    if len(top) == 1:
        return Interval(value, -inf, inf, 1)
    low, high = _resample([top, bottom], lambda v: v[0].sum(-1) / v[1].sum(-1), seed, resamples, level)
    return Interval(value, low, high, len(top))


def jackknife(
    value: float,
    left_out: Sequence[float] | FloatArray,
    *,
    level: float = LEVEL,
    bounds: tuple[float, float] = (-inf, inf),
) -> Interval:
    """Return the delete-one-prompt jackknife interval of a statistic that resampling with replacement would
    distort.

    Counts of distinct things are such: a prompt drawn twice adds nothing new. The jackknife's variance is on
    average not too small (Efron and Stein 1981, Ann. Statist. 9(3), 586–596), so the interval is wide rather
    than narrow.

    Args:
        value: the statistic of all prompts.
        left_out: the statistic without prompt i, for each i.
        level: coverage, 0–1.
        bounds: the range of the statistic; the interval is cut to it.

    Raises:
        DataError: no values, or one that is NaN or infinite.

    """
    without = _checked(left_out, "left-out values")
    n = len(without)
    if n == 1:
        return Interval(value, *bounds, n)
    error = sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))
    reach = _t_quantile((1 + level) / 2, n - 1) * error
    return Interval(value, max(value - reach, bounds[0]), min(value + reach, bounds[1]), n)


def _checked(values: Sequence[float] | FloatArray, what: str) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise DataError(f"bootstrap: {what} must be one number for each of at least one prompt, got {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise DataError(f"bootstrap: {what} must be finite, got {array[bad[0]]} for prompt {bad[0]} of {len(array)}")
    return array


def _resample(
    columns: Sequence[FloatArray],
    statistic: Callable[[list[FloatArray]], FloatArray],
    seed: int,
    resamples: int,
    level: float,
) -> tuple[float, float]:
    n = len(columns[0])
    generator = np.random.default_rng(seed)
    rows = max(1, _CELLS_AT_ONCE // n)
    found = []
    for first in range(0, resamples, rows):
        drawn = generator.integers(0, n, size=(min(rows, resamples - first), n))
        found.append(statistic([column[drawn] for column in columns]))
    tail = _tail(n, level)
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    return float(low), float(high)


def _tail(n: int, level: float) -> float:
    """Share of resamples to cut at each end: (1 − level)/2, made smaller for small n (Hesterberg 2014, 4.3)."""
    return NormalDist().cdf(-sqrt(n / (n - 1)) * _t_quantile((1 + level) / 2, n - 1))


def _t_quantile(share: float, freedom: int) -> float:
    """Student's t quantile by the Cornish-Fisher series (Abramowitz and Stegun 26.7.5): 0.7 % off at 3, 0.1 % at 5."""
    z = NormalDist().inv_cdf(share)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def _one_sided(value: float, bounds: tuple[float, float], n: int, level: float) -> tuple[float, float]:
    """Clopper and Pearson's bound when all n values lie on one end of their range."""
    low, high = bounds
    reach = (high - low) * (1 - ((1 - level) / 2) ** (1 / n))
    return (low, low + reach) if value == low else (high - reach, high)
