"""What a run's own data say of its judges: the numbers behind the report's section on trust, in JSON and in words.

Everything here is computed from verdicts that the run has already; `prefloop.trust` gathers them.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import isfinite
from typing import Any

from prefloop.errors import DataError
from prefloop.evaluate import agreement
from prefloop.evaluate.agreement import TIE
from prefloop.evaluate.summary import metric_json, metrics_from_json, with_interval
from prefloop.rows import JudgedGroup, Metric

JUDGE, SECOND, PEOPLE = "judge", "eval_judge", "people"
"""Raters: the judge of the training pairs, that of the evaluation, and what most people say."""
PERSON = "person:"
"""What the name of one person as a rater begins with."""
NAMES = {JUDGE: "the judge", SECOND: "the evaluation's judge", PEOPLE: "people (majority)"}
METRICS = {
    "answered": "completions with a score",
    "order_flips": "verdict changes with the order shown",
    "position_bias": "wins of the place shown first, above half",
    "length_bias": "wins of the longer completion, above half",
    "length_bias_vs_others": "wins of the longer completion, above what the others say",
    "self_preference": "preference for its own completions, above that of the others",
    "score_saturation": "scores that are the best possible",
}
"""Metrics of one judge, as the report calls them."""
MANY_PEOPLE = 5
"""People beyond which they are no longer compared two by two; Fleiss' kappa is there for all of them."""
FLIPS, SATURATED = 25.0, 50.0
"""Percent of order flips, and of best scores, from which on the report warns: our own choice."""


@dataclass(frozen=True, slots=True)
class Orders:
    """Verdicts on items that a judge saw in both orders: which completion won, 1 or 2 or `TIE`; `prompts` of items."""

    ab: list[Hashable] = field(default_factory=list)
    ba: list[Hashable] = field(default_factory=list)
    prompts: list[Hashable] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Item:
    """Two completions of one prompt that raters judged.

    `ratings` has 1, 2 or `TIE` for each rater. `lengths` are in characters. `own` is the side, 1 or 2, that the
    judge's own model wrote where it did not write the other; else `None`.
    """

    prompt: str
    lengths: tuple[int, int]
    own: int | None
    ratings: Mapping[str, Hashable]


@dataclass
class Scored:
    """What one judge said of groups of completions, added up group by group."""

    scores: list[float | None] = field(default_factory=list)
    score_prompts: list[Hashable] = field(default_factory=list)
    wins: list[float] = field(default_factory=list)
    lengths: list[tuple[int, int]] = field(default_factory=list)
    prompts: list[Hashable] = field(default_factory=list)

    def add(self, group: JudgedGroup) -> None:
        """Take in a group: its scores, and for every two different texts the judge's preference."""
        prompt = group.prompt.prompt_id
        self.scores += group.scores
        self.score_prompts += [prompt] * len(group.scores)
        for i, j in combinations(range(len(group.completions)), 2):
            wins = preference(group, i, j)
            one, two = group.completions[i].text, group.completions[j].text
            if wins is not None and one != two:
                self.wins.append(wins)
                self.lengths.append((len(one), len(two)))
                self.prompts.append(prompt)


def preference(group: JudgedGroup, i: int, j: int) -> float | None:
    """Return the judge's preference for completion i over j, in [0, 1]; from scores 1, ½ or 0; `None`: not known."""
    if group.win_prob is not None:
        return group.win_prob[i][j]
    one, two = group.scores[i], group.scores[j]
    return None if one is None or two is None else (1.0 if one > two else 0.5 if one == two else 0.0)


def judge_metrics(
    scored: Scored, orders: Orders, items: Sequence[Item], rater: str, top: float | None, seed: int
) -> dict[str, Metric]:
    """Return what can be measured of one judge, by name: see `METRICS`."""
    answered = [None if score is None else 1 for score in scored.scores]
    with_truth = [(item, truth) for item in items if rater in item.ratings and (truth := _others(item, rater))]
    wins = [_win(item.ratings[rater], 1) for item, _ in with_truth]
    truths = [truth[0] for _, truth in with_truth]
    prompts = [item.prompt for item, _ in with_truth]
    shorter, longer = [item.lengths[0] for item, _ in with_truth], [item.lengths[1] for item, _ in with_truth]
    own = [(item, truth) for item, truth in with_truth if item.own is not None] if rater == JUDGE else []
    asked: dict[str, Callable[[], Metric]] = {
        "answered": lambda: replace(
            agreement.accuracy(answered, [1] * len(answered), clusters=scored.score_prompts, seed=seed),
            estimator="completions with a score",
        ),
        "order_flips": lambda: agreement.order_flip_rate(orders.ab, orders.ba, clusters=orders.prompts, seed=seed),
        "position_bias": lambda: agreement.position_bias(orders.ab, orders.ba, clusters=orders.prompts, seed=seed),
        "length_bias": lambda: agreement.length_bias(
            scored.wins, *_columns(scored.lengths), clusters=scored.prompts, seed=seed
        ),
        "length_bias_vs_others": lambda: agreement.length_bias(
            wins, shorter, longer, truths, clusters=prompts, seed=seed
        ),
        "self_preference": lambda: agreement.self_preference(
            [_win(item.ratings[rater], item.own) for item, _ in own],
            [truth[0] if item.own == 1 else 1 - truth[0] for item, truth in own],
            clusters=[item.prompt for item, _ in own],
            seed=seed,
        ),
    }
    if top is not None:
        asked["score_saturation"] = lambda: agreement.score_saturation(
            scored.scores, top, clusters=scored.score_prompts, seed=seed
        )
    found = {name: _measured(measure) for name, measure in asked.items()}
    return {name: metric for name, metric in found.items() if metric is not None}


