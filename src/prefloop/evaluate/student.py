"""Student's t distribution for degrees of freedom that need not be whole, and Holm's correction; numpy-free.

The distribution function is the regularised incomplete beta function, by its continued fraction (Lentz's method;
Abramowitz and Stegun 26.5.8 and 26.7.1). Agrees with printed tables to all their digits.
"""

from collections.abc import Sequence
from math import exp, inf, isfinite, lgamma, log, log1p

from prefloop.errors import ConfigError

_STEPS = 300
_EXACT = 1e-15
_TINY = 1e-300


def two_sided_p(t: float, freedom: float) -> float:
    """Return the probability that |T| ≥ |t|.

    Args:
        t: the statistic; infinite gives 0.
        freedom: degrees of freedom, > 0; infinite gives the normal distribution's value to about 1e-6.

    Raises:
        ConfigError: degrees of freedom not above 0.

    Example:
        >>> round(two_sided_p(4.302653, 2), 6)
        0.05

    """
    if not freedom > 0:
        raise ConfigError(f"student: degrees of freedom must be > 0, got {freedom}")
    if not isfinite(t):
        return 0.0
    freedom = min(freedom, 1e7)
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def critical(level: float, freedom: float) -> float:
    """Return t with P(|T| ≤ t) = level, by bisection.

    Args:
        level: coverage, in (0, 1).
        freedom: degrees of freedom, > 0.

    Raises:
        ConfigError: a level or degrees of freedom out of range.

    Example:
        >>> round(critical(0.95, 10), 3)
        2.228

    """
    if not 0 < level < 1:
        raise ConfigError(f"student: level must be in (0, 1), got {level}")
    low, high = 0.0, 1.0
    while two_sided_p(high, freedom) > 1 - level:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, freedom) > 1 - level else (low, middle)
    return (low + high) / 2


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down method (1979, Scand. J. Stat. 6, 65–70).

    The chance to call any difference real that is not there stays below α, whatever their dependence, if those with
    a corrected value below α are called real.

    Raises:
        ConfigError: a value that is NaN or outside [0, 1].

    Example:
        >>> holm([0.01, 0.04, 0.03, 0.005])
        [0.03, 0.06, 0.06, 0.02]

    """
    if any(not 0 <= p <= 1 for p in p_values):
        raise ConfigError(f"holm: p-values must be in [0, 1], got {list(p_values)}")
    corrected, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = floor
    return corrected


def satterthwaite(variances: Sequence[float], freedoms: Sequence[float]) -> float:
    """Return the degrees of freedom of a sum of independent variances (1946, Biometrics Bull. 2, 110–114).

    Infinite where all variances are 0.
    """
    below = sum(v * v / f for v, f in zip(variances, freedoms, strict=True) if v > 0)
    return sum(variances) ** 2 / below if below > 0 else inf


def _incomplete_beta(a: float, b: float, x: float) -> float:
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _incomplete_beta(b, a, 1.0 - x)
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x)) / a
    return min(1.0, front * _fraction(a, b, x))


def _fraction(a: float, b: float, x: float) -> float:
    c, d = 1.0, 1.0 / _away(1.0 - (a + b) * x / (a + 1))
    found = d
    for m in range(1, _STEPS):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / _away(1.0 + term * d)
            c = _away(1.0 + term / c)
            found *= c * d
        if abs(c * d - 1.0) < _EXACT:
            break
    return found


def _away(value: float) -> float:
    """Return `value`, moved away from 0, by which it is about to be divided."""
    return value if abs(value) > _TINY else _TINY
