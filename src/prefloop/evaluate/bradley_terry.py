"""Strengths of many policies from pairwise wins: Bradley-Terry, and Davidson's extension to ties; Elo on top.

Bradley and Terry (1952, Biometrika 39, 324–345): P(i beats j) = 1 / (1 + exp(s_j − s_i)), s the strengths, in nats.
Ties are either split, half a win for each side, or modelled as R. Davidson does (1970, JASA 65, 317–328, cited from
memory): P(tie) ∝ ν √(e^{s_i} e^{s_j}), with ν fitted too. The likelihood is concave in (s, log ν), so Newton's method
finds the one optimum. Only differences of strengths mean something: their mean is set to 0.

A finite optimum exists where each policy can be reached from each other one along "did not always lose to" (Ford 1957,
Amer. Math. Monthly 64(8), 28–33): a policy that won everything, or two groups that never met, have none. Davidson's
model also needs a tie, and wins that go in a circle (i beat j and j beat i will do): without one, larger differences
and ever more ties explain the data better and better. (Sufficient; derived here, not taken from the paper.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log
from typing import Any

import numpy as np

from prefloop.errors import ConfigError, DataError
from prefloop.evaluate.bootstrap import LEVEL, FloatArray, Interval

RESAMPLES = 500
TIE_MODELS = ("half", "davidson")

_STEPS = 200
_LONGEST = 2.0  # nats; Newton may overshoot where the likelihood is flat
_EXACT = 1e-10


@dataclass(frozen=True, slots=True)
class Strengths:
    """Strengths of policies in nats, mean 0, in the order of the matrix. `n` of an interval counts what was resampled.

    `log_tie` is log ν of Davidson's model; `None` where ties were split or there were none. `estimator` says which.
    """

    strengths: tuple[Interval, ...]
    log_tie: float | None
    estimator: str


def bradley_terry(
    wins: Sequence[Any] | FloatArray,
    ties: Sequence[Any] | FloatArray | None = None,
    *,
    tie_model: str = "half",
    level: float = LEVEL,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Strengths:
    """Return the maximum-likelihood strengths with bootstrap percentile intervals.

    Args:
        wins: `[policy policy]`, entry (i, j): how often i beat j. Or `[prompt policy policy]`: then prompts are
            resampled, as they should be where one prompt has several comparisons; else single comparisons are.
        ties: the same shape, symmetric: entry (i, j) = entry (j, i) counts the ties of i and j. Default: none.
        tie_model: `half` or `davidson`, see the module.
        level: coverage of the intervals, in (0, 1).
        seed: of the bootstrap.
        resamples: of the bootstrap. One without a finite optimum is left out; where more than (1 − level) / 2 of them
            have none, the intervals are −∞ to ∞.

    Raises:
        ConfigError: another tie model.
        DataError: a shape, count or diagonal that cannot be, counts that are not whole (in `[policy policy]`), or
            no finite optimum.

    Example:
        >>> found = bradley_terry([[0, 3], [1, 0]])
        >>> round(found.strengths[0].value - found.strengths[1].value, 4)  # log 3
        1.0986

    """
    if tie_model not in TIE_MODELS:
        raise ConfigError(f"bradley_terry: tie_model must be one of {', '.join(TIE_MODELS)}, got {tie_model!r}")
    won, tied = _checked(wins, ties)
    total_won, total_tied = (a.sum(0, keepdims=True) for a in (won, tied))
    davidson = tie_model == "davidson" and float(total_tied.sum()) > 0
    if not _solvable(total_won, total_tied, davidson)[0]:
        why = ", or no wins go in a circle (tie_model half does not need that)" if davidson else ""
        raise DataError(
            "bradley_terry: there is no finite optimum: a policy, or a group of them, won or lost everything against "
            f"the rest, or never met it{why}; leave such policies out, or compare them on more prompts"
        )
    value, log_tie = (a[0] for a in _fit(total_won, total_tied, davidson))
    drawn_won, drawn_tied = _draw(won, tied, np.random.default_rng(seed), resamples)
    good = _solvable(drawn_won, drawn_tied, davidson)
    ends = np.tile([[-inf], [inf]], (1, len(value)))
    tail = (1 - level) / 2
    if good.mean() >= 1 - tail:
        ends = np.quantile(_fit(drawn_won[good], drawn_tied[good], davidson)[0], [tail, 1 - tail], axis=0)
    n = len(won) if np.ndim(wins) == 3 else int((total_won + total_tied / 2).sum())
    unit = "prompts" if np.ndim(wins) == 3 else "comparisons"
    return Strengths(
        tuple(Interval(float(v), float(low), float(high), n) for v, low, high in zip(value, *ends, strict=True)),
        float(log_tie) if davidson else None,
        f"Bradley-Terry, ties {'by Davidson' if davidson else 'half'}, bootstrap over {unit}",
    )


def elo_from_strengths(
    strengths: Strengths | Sequence[float] | FloatArray, *, centre: float = 1000.0, scale: float = 400.0
) -> tuple[Interval, ...]:
    """Return Elo ratings: 10 to 1 odds are `scale` points, and the mean rating is `centre`.

    Args:
        strengths: of `bradley_terry`, or numbers in nats (then there are no intervals); adding a constant to all
            changes nothing.
        centre: mean rating, in points. Default 1000, where chess-like ratings of chat models start.
        scale: points for odds of 10 to 1, > 0. Default 400, as in chess.

    Raises:
        ConfigError: a scale that is not above 0.
        DataError: no strengths, or one that is NaN or infinite.

    Example:
        >>> [round(elo.value) for elo in elo_from_strengths([0.0, 2.302585093])]
        [800, 1200]

    """
    if not scale > 0:
        raise ConfigError(f"elo: scale must be > 0, got {scale}")
    if isinstance(strengths, Strengths):
        given = strengths.strengths
    else:
        given = tuple(Interval(float(s), -inf, inf, 0) for s in strengths)
    values = np.array([s.value for s in given])
    if not len(values) or not np.isfinite(values).all():
        raise DataError("elo: needs a finite strength of each of at least one policy")
    slope, middle = scale / log(10), float(values.mean())
    places = [tuple(centre + slope * (x - middle) for x in (s.value, s.low, s.high)) for s in given]
    return tuple(Interval(value, low, high, s.n) for (value, low, high), s in zip(places, given, strict=True))


def _checked(wins: Any, ties: Any) -> tuple[FloatArray, FloatArray]:
    """Return wins and ties as `[prompt policy policy]`; a plain matrix becomes one prompt."""
    won = np.asarray(wins, dtype=np.float64)
    tied = np.zeros_like(won) if ties is None else np.asarray(ties, dtype=np.float64)
    if won.ndim not in (2, 3) or won.shape[-1] != won.shape[-2] or won.shape[-1] < 2 or tied.shape != won.shape:
        raise DataError(
            "bradley_terry: wins and ties must be [policy policy] or [prompt policy policy] with at least 2 policies, "
            f"got {won.shape} and {tied.shape}"
        )
    for name, counts in (("wins", won), ("ties", tied)):
        if not (np.isfinite(counts).all() and (counts >= 0).all()):
            raise DataError(f"bradley_terry: {name} must be finite and ≥ 0")
        if np.diagonal(counts, axis1=-2, axis2=-1).any():
            raise DataError(f"bradley_terry: {name} of a policy against itself must be 0")
        if counts.ndim == 2 and (counts != np.round(counts)).any():
            raise DataError(
                f"bradley_terry: {name} must be whole numbers, for single comparisons are resampled; give ties as "
                "ties, or one matrix for each prompt"
            )
    if (tied != np.swapaxes(tied, -1, -2)).any():
        raise DataError("bradley_terry: ties must be symmetric, entry (i, j) = entry (j, i)")
    return (won[None], tied[None]) if won.ndim == 2 else (won, tied)


def _draw(
    won: FloatArray, tied: FloatArray, generator: np.random.Generator, resamples: int
) -> tuple[FloatArray, FloatArray]:
    """Return `[resample policy policy]` wins and ties: of prompts drawn anew; for one matrix, of comparisons."""
    n, size = len(won), won.shape[-1]
    if n > 1:
        counts = generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
        return tuple((counts @ a.reshape(n, -1)).reshape(-1, size, size) for a in (won, tied))  # type: ignore[return-value]
    new_won, new_tied = np.zeros((resamples, size, size)), np.zeros((resamples, size, size))
    for i in range(size):
        for j in range(i + 1, size):
            outcomes = np.array([won[0, i, j], won[0, j, i], tied[0, i, j]])
            total = outcomes.sum()
            if total:
                drawn = generator.multinomial(int(total), outcomes / total, size=resamples)
                new_won[:, i, j], new_won[:, j, i] = drawn[:, 0], drawn[:, 1]
                new_tied[:, i, j] = new_tied[:, j, i] = drawn[:, 2]
    return new_won, new_tied


def _solvable(won: FloatArray, tied: FloatArray, davidson: bool) -> Any:
    """Return for each `[policy policy]` whether a finite optimum is sure to exist, see the module."""
    everyone = _reached(won + tied) | np.eye(won.shape[-1], dtype=bool)
    connected = everyone.all((-1, -2))
    if davidson:
        in_circle = np.diagonal(_reached(won), axis1=-2, axis2=-1).any(-1)
        return connected & in_circle & (tied.sum((1, 2)) > 0)
    return connected


def _reached(counts: FloatArray) -> Any:
    """Return for each `[policy policy]` who is reached from whom in one step or more along counts above 0."""
    reached = counts > 0
    for _ in range(counts.shape[-1].bit_length()):
        reached = reached | (reached.astype(np.float64) @ reached > 0)
    return reached


def _fit(won: FloatArray, tied: FloatArray, davidson: bool) -> tuple[FloatArray, FloatArray]:
    """Return strengths `[resample policy]` and log ν `[resample]` by Newton's method, all resamples at once."""
    points = won + tied / 2
    games = won + np.swapaxes(won, 1, 2) + tied
    size = won.shape[-1]
    at = np.zeros((len(won), size + davidson))
    for _ in range(_STEPS):
        slope, curvature = _derivatives(at, points, games, tied, davidson)
        step = np.linalg.solve(curvature, slope[..., None])[..., 0]
        longest = np.abs(step).max(axis=1, keepdims=True)
        at = at + step * np.minimum(1.0, _LONGEST / np.maximum(longest, _EXACT))
        if float(longest.max()) < _EXACT:
            break
    else:
        raise DataError("bradley_terry: did not converge; some policies hardly ever win or lose, leave them out")
    return at[:, :size], at[:, size] if davidson else np.full(len(won), -inf)


