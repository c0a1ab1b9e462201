"""How far a judge can be trusted: agreement with people, with another judge and with itself, and its biases.

A verdict names the better of two completions, by `first` or `second` of `options` (default 1 and 2: the completion, not
the place where it was shown), or is `TIE`, or is `None` where the judge gave none. Shares, rates and biases are in %
(0–100) or percentage points, kappas are numbers ≤ 1. Intervals are over items; where a prompt has several, `clusters`
gives the prompt of each item: then intervals are over prompts, `n` counts them, and each weighs as much as the others
(in a kappa: as much as it has items).

Kappa: J. Cohen (1960, Educ. Psychol. Meas. 20(1), 37–46); J. L. Fleiss (1971, Psychol. Bull. 76(5), 378–382). Both
compare agreement with what the raters' habits alone would give: 0 is chance, 1 is perfect.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from prefloop.errors import ConfigError, DataError
from prefloop.evaluate.bootstrap import FloatArray, paired_bootstrap
from prefloop.evaluate.heldout import FEW_PROMPTS
from prefloop.evaluate.win_rate import PERCENT, prompt_means, unit_values
from prefloop.rows import Metric

TIE = "tie"
"""The verdict that neither completion is better."""

OPTIONS: tuple[Hashable, Hashable] = (1, 2)

_SPAN = (-100.0, 100.0)

Verdicts = Sequence[Hashable]
Clusters = Sequence[Hashable] | None


@dataclass(frozen=True, slots=True)
class OrderReport:
    """What a judge that saw every pair in both orders got right.

    `accuracy`: right verdicts, averaged over both orders, %. `both_right`: items right in both orders, %. `same`: items
    with the same verdict in both orders, %; `None` counts as a verdict. `kappa`: Cohen's, of the two orders, of "is it
    the first option?", so a tie or no verdict counts as no. These are the statistics that LLMBar publishes (Z. Zeng et
    al. 2023, arXiv 2310.07641; that no verdict counts as no was found by recomputing their files). `flips`: see
    `order_flip_rate`. `no_verdict`: verdicts that are `None`, in both orders together.
    """

    accuracy: Metric
    both_right: Metric
    same: Metric
    kappa: Metric
    flips: Metric | None
    no_verdict: int


def both_orders(
    labels: Verdicts, ab: Verdicts, ba: Verdicts, *, options: tuple[Hashable, Hashable] = OPTIONS, seed: int = 0
) -> OrderReport:
    """Return the statistics of verdicts given in both orders.

    Args:
        labels: which option is better, by people or by construction.
        ab: the judge's verdicts with the first option shown first.
        ba: its verdicts with the second option shown first, already mapped back to the options.
        options: what a verdict calls the two completions.
        seed: of the bootstrap.

    Raises:
        DataError: no items, lists of different lengths, or a verdict that is none of the options, `TIE` and `None`.

    """
    _checked([labels, ab, ba], options)
    right = [np.array([v == label for v, label in zip(side, labels, strict=True)], float) for side in (ab, ba)]
    same = np.array([a == b for a, b in zip(ab, ba, strict=True)], float)
    first = [[v == options[0] for v in side] for side in (ab, ba)]
    decided = any(a is not None and b is not None for a, b in zip(ab, ba, strict=True))
    return OrderReport(
        accuracy=_share((right[0] + right[1]) / 2, "right, both orders averaged", seed),
        both_right=_share(right[0] * right[1], "right in both orders", seed),
        same=_share(same, "same verdict in both orders, no verdict is a verdict", seed),
        kappa=cohen_kappa(*first, seed=seed),
        flips=order_flip_rate(ab, ba, options=options, seed=seed) if decided else None,
        no_verdict=sum(v is None for v in (*ab, *ba)),
    )


def accuracy(verdicts: Verdicts, labels: Verdicts, *, clusters: Clusters = None, seed: int = 0) -> Metric:
    """Return how many verdicts are the label, %; no verdict (`None`) is not right.

    Raises:
        DataError: no items, lists of different lengths, or an item without a label.

    Example:
        >>> accuracy([1, 2, None, 1], [1, 2, 2, 2]).value
        50.0

    """
    _paired([verdicts, labels])
    if any(label is None for label in labels):
        raise DataError("agreement: an item without a label cannot be right or wrong; leave it out")
    right = np.array([v == label for v, label in zip(verdicts, labels, strict=True)], float)
    return _share(prompt_means(right, clusters), "right verdicts", seed)


def cohen_kappa(first: Verdicts, second: Verdicts, *, clusters: Clusters = None, seed: int = 0) -> Metric:
    """Return Cohen's kappa of two raters over any categories; items that either left out (`None`) do not count.

    Raises:
        DataError: no items, lists of different lengths, or both raters gave one and the same category only.

    Example:
        >>> round(cohen_kappa([1, 1, 1, 2], [1, 1, 2, 2]).value, 3)
        0.5

    """
    _paired([first, second])
    kept = [place for place, pair in enumerate(zip(first, second, strict=True)) if None not in pair]
    given = _one_hot([(first[place], second[place]) for place in kept])  # [item rater category]
    agree = (given[:, 0] * given[:, 1]).sum(-1)
    where = None if clusters is None else [clusters[place] for place in kept]
    return _kappa(agree, (given[:, 0], given[:, 1]), "Cohen's kappa", seed, where)


def fleiss_kappa(ratings: Sequence[Verdicts], *, clusters: Clusters = None, seed: int = 0) -> Metric:
    """Return Fleiss' kappa of several raters, who need not be the same for each item.

    Args:
        ratings: for each item, the category that each of its raters gave; as many raters for each item.
        clusters: the prompt of each item. Default: each has a prompt of its own.
        seed: of the bootstrap.

    Raises:
        DataError: no items, fewer than two raters, a rating that is `None`, another number of raters for some item, or
            one category only.

    Example:
        >>> round(fleiss_kappa([[1, 1, 1], [2, 2, 2], [1, 2, 2]]).value, 3)
        0.55

    """
    raters = len(ratings[0]) if ratings else 0
    if raters < 2 or any(len(item) != raters or None in item for item in ratings):
        raise DataError(
            "agreement: Fleiss' kappa needs items with the same number of ratings each, two at least, none missing; "
            "for raters who left items out, give pairs of raters to cohen_kappa"
        )
    shares = _one_hot(ratings).mean(axis=1)  # [item category]
    agree = (raters * (shares**2).sum(-1) - 1) / (raters - 1)
    return _kappa(agree, (shares, shares), f"Fleiss' kappa, {raters} ratings an item", seed, clusters)


def order_flip_rate(
    ab: Verdicts,
    ba: Verdicts,
    *,
    options: tuple[Hashable, Hashable] = OPTIONS,
    clusters: Clusters = None,
    seed: int = 0,
) -> Metric:
    """Return for how many items the verdict changes with the order shown, %, of those judged in both orders.

    Arguments as in `both_orders`; a tie in one order only is a change.

    Raises:
        DataError: as `both_orders`, or no item judged in both orders.

    """
    _checked([ab, ba], options)
    decided, where = _decided(ab, ba, clusters)
    flips = np.array([a != b for a, b in decided], float)
    return _share(prompt_means(flips, where), "verdict changes with the order, of items judged in both", seed)


def position_bias(
    ab: Verdicts,
    ba: Verdicts,
    *,
    options: tuple[Hashable, Hashable] = OPTIONS,
    clusters: Clusters = None,
    seed: int = 0,
) -> Metric:
    """Return how much more than half of its wins the judge gives to what is shown first, points, −50 to 50.

    Every item counts in both orders, so which completion is better cancels; a tie is half a win. Items without a
    verdict in one of the orders do not count. Arguments as in `both_orders`.

    Raises:
        DataError: as `both_orders`, or no item judged in both orders.

    Example:
        >>> position_bias([1, 1, 1, 2], [2, 1, 2, 2]).value  # the first shown wins 6 of 8
        25.0

    """
    _checked([ab, ba], options)
    one, two = options
    decided, where = _decided(ab, ba, clusters)
    to_first = prompt_means(np.array([(_win(a, one) + _win(b, two)) / 2 for a, b in decided]), where)
    return _points(100 * to_first - 50, (-50.0, 50.0), "wins of the place shown first, less 50", seed)


def length_bias(
    preference: Sequence[float] | FloatArray,
    length: Sequence[float] | FloatArray,
    other_length: Sequence[float] | FloatArray,
    truth: Sequence[float] | FloatArray | None = None,
    *,
    clusters: Clusters = None,
    seed: int = 0,
) -> Metric:
    """Return how much more often the longer completion wins than it should, points.

    Items of equal length do not count.

    Args:
        preference: the judge's, for the first completion, in [0, 1].
        length: of the first completion.
        other_length: of the other one, in the same unit.
        truth: the preference of people, or of another judge, on the same items. Default: longer completions should win
            half; then a bias also appears where they are in truth better.
        clusters: the prompt of each item. Default: each has a prompt of its own.
        seed: of the bootstrap.

    Raises:
        DataError: lists of different lengths, a preference outside [0, 1], NaN, or no item with two lengths.

    """
    judged = unit_values(preference, "preference")
    sign = np.sign(_numbers(length, len(judged), "length") - _numbers(other_length, len(judged), "other_length"))
    should = np.full(len(judged), 0.5) if truth is None else _same(unit_values(truth, "truth"), len(judged))
    uneven = sign != 0
    excess = (100 * sign * (judged - should))[uneven]
    if not len(excess):
        raise DataError("agreement: no item has completions of different length, so there is no length bias to measure")
    if clusters is not None:
        excess = prompt_means(excess, [where for where, kept in zip(clusters, uneven, strict=True) if kept])
    against = "half" if truth is None else "the truth given"
    return _points(excess, _SPAN if truth is not None else (-50.0, 50.0), f"wins of the longer, less {against}", seed)


def self_preference(
    preference: Sequence[float] | FloatArray,
    truth: Sequence[float] | FloatArray,
    *,
    clusters: Clusters = None,
    seed: int = 0,
) -> Metric:
    """Return how much more a judge prefers its own completions than others do, points.

    Args:
        preference: the judge's, in [0, 1], for the completion of the judge's own model.
        truth: for the same completions, by people or by a judge of another model.
        clusters: the prompt of each item. Default: each has a prompt of its own.
        seed: of the bootstrap.

    Raises:
        DataError: lists of different lengths or a preference outside [0, 1].

    """
    judged = unit_values(preference, "preference")
    excess = 100 * (judged - _same(unit_values(truth, "truth"), len(judged)))
    means = prompt_means(excess, clusters)
    return _points(means, _SPAN, "preference for its own completions, less that of others", seed)


def score_saturation(
    scores: Sequence[float | None],
    top: float,
    *,
    clusters: Clusters = None,
    seed: int = 0,
) -> Metric:
    """Return how many scores are the best that the judge can give, %: there it no longer tells good from better.

    Args:
        scores: of completions; `None`, no verdict, does not count.
        top: the best score.
        clusters: the prompt of each completion. Default: each has a prompt of its own.
        seed: of the bootstrap.

    Raises:
        DataError: no score, NaN, one above `top`, or not one prompt for each.

    """
    if clusters is not None and len(clusters) != len(scores):
        raise DataError(f"agreement: {len(scores)} scores have {len(clusters)} prompts; give one for each")
    kept = [i for i, score in enumerate(scores) if score is not None]
    values = np.array([scores[i] for i in kept], dtype=np.float64)
    if not len(values) or not (values <= top).all():
        raise DataError(f"agreement: needs at least one score, all of them numbers of at most top = {top:g}")
    means = prompt_means((values == top).astype(np.float64), None if clusters is None else [clusters[i] for i in kept])
    return _share(means, f"scores at {top:g}, the best", seed)


def _share(values: FloatArray, what: str, seed: int) -> Metric:
    return _points(100 * values, PERCENT, what, seed, "%")


def _points(values: FloatArray, bounds: tuple[float, float], what: str, seed: int, unit: str = "points") -> Metric:
    found = paired_bootstrap(values, seed=seed, bounds=bounds)
    return Metric(found.value, found.low, found.high, found.n, unit, _few(what, found.n))


def _few(what: str, n: int) -> str:
    return what if n >= FEW_PROMPTS else f"{what}; only {n} items: the interval is wide and its coverage uncertain"


def _one_hot(ratings: Sequence[Verdicts]) -> FloatArray:
    """Return `[item rater category]`, 1 where the rater gave the item that category."""
    places: dict[Hashable, int] = {}
    codes = [[places.setdefault(v, len(places)) for v in item] for item in ratings]
    if len(places) < 2:
        raise DataError(
            f"agreement: kappa needs two categories at least, got {len(places)} over {len(ratings)} items that all "
            "raters judged; with one, agreement cannot be told from habit"
        )
    given: FloatArray = np.eye(len(places))[np.array(codes)]
    return given


def _kappa(
    agree: FloatArray, raters: tuple[FloatArray, FloatArray], what: str, seed: int, clusters: Clusters
) -> Metric:
    """Return (agreement − chance) / (1 − chance) over items; chance is Σ_k mean `raters[0]` × mean `raters[1]`.

    `agree` is `[item]`, a rater `[item category]`. Sums for each prompt are what is resampled.
    """
    where = _places(len(agree), clusters)
    items = np.bincount(where).astype(np.float64)  # [prompt]
    agreed = np.bincount(where, agree)
    one, two = ([np.bincount(where, column) for column in rater.T] for rater in raters)

    def kappa(prompts: FloatArray) -> FloatArray:
        drawn = prompts.astype(np.intp)
        count = items[drawn].sum(-1)
        shares = ((a[drawn].sum(-1) / count, b[drawn].sum(-1) / count) for a, b in zip(one, two, strict=True))
        room = 1 - np.asarray(sum(a * b for a, b in shares))
        # A resample in which habit explains everything shows no agreement beyond it: 0.
        beyond = (agreed[drawn].sum(-1) / count - 1 + room) / np.maximum(room, 1e-12)
        found: FloatArray = np.where(room > 1e-12, beyond, 0.0)
        return found

    interval = paired_bootstrap(np.arange(len(items), dtype=np.float64), kappa, seed=seed)
    return Metric(interval.value, interval.low, interval.high, interval.n, "kappa", _few(what, interval.n))


def _places(count: int, clusters: Clusters) -> NDArray[np.intp]:
    """Return the number of each item's prompt, in order of first appearance."""
    if clusters is None:
        return np.arange(count)
    if len(clusters) != count:
        raise DataError(f"agreement: {count} items have {len(clusters)} prompts; give one for each")
    places: dict[Hashable, int] = {}
    return np.array([places.setdefault(name, len(places)) for name in clusters])


