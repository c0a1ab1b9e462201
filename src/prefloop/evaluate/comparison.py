"""Several policies on the same held-out prompts, each trained with several seeds: who is better than whom.

A method is not one policy but what training gives: another seed gives another policy. So there are two sources of
chance, prompts and seeds. Prompts are shared by all policies (comparisons are within a prompt), seeds are each
method's own. With w[a, b, p] the preference for the policy of seed a over the rival's of seed b on prompt p,

    Var(mean w) ≈ s²_A / S_A + s²_B / S_B + s²_P / n,

s² the variances of w's means over everything but seed a, seed b, and prompt p: the sum of the one-way variances of
crossed random effects. What is left over is counted in each, so the sum is rather too large. Degrees of freedom are
Satterthwaite's. With one seed its terms are missing, and the interval says nothing of another training run.

p-values of all pairs are corrected together by Holm's method: a difference is called real where the corrected value is
below 5 %. Ranks are Bradley-Terry's on all pairs, as Elo; their intervals are jackknives over the same two sources.

Simulated sets of 4 equal methods with 3 seeds and 40 prompts, with variation between seeds: see
`tests/unit/test_comparison.py`, which holds the share of sets with a false difference to the promised 5 %.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import inf, sqrt

import numpy as np

from prefloop.errors import DataError
from prefloop.evaluate.bootstrap import LEVEL, FloatArray
from prefloop.evaluate.bradley_terry import bradley_terry, elo_from_strengths
from prefloop.evaluate.student import critical, holm, satterthwaite, two_sided_p
from prefloop.rows import Metric

Scores = Mapping[str, Sequence[float]]
"""One policy's scores on held-out prompts, by prompt id: one for each of its completions."""
Arms = Mapping[str, Sequence[Scores]]
"""By method, the scores of each seed's policy."""

MOST_RANKED = 12
"""Beyond this many methods only the comparisons with `against` are made, and there is no Elo."""
START = "start"
"""Name of the policy that every run began with, where it takes part."""

_ALPHA = 1 - LEVEL
_EVEN = 0.5
_BLOCKS = 100  # groups of prompts that the jackknife leaves out, at most


@dataclass(frozen=True, slots=True)
class Duel:
    """Two methods: the win rate of `one` over `other`, its p-value against 50 %, and the one corrected by Holm."""

    one: str
    other: str
    win_rate: Metric
    p: float
    p_holm: float

    @property
    def real(self) -> bool:
        """Whether the difference is called real: the corrected p-value is below 5 %."""
        return self.p_holm < _ALPHA

    @property
    def better(self) -> str | None:
        """The method that is better, if the difference is real."""
        return None if not self.real else self.one if self.win_rate.value > 50 else self.other


@dataclass(frozen=True, slots=True)
class Standing:
    """A method's place: mean score, win rate over the start, and Elo, `None` where it has no finite value."""

    name: str
    seeds: int
    score: Metric
    versus_start: Metric | None
    elo: Metric | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """`standings` from best to worst, `duels` of each two, how many prompts, and what a reader should know."""

    standings: tuple[Standing, ...]
    duels: tuple[Duel, ...]
    prompts: int
    notes: tuple[str, ...] = ()

    def duel(self, one: str, other: str) -> Duel | None:
        """Return the comparison of two methods, whichever stands first; `None` if it was not made."""
        return next((d for d in self.duels if {d.one, d.other} == {one, other}), None)


def compare(arms: Arms, *, against: str = START, level: float = LEVEL) -> Comparison:
    """Compare methods by the scores that one judge gave their policies on the same prompts.

    Args:
        arms: two methods at least, each with a policy of at least one seed; all with the same prompts.
        against: the method whose win rates stand in the standings, where it takes part.
        level: coverage of intervals.

    Raises:
        DataError: fewer than two methods or prompts, prompts that differ, or a score that is NaN or infinite.

    """
    prompts = _checked(arms)
    names = list(arms)
    wins = {pair: _preference(arms[pair[0]], arms[pair[1]], prompts) for pair in combinations(names, 2)}
    all_pairs = len(names) <= MOST_RANKED
    tested = [pair for pair in wins if all_pairs or against in pair]
    found = [_estimate(wins[pair], level) for pair in tested]
    corrected = holm([p for _, p in found])
    duels = tuple(
        Duel(*pair, rate, p, p_holm) for pair, (rate, p), p_holm in zip(tested, found, corrected, strict=True)
    )
    elo, note = _elo(names, wins, level) if all_pairs else ({}, f"more than {MOST_RANKED} policies: no Elo")
    standings = [
        Standing(
            name, len(arms[name]), _score(arms[name], prompts, level), _versus(name, against, duels), elo.get(name)
        )
        for name in names
    ]
    totals = {name: _total(name, wins) for name in names}
    standings.sort(key=lambda s: -totals[s.name])
    return Comparison(tuple(standings), duels, len(prompts), (note,) if note else ())


