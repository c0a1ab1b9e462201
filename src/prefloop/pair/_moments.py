"""The shape of a sample: skewness and excess kurtosis. Not a pair rule: no `kind` names this file."""

import math
import sys
from collections.abc import Sequence


def skewness(values: Sequence[float]) -> float:
    """Return m₃ / m₂^(3/2), with m_k = mean((a − mean a)^k), as `scipy.stats.skew` with its default `bias=True`.

    0 for a symmetric sample, positive for a long right tail. NaN where all values are equal, or there are none.
    """
    second, third = _central(values, 2), _central(values, 3)
    return third / second**1.5 if _varies(values, second) else math.nan


def excess_kurtosis(values: Sequence[float]) -> float:
    """Return m₄ / m₂² − 3, with m_k = mean((a − mean a)^k), as `scipy.stats.kurtosis` with its default `bias=True`.

    0 for a normal distribution, positive for heavy tails, at least −2. NaN where all values are equal, or there are
    none.
    """
    second, fourth = _central(values, 2), _central(values, 4)
    return fourth / second**2 - 3 if _varies(values, second) else math.nan


def _central(values: Sequence[float], power: int) -> float:
    if not values:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** power for value in values) / len(values)


def _varies(values: Sequence[float], variance: float) -> bool:
    """Return whether the variance is more than the rounding of the mean, the rule of scipy."""
    mean = math.fsum(values) / len(values) if values else 0.0
    return variance > (sys.float_info.epsilon * mean) ** 2