def _derivatives(
    at: FloatArray, points: FloatArray, games: FloatArray, tied: FloatArray, davidson: bool
) -> tuple[FloatArray, FloatArray]:
    """Return the log-likelihood's slope and minus its second derivative, the strengths' mean held."""
    size = points.shape[-1]
    half = (at[:, :size, None] - at[:, None, :size]) / 2
    # Outcome of a game: +1, 0, −1; a win adds one point, a tie half a point.
    if davidson:
        tie = np.exp(at[:, size])[:, None, None]
        total = np.exp(half) + np.exp(-half) + tie
        gain, p_tie = (np.exp(half) - np.exp(-half)) / total, tie / total
    else:
        gain, p_tie = np.tanh(half), np.zeros_like(half)
    spread = games * (1 - p_tie - gain**2) / 4
    slope = (points - games * (1 + gain) / 2).sum(-1)
    curvature = np.eye(size) * spread.sum(-1)[:, :, None] - spread + 1.0 / size
    if not davidson:
        return slope, curvature
    cross = -(games * gain * p_tie).sum(-1) / 2
    own = (games * p_tie * (1 - p_tie)).sum((1, 2)) / 2
    slope = np.concatenate([slope, (tied - games * p_tie).sum((1, 2))[:, None] / 2], axis=1)
    top = np.concatenate([curvature, cross[:, :, None]], axis=2)
    bottom = np.concatenate([cross, own[:, None]], axis=1)
    return slope, np.concatenate([top, bottom[:, None, :]], axis=1)