def _checked(arms: Arms) -> list[str]:
    if len(arms) < 2 or not all(arms.values()):
        raise DataError("compare: needs two methods at least, each with the scores of at least one run")
    first = next(iter(arms.values()))[0]
    for name, seeds in arms.items():
        for scores in seeds:
            if scores.keys() != first.keys():
                raise DataError(
                    f"compare: {name} was measured on other prompts than the rest; only prompts that all of them have "
                    "can be compared"
                )
            bad = [p for p, values in scores.items() if not len(values) or not np.isfinite(values).all()]
            if bad:
                raise DataError(
                    f"compare: {name} has no score, or one that is NaN or infinite, for prompt {bad[0]} ({len(bad)} "
                    "such); a judge must return a finite number. Leave such prompts out of all methods"
                )
    if len(first) < 2:
        raise DataError(
            f"compare: {len(first)} prompts; one prompt says nothing of how prompts differ, give 20 or more"
        )
    return sorted(first)


def _preference(ours: Sequence[Scores], theirs: Sequence[Scores], prompts: Sequence[str]) -> FloatArray:
    """Return `[our seed, their seed, prompt]`: the share of pairs of completions that we win, ties half."""
    found = np.empty((len(ours), len(theirs), len(prompts)))
    for k, prompt in enumerate(prompts):
        rivals = [np.asarray(other[prompt], np.float64) for other in theirs]
        for i, one in enumerate(ours):
            values = np.asarray(one[prompt], np.float64)[:, None]
            found[i, :, k] = [float(((values > r) + 0.5 * (values == r)).mean()) for r in rivals]
    return found


def _estimate(wins: FloatArray, level: float) -> tuple[Metric, float]:
    """Return the win rate in % with its interval, and the p-value of 50 %."""
    value = float(wins.mean())
    variances, freedoms = crossed_variances(wins)
    error, freedom = sqrt(sum(variances)), satterthwaite(variances, freedoms)
    if error == 0:
        # All prompts alike, so that nothing is known of their spread: the rule of three (at 95 %, 3 / n) bounds it.
        error, freedom = (1.5 / wins.shape[-1] if value != _EVEN else 0.0), inf
    p = two_sided_p((value - _EVEN) / error, freedom) if error else 1.0
    reach = critical(level, freedom) * error if error else 0.0
    low, high = 100 * max(0.0, value - reach), 100 * min(1.0, value + reach)
    seeds = "seeds and prompts" if max(wins.shape[:2]) > 1 else "prompts only (one seed)"
    return Metric(100 * value, low, high, wins.shape[-1], "%", f"ties half, t interval over {seeds}"), p


def crossed_variances(values: FloatArray) -> tuple[list[float], list[float]]:
    """Return for each axis with two levels or more the variance that it gives the mean, and degrees of freedom."""
    variances, freedoms = [], []
    for axis, size in enumerate(values.shape):
        if size > 1:
            means = values.mean(axis=tuple(a for a in range(values.ndim) if a != axis))
            variances.append(float(means.var(ddof=1)) / size)
            freedoms.append(size - 1.0)
    return variances, freedoms


def _score(seeds: Sequence[Scores], prompts: Sequence[str], level: float) -> Metric:
    values = np.array([[float(np.mean(scores[p])) for p in prompts] for scores in seeds])
    return mean_metric(values, "score", level)


def mean_metric(values: FloatArray, unit: str, level: float = LEVEL) -> Metric:
    """Return the mean of `[seed, prompt]` values with its interval over both."""
    variances, freedoms = crossed_variances(values)
    freedom = satterthwaite(variances, freedoms)
    reach = critical(level, freedom) * sqrt(sum(variances)) if variances else inf
    value = float(values.mean())
    return Metric(
        value, value - reach, value + reach, values.shape[-1], unit, "mean, t interval over seeds and prompts"
    )


