"""What several people say together, and how far they agree."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from prefloop.errors import DataError
from prefloop.evaluate.agreement import cohen_kappa, fleiss_kappa
from prefloop.label.store import BOTH_BAD, CHOSEN, REJECTED, SKIP, TIE, Given
from prefloop.rows import Metric

EFFECT = {CHOSEN: "keep", REJECTED: "flip", TIE: "drop", BOTH_BAD: "drop"}
"""What a verdict does to a pair: see `pair/_verdicts.py`."""


def votes_of(given: Sequence[Given]) -> dict[str, dict[str, Given]]:
    """Return key → annotator → verdict; skipped pairs have no vote."""
    found: dict[str, dict[str, Given]] = {}
    for one in given:
        if one.verdict != SKIP:
            found.setdefault(one.key, {})[one.annotator] = one
    return found


def majority(verdicts: Sequence[str]) -> str | None:
    """Return the verdict of most people; `None` where two effects on the pair have as many.

    Tie and both bad do the same to a pair, so they count together; the one that more people gave stands for them.

    Example:
        >>> majority(["tie", "both_bad", "chosen", "both_bad"])
        'both_bad'
        >>> majority(["chosen", "rejected"]) is None
        True

    """
    effects = Counter(EFFECT[verdict] for verdict in verdicts).most_common(2)
    if not effects or (len(effects) == 2 and effects[0][1] == effects[1][1]):
        return None
    return Counter(v for v in verdicts if EFFECT[v] == effects[0][0]).most_common(1)[0][0]


@dataclass(frozen=True, slots=True)
class Compared:
    """Two or more people on the pairs that all of them judged. `same`: all gave one verdict, %. `why`: no kappa."""

    people: tuple[str, ...]
    pairs: int
    same: float | None
    kappa: Metric | None
    why: str


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far people agree with each other, and with the run's own labels.

    `with_labels` has for each person how many verdicts prefer a side, and the share of them that prefer the side which
    is chosen in the run, %. `together` is there from three people on.
    """

    judged: Mapping[str, int]
    with_labels: Mapping[str, tuple[int, float | None]]
    two_by_two: tuple[Compared, ...]
    together: Compared | None
    split: int


def agreement_of(given: Sequence[Given]) -> Agreement:
    """Return the agreement of people on one round.

    Kappas take four categories: first side, second side, tie, both bad. Which side of a pair is first is decided by
    its key and not by the run's label: else people who all follow the label would seem to agree by habit only.
    """
    votes = votes_of(given)
    people = sorted({one.annotator for one in given})
    judged = {name: sum(name in by for by in votes.values()) for name in people}
    categories = {name: {key: _category(key, by[name]) for key, by in votes.items() if name in by} for name in people}
    return Agreement(
        judged=judged,
        with_labels={name: _with_labels(votes, name) for name in people},
        two_by_two=tuple(_compared(pair, categories) for pair in combinations(people, 2)),
        together=_compared(tuple(people), categories) if len(people) > 2 else None,
        split=sum(majority([one.verdict for one in by.values()]) is None for by in votes.values()),
    )


def as_json(found: Agreement) -> dict[str, Any]:
    """Return an agreement as the page reads it: numbers rounded, kappas with their 95 % interval."""
    return {
        "people": [
            {"name": name, "judged": found.judged[name], "sided": sided, "with_labels": share}
            for name, (sided, share) in found.with_labels.items()
        ],
        "compared": [_compared_json(c) for c in (*found.two_by_two, *([found.together] if found.together else []))],
        "split": found.split,
    }


def _compared_json(found: Compared) -> dict[str, Any]:
    kappa = found.kappa
    return {
        "people": list(found.people),
        "pairs": found.pairs,
        "same": found.same,
        "kappa": None if kappa is None else [round(v, 3) for v in (kappa.value, kappa.low, kappa.high)],
        "what": "Cohen" if len(found.people) == 2 else "Fleiss",
        "why": found.why,
    }


def _category(key: str, given: Given) -> str:
    if given.verdict not in (CHOSEN, REJECTED):
        return given.verdict
    return "first" if (given.verdict == CHOSEN) == (int(key[-1], 16) % 2 == 0) else "second"


def _with_labels(votes: Mapping[str, Mapping[str, Given]], name: str) -> tuple[int, float | None]:
    sided = [by[name].verdict for by in votes.values() if name in by and by[name].verdict in (CHOSEN, REJECTED)]
    return len(sided), 100 * sided.count(CHOSEN) / len(sided) if sided else None


def _compared(people: tuple[str, ...], categories: Mapping[str, Mapping[str, str]]) -> Compared:
    both = sorted(set.intersection(*(set(categories[name]) for name in people)))
    ratings = [[categories[name][key] for name in people] for key in both]
    if not both:
        return Compared(people, 0, None, None, "no pair that all of them judged")
    same = 100 * sum(len(set(row)) == 1 for row in ratings) / len(both)
    try:
        kappa = cohen_kappa(*zip(*ratings, strict=True)) if len(people) == 2 else fleiss_kappa(ratings)
    except DataError:
        return Compared(people, len(both), same, None, "all verdicts are one and the same")
    return Compared(people, len(both), same, kappa, "")