def compared(items: Sequence[Item], seed: int) -> list[dict[str, Any]]:
    """Return the agreement of every two raters who judged items together, and of all where there are three or more."""
    raters = sorted({name for item in items for name in item.ratings}, key=_rank)
    people = [name for name in raters if name.startswith(PERSON)]
    alone = [name for name in raters if name not in people]
    if len(people) == 1:
        alone = [name for name in alone if name != PEOPLE]  # one person is the majority
    # The majority is made of the people, so it is not compared with them.
    named = people if len(people) == 1 or len(people) <= MANY_PEOPLE else []
    pairs = [*combinations(alone, 2), *((a, b) for a in alone if a != PEOPLE for b in named), *combinations(named, 2)]
    found = [_pair(items, *pair, seed) for pair in pairs]
    independent = [name for name in raters if name != PEOPLE]
    if len(independent) > 2:
        found.append(_all(items, independent, seed))
    return [entry for entry in found if entry["items"]]


def _pair(items: Sequence[Item], one: str, two: str, seed: int) -> dict[str, Any]:
    both = [item for item in items if one in item.ratings and two in item.ratings]
    first, second = ([item.ratings[name] for item in both] for name in (one, two))
    prompts = [item.prompt for item in both]
    sided = [place for place, verdict in enumerate(second) if verdict != TIE]
    asked: dict[str, Callable[[], Metric]] = {
        "same": lambda: agreement.accuracy(first, second, clusters=prompts, seed=seed),
        "accuracy": lambda: agreement.accuracy(
            [first[i] for i in sided], [second[i] for i in sided], clusters=[prompts[i] for i in sided], seed=seed
        ),
        "kappa": lambda: agreement.cohen_kappa(first, second, clusters=prompts, seed=seed),
    }
    words = {"same": "same verdict, ties count as one", "accuracy": f"right, where {named(two)} takes a side"}
    return _entry([one, two], len(both), asked, words)


def _all(items: Sequence[Item], raters: Sequence[str], seed: int) -> dict[str, Any]:
    every = [item for item in items if all(name in item.ratings for name in raters)]
    ratings = [[item.ratings[name] for name in raters] for item in every]
    prompts = [item.prompt for item in every]
    return _entry(
        raters, len(every), {"kappa": lambda: agreement.fleiss_kappa(ratings, clusters=prompts, seed=seed)}, {}
    )


def _entry(
    raters: Sequence[str], items: int, asked: Mapping[str, Callable[[], Metric]], words: Mapping[str, str]
) -> dict[str, Any]:
    found = {name: _measured(measure) for name, measure in asked.items()} if items else {}
    metrics = {
        name: metric_json(replace(metric, estimator=words.get(name, metric.estimator)))
        for name, metric in found.items()
        if metric is not None
    }
    return {"raters": list(raters), "items": items, "metrics": metrics}


def _measured(measure: Callable[[], Metric]) -> Metric | None:
    """Return a metric, `None` where the data do not allow one: no item, or a kappa of one category only."""
    try:
        return measure()
    except DataError:
        return None


def named(rater: str) -> str:
    """Return what a rater is called."""
    return NAMES.get(rater, rater.removeprefix(PERSON))


def notes(judging: Mapping[str, Any]) -> list[str]:
    """Return what a reader should be told of the judges, each in a sentence; nothing that the intervals leave open."""
    return [*_judge_notes(judging, JUDGE), *_judge_notes(judging, SECOND), *_agreement_notes(judging)]


def _judge_notes(judging: Mapping[str, Any], rater: str) -> Iterator[str]:
    found = metrics_from_json(judging.get(rater, {}).get("metrics", {}))
    who = named(rater).capitalize()
    flips, place = found.get("order_flips"), found.get("position_bias")
    if flips is not None and flips.low > FLIPS:
        yield f"{who} goes by the place: the order shown changes the verdict in {with_interval(flips)} of the pairs."
    if place is not None and not place.low <= 0 <= place.high:
        which = "first" if place.value > 0 else "second"
        yield f"{who} prefers what is shown {which}: {_points(place)} above half. Both orders were asked."
    longer = found.get("length_bias_vs_others")
    if longer is not None and not longer.low <= 0 <= longer.high:
        size = "longer" if longer.value > 0 else "shorter"
        yield f"{who} prefers the {size} completion more than the others do, by {_points(longer)}."
    own = found.get("self_preference")
    if own is not None and own.low > 0:
        yield f"{who} prefers what its own model wrote more than the others do, by {_points(own)}."
    full = found.get("score_saturation")
    if full is not None and full.low > SATURATED:
        yield f"{who} gives its best score to {with_interval(full)} of completions: it hardly tells good from better."