def _versus(name: str, against: str, duels: Sequence[Duel]) -> Metric | None:
    for duel in duels:
        if (duel.one, duel.other) == (name, against):
            return duel.win_rate
        if (duel.one, duel.other) == (against, name):
            return turned(duel.win_rate)
    return None


def turned(rate: Metric) -> Metric:
    """Return a win rate as the other side sees it."""
    return Metric(100 - rate.value, 100 - rate.high, 100 - rate.low, rate.n, rate.unit, rate.estimator)


def _total(name: str, wins: Mapping[tuple[str, str], FloatArray]) -> float:
    """Return the mean preference over all rivals: on all pairs, it ranks as Bradley-Terry does."""
    own = [
        float(w.mean()) if name == one else 1 - float(w.mean()) for (one, two), w in wins.items() if name in (one, two)
    ]
    return sum(own) / len(own)


def _elo(
    names: Sequence[str], wins: Mapping[tuple[str, str], FloatArray], level: float
) -> tuple[dict[str, Metric], str]:
    """Return Elo by method; none, and why, where some method has no finite one."""
    try:
        value = _ratings(names, wins)
        parts = _jackknifed(names, wins)
    except DataError as error:
        return {}, f"no Elo: {error}"
    n = next(iter(wins.values())).shape[-1]
    found = {}
    for index, name in enumerate(names):
        variances = [(len(part) - 1) / len(part) * float(((part - part.mean(0)) ** 2).sum(0)[index]) for part in parts]
        reach = sqrt(sum(variances)) * critical(level, satterthwaite(variances, [len(part) - 1 for part in parts]))
        at = float(value[index])
        found[name] = Metric(at, at - reach, at + reach, n, "Elo", "Bradley-Terry, ties half, jackknife")
    return found, ""


def _ratings(names: Sequence[str], wins: Mapping[tuple[str, str], FloatArray]) -> FloatArray:
    won = np.zeros((1, len(names), len(names)))
    for (one, two), preference in wins.items():
        i, j = names.index(one), names.index(two)
        won[0, i, j] = preference.mean() * preference.shape[-1]
        won[0, j, i] = (1 - preference.mean()) * preference.shape[-1]
    return np.array([elo.value for elo in elo_from_strengths(bradley_terry(won, resamples=1))])


def _jackknifed(names: Sequence[str], wins: Mapping[tuple[str, str], FloatArray]) -> list[FloatArray]:
    """Return ratings `[left out, method]`: without each block of prompts, and without each seed of each method."""
    n = next(iter(wins.values())).shape[-1]
    blocks = np.array_split(np.arange(n), min(n, _BLOCKS))
    parts = [np.array([_ratings(names, {k: np.delete(w, block, 2) for k, w in wins.items()}) for block in blocks])]
    for name in names:
        axis_of = {pair: pair.index(name) for pair in wins if name in pair}
        seeds = next(wins[pair].shape[axis] for pair, axis in axis_of.items())
        if seeds > 1:
            without = [
                {k: np.delete(w, s, axis_of[k]) if k in axis_of else w for k, w in wins.items()} for s in range(seeds)
            ]
            parts.append(np.array([_ratings(names, rest) for rest in without]))
    return parts


@dataclass(frozen=True, slots=True)
class Sweep:
    """How robust a method is over settings: win rates over the start in %, and the share that beat it for sure."""

    name: str
    settings: int
    best: str
    best_rate: float
    quartiles: tuple[float, float, float]
    beat_start: float


def sweep(name: str, rates: Mapping[str, float], beaten: Mapping[str, bool]) -> Sweep:
    """Return best, quartiles and the share of settings that beat the start.

    Args:
        name: of the method.
        rates: by setting, the win rate over the start in %; 0 for one that diverged.
        beaten: by setting, whether it is better than the start by the corrected test.

    Raises:
        DataError: no settings.

    Example:
        >>> found = sweep("dpo", {"a": 40.0, "b": 60.0, "c": 50.0}, {"a": False, "b": True, "c": False})
        >>> found.best, found.quartiles
        ('b', (45.0, 50.0, 55.0))

    """
    if not rates:
        raise DataError(f"sweep: {name} has no setting to look at")
    best = max(rates, key=lambda setting: rates[setting])
    low, middle, high = (float(q) for q in np.quantile(list(rates.values()), [0.25, 0.5, 0.75]))
    share = sum(beaten.values()) / len(rates)
    return Sweep(name, len(rates), best, rates[best], (low, middle, high), share)
