"""Whether the judge can be reached, what it says of a few pairs, and whether the order of the two changes it."""

import json
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from prefloop.check.finding import Finding, short
from prefloop.errors import PrefloopError
from prefloop.judge.llm import FILE
from prefloop.protocols import Judge, RoundContext
from prefloop.rows import SampleGroup, Verdict

FLIPS = 0.25
"""Share of pairs whose verdict changes with the order, above which it is a warning: our own choice."""
SILENT = 0.1
"""Share of completions without a verdict, above which it is a warning: our own choice."""
EQUAL = 0.5
"""Share of pairs with equal scores, above which it is a warning: our own choice."""


def judge_findings(name: str, judge: Judge, groups: Sequence[SampleGroup], context: RoundContext) -> Iterator[Finding]:
    """Ask `judge` about two completions of each group, in both orders; `name` is its field in the recipe."""
    pairs = [replace(g, completions=g.completions[:2]) for g in groups if len({c.text for c in g.completions[:2]}) > 1]
    if not pairs:
        yield Finding(name, "warning", "not asked: no prompt has two different completions")
        return
    turned = [replace(group, completions=group.completions[::-1]) for group in pairs]
    with tempfile.TemporaryDirectory() as scratch:
        # A store of the recipe's own keeps what was paid for; else the replies are forgotten.
        asking = replace(context, scratch=scratch)
        try:
            verdicts, again = judge(pairs, asking), judge(turned, asking)
        except PrefloopError as error:
            yield Finding(
                f"{name}_reachable", "error", str(error), advice="start or correct the judge, then check again"
            )
            return
        both_orders = _stored_orders(Path(scratch, FILE))
    yield Finding(f"{name}_reachable", "info", f"answered on {len(pairs)} pairs", len(pairs))
    yield from _silent(name, verdicts)
    yield from _equal(name, verdicts)
    flips = both_orders if both_orders is not None else _flips(verdicts, again)
    if flips[1]:
        rate = flips[0] / flips[1]
        yield Finding(
            f"{name}_order_flips",
            "warning" if rate > FLIPS else "info",
            f"the verdict changes with the order in {flips[0]} of {flips[1]} pairs",
            rate,
            advice="take a stronger judge or another template: it goes by the place" if rate > FLIPS else "",
        )


def _silent(name: str, verdicts: Sequence[Verdict]) -> Iterator[Finding]:
    scores = [score for verdict in verdicts for score in verdict.scores]
    notes = [note for verdict in verdicts for note in verdict.notes if note]
    missing = sum(score is None for score in scores)
    if missing:
        bad = missing > SILENT * len(scores)
        yield Finding(
            f"{name}_silent",
            "warning" if bad else "info",
            f"{missing} of {len(scores)} completions got no score",
            missing,
            tuple(dict.fromkeys(short(note, 100) for note in notes))[:3],
            "see the notes; a reply that is cut off needs a higher judge.max_tokens" if bad else "",
        )


def _equal(name: str, verdicts: Sequence[Verdict]) -> Iterator[Finding]:
    known = [v.scores for v in verdicts if None not in v.scores]
    ties = sum(scores[0] == scores[1] for scores in known)
    if known:
        bad = ties > EQUAL * len(known)
        yield Finding(
            f"{name}_ties",
            "warning" if bad else "info",
            f"{ties} of {len(known)} pairs got equal scores: no pair is made of those",
            ties,
            advice="raise sampler.completions or sampler.temperature, or take a finer judge" if bad else "",
        )


def _flips(verdicts: Sequence[Verdict], turned: Sequence[Verdict]) -> tuple[int, int]:
    """Return how many verdicts the order changes, of how many; a tie in one order only is a change."""
    known = [
        (_sign(one.scores), -_sign(two.scores))
        for one, two in zip(verdicts, turned, strict=True)
        if None not in one.scores and None not in two.scores
    ]
    return sum(one != two for one, two in known), len(known)


def _sign(scores: Sequence[float | None]) -> int:
    first, second = (score or 0.0 for score in scores)
    return (first > second) - (first < second)


def _stored_orders(path: Path) -> tuple[int, int] | None:
    """Return the flips that a comparing language model's store shows: it asks in both orders itself."""
    if not path.is_file():
        return None
    with closing(sqlite3.connect(path)) as store:
        rows = store.execute(
            "select prompt_id, shown, repeat, verdict from replies where mode = 'compare' and verdict is not null"
        ).fetchall()
    winners: dict[tuple[str, str, int], list[str]] = {}
    for prompt, shown, repeat, verdict in rows:
        ids = json.loads(shown)
        letter = json.loads(verdict)
        letter = letter[0] if isinstance(letter, list) else next(iter(letter.values()))
        winner = {"A": ids[0], "B": ids[-1]}.get(letter, "tie")
        winners.setdefault((prompt, json.dumps(sorted(ids)), repeat), []).append(winner)
    both = [found for found in winners.values() if len(found) == 2]
    return (sum(one != two for one, two in both), len(both)) if both else None