def _agreement_notes(judging: Mapping[str, Any]) -> Iterator[str]:
    for entry in judging.get("agreement", []):
        kappa = metrics_from_json(entry["metrics"]).get("kappa")
        if JUDGE in entry["raters"] and len(entry["raters"]) == 2 and kappa is not None and kappa.low <= 0:
            one, two = (named(rater) for rater in entry["raters"])
            yield f"That {one} and {two} agree more than by chance is not shown: kappa {with_interval(kappa)}."


def lines(judging: Mapping[str, Any]) -> list[str]:
    """Return what `prefloop show` prints of the judges: one line for each judge and each comparison."""
    found = []
    for rater in (JUDGE, SECOND):
        metrics = metrics_from_json(judging.get(rater, {}).get("metrics", {}))
        said = [f"{METRICS[name]} {_said(metrics[name])}" for name in METRICS if name in metrics and name != "answered"]
        if said:
            found.append(f"{named(rater)}: {'; '.join(said)}")
    for entry in judging.get("agreement", []):
        metrics = metrics_from_json(entry["metrics"])
        who = " and ".join(named(rater) for rater in entry["raters"])
        titles = {"same": "same verdict", "accuracy": "right", "kappa": "kappa"}
        said = [f"{title} {_said(metrics[name])}" for name, title in titles.items() if name in metrics]
        found.append(f"{who} on {entry['items']} pairs: {', '.join(said) or 'one verdict only, so no kappa'}")
    return [*found, *map(sampler_line, judging.get("sampler", [])), *notes(judging)]


def tables(judging: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the report shows: a table of the judges, one of their agreement, and sentences; `None`: nothing."""
    found = {rater: metrics_from_json(judging.get(rater, {}).get("metrics", {})) for rater in (JUDGE, SECOND)}
    judges = [rater for rater in found if found[rater]]
    rows = [
        {"name": METRICS[name], "cells": [_cell(found[rater].get(name)) for rater in judges]}
        for name in METRICS
        if any(name in found[rater] for rater in judges)
    ]
    agreed = [
        {
            "raters": " and ".join(named(rater) for rater in entry["raters"]),
            "items": entry["items"],
            "cells": [_cell(metrics_from_json(entry["metrics"]).get(n), False) for n in ("same", "accuracy", "kappa")],
        }
        for entry in judging.get("agreement", [])
    ]
    if not rows and not agreed:
        return None
    kinds = [f"{named(rater)} ({(judging[rater].get('kind') or 'own')})" for rater in judges]
    sampler = [sampler_line(entry) for entry in judging.get("sampler", [])]
    return {"judges": kinds, "rows": rows, "agreed": agreed, "said": notes(judging), "sampler": sampler}


def _cell(metric: Metric | None, with_count: bool = True) -> tuple[str, str] | None:
    """Return value with unit, and interval, with the number of prompts."""
    if metric is None:
        return None
    value, _, bounds = _said(metric).partition(" [")
    said = [f"[{bounds}"] if bounds else []
    return value, " · ".join([*said, *([f"{metric.n} prompts"] if with_count else [])])


def sampler_line(entry: Mapping[str, Any]) -> str:
    """Return what is known of the sampler's log-probs in one round."""
    gap, used = entry["gap"], entry["reference_logps"]
    where = f"round {entry['round']}: "
    if gap is None:
        return f"{where}the samples' log-probs differ from ours beyond measure; the reference's were computed anew"
    kept = {"sampler": "used as the reference's", "both": "used in part"}.get(used, "computed anew")
    return f"{where}the samples' log-probs differ from ours by at most {gap:.2g} nats a token; {kept}"


def _said(metric: Metric) -> str:
    return _points(metric) if metric.unit == "points" else with_interval(metric)


def _points(metric: Metric) -> str:
    if not (isfinite(metric.low) and isfinite(metric.high)):
        return f"{metric.value:+.1f} points, no interval".replace("-", "−")
    return f"{metric.value:+.1f} points [{metric.low:+.1f}, {metric.high:+.1f}]".replace("-", "−")


def _columns(pairs: Sequence[tuple[int, int]]) -> tuple[list[float], list[float]]:
    return [float(a) for a, _ in pairs], [float(b) for _, b in pairs]


def _win(verdict: Hashable, side: int | None) -> float:
    return 0.5 if verdict == TIE else float(verdict == side)


def _others(item: Item, rater: str) -> tuple[float] | None:
    """Return the mean preference of the other raters for the first side; people count as one."""
    found = [name for name in item.ratings if name != rater and not name.startswith(PERSON)]
    return (sum(_win(item.ratings[name], 1) for name in found) / len(found),) if found else None


def _rank(rater: str) -> tuple[int, str]:
    known = (JUDGE, SECOND, PEOPLE)
    return (known.index(rater) if rater in known else len(known), rater)