def _paired(lists: Sequence[Verdicts]) -> None:
    sizes = [len(one) for one in lists]
    if len(set(sizes)) != 1 or not sizes[0]:
        raise DataError(f"agreement: needs lists of the same items, at least one, got {' and '.join(map(str, sizes))}")


def _checked(lists: Sequence[Verdicts], options: tuple[Hashable, Hashable]) -> None:
    if len(set(options)) != 2 or None in options or TIE in options:
        raise ConfigError(f"agreement: options must be two names, neither None nor {TIE!r}, got {options}")
    _paired(lists)
    known = {*options, TIE, None}
    for verdicts in lists:
        for item, verdict in enumerate(verdicts):
            if verdict not in known:
                raise DataError(
                    f"agreement: item {item} has verdict {verdict!r}; it must be {options[0]!r}, {options[1]!r}, "
                    f"{TIE!r} or None"
                )


def _decided(ab: Verdicts, ba: Verdicts, clusters: Clusters) -> tuple[list[tuple[Hashable, Hashable]], Clusters]:
    """Return the items with a verdict in both orders, and their prompts."""
    kept = [place for place, pair in enumerate(zip(ab, ba, strict=True)) if None not in pair]
    if not kept:
        raise DataError("agreement: no item has a verdict in both orders; judge the pairs in both orders first")
    if clusters is not None and len(clusters) != len(ab):
        raise DataError(f"agreement: {len(ab)} items have {len(clusters)} prompts; give one for each")
    return [(ab[i], ba[i]) for i in kept], None if clusters is None else [clusters[i] for i in kept]


def _win(verdict: Hashable, option: Hashable) -> float:
    return 0.5 if verdict == TIE else float(verdict == option)


def _numbers(values: Sequence[float] | FloatArray, n: int, what: str) -> FloatArray:
    array = _same(np.asarray(values, dtype=np.float64), n)
    if not (np.abs(array) < inf).all():
        raise DataError(f"agreement: {what} must be finite")
    return array


def _same(values: FloatArray, n: int) -> FloatArray:
    if values.shape != (n,):
        raise DataError(f"agreement: needs one number for each of {n} items, got {values.shape}")
    return values
