"""Verdicts out of a run and into it, as the JSONL that `corrections` of a pair rule reads: see `pair/_verdicts.py`."""

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefloop.artifact import replacing
from prefloop.errors import ConfigError, DataError
from prefloop.label.consensus import EFFECT, majority, votes_of
from prefloop.label.pairs import Item, RoundPairs
from prefloop.label.sessions import checked_name
from prefloop.label.store import BOTH_BAD, CHOSEN, REJECTED, TIE, Click, Given, Store, StoredPair, exchanged
from prefloop.pair._verdicts import VERDICTS, TextKey, Verdict, read_verdicts

SIDES = {CHOSEN: "left", REJECTED: "right", TIE: "tie", BOTH_BAD: "both_bad"}
"""A stored verdict as the file says it: left of a line is the pair's chosen side."""
_STORED = {said: stored for stored, said in SIDES.items()}
_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote: lines by effect, pairs on which people are split, pairs of results made since again."""

    lines: Mapping[str, int]
    split: int
    stale: int


def export_verdicts(store: Store, pairs: RoundPairs, to: Path, annotator: str | None = None) -> Exported:
    """Write one line for each pair that people judged: what most of them say, or what `annotator` says.

    Skipped pairs are left out, pairs on which people are split too, and so are verdicts on pairs that the round no
    longer has because its completions were made again.

    Raises:
        ConfigError: `to` exists.
        DataError: there is nothing to write.

    """
    if to.exists():
        raise ConfigError(f"{to}: exists already; choose a path that does not")
    stored = store.pairs(pairs.round)
    counts = dict.fromkeys(("keep", "flip", "drop"), 0)
    split = stale = 0
    lines = []
    for key, by in votes_of(store.given(pairs.round, annotator)).items():
        pair = stored[key]
        verdict = majority([one.verdict for one in by.values()])
        if key not in pairs.by_key and pair.judged != pairs.judged:
            stale += 1
        elif verdict is None:
            split += 1
        else:
            counts[EFFECT[verdict]] += 1
            lines.append(_line(pairs.round, pair, verdict, by))
    if not lines:
        whose = "" if annotator is None else f" of {annotator}"
        raise DataError(
            f"{pairs.run}, round {pairs.round}: no verdicts{whose} to write ({split} pairs on which people are split, "
            f"{stale} of completions that were made again since)"
        )
    with replacing(to) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return Exported(counts, split, stale)


def import_verdicts(store: Store, pairs: RoundPairs, named: Path, annotator: str | None = None) -> tuple[int, int]:
    """Store the verdicts of a file and return how many were new, and how many were there already.

    A line without `annotators` is a verdict of `annotator`. Either all lines are stored or none.

    Raises:
        ConfigError: there is no such file, or a line does not say whose verdict it is and `annotator` is `None`.
        DataError: a line is wrong, names a pair that the round does not have, or contradicts a stored verdict.

    """
    if not named.is_file():
        raise ConfigError(f"--import: {named} is not a file; name a JSONL file of verdicts")
    file = read_verdicts(str(named))
    origins = _lines(named)
    clicks, unknown = [], []
    for verdict, item in _known(file.by_id.values(), file.by_text, pairs):
        if item is None:
            unknown.append(verdict)
            continue
        of_line = _of_line(f"{named}:{verdict.line}", origins[verdict.line], annotator, verdict.verdict)
        sides_agree = verdict.left == item.chosen if verdict.left is not None else verdict.name == item.pair_ids[0]
        for name, said in of_line.items():
            stored = _STORED[said] if sides_agree else exchanged(_STORED[said])
            clicks.append(Click(secrets.token_hex(8), name, item, stored, f"file {named.name}"))
    if unknown:
        raise DataError(_unknown(named, unknown, pairs))
    fresh = _fresh(store, pairs, named, clicks)
    return store.add(pairs.round, pairs.judged, fresh), len(clicks) - len(fresh)


def _line(number: int, pair: StoredPair, verdict: str, by: Mapping[str, Given]) -> dict[str, Any]:
    # Texts name a pair even where several have them; steps have what stands before them, which only the id covers.
    name = (
        {"pair_id": pair.pair_id}
        if pair.prefix
        else {"prompt_id": pair.prompt_id, "left": pair.chosen, "right": pair.rejected}
    )
    people = {who: {"verdict": SIDES[one.verdict], "at": one.at, "origin": one.origin} for who, one in by.items()}
    return {
        **name,
        "verdict": SIDES[verdict],
        "annotators": people,
        "round": number,
        "builder": pair.builder,
        "pair": pair.pair_id,
    }


def _known(
    by_id: Iterable[Verdict], by_text: Mapping[TextKey, Verdict], pairs: RoundPairs
) -> Iterator[tuple[Verdict, Item | None]]:
    """Yield each line with the pair that it names, `None` where the round has no such pair."""
    ids = {name: item for item in pairs.items for name in item.pair_ids}
    texts = {(item.prompt_id, frozenset((item.chosen, item.rejected))): item for item in pairs.items}
    yield from ((verdict, ids.get(verdict.name)) for verdict in by_id)
    yield from ((verdict, texts.get(key)) for key, verdict in by_text.items())


def _lines(named: Path) -> dict[int, dict[str, Any]]:
    lines = named.read_text(encoding="utf-8").split("\n")
    return {number: json.loads(line) for number, line in enumerate(lines, 1) if line.strip()}


def _of_line(place: str, row: dict[str, Any], annotator: str | None, verdict: str) -> dict[str, str]:
    """Return who says what in a line."""
    people = row.get("annotators")
    if people is None:
        if annotator is None:
            raise ConfigError(f"{place}: does not say whose verdict it is; give --annotator NAME")
        return {checked_name(annotator): verdict}
    if not isinstance(people, dict) or not people:
        raise DataError(f"{place}: annotators must be an object of names with their verdicts, got {people!r}")
    found = {}
    for name, said in people.items():
        value = said.get("verdict") if isinstance(said, dict) else None
        if value not in VERDICTS:
            raise DataError(f"{place}: verdict of {name!r} must be one of {', '.join(VERDICTS)}, got {value!r}")
        found[checked_name(name)] = value
    return found


def _fresh(store: Store, pairs: RoundPairs, named: Path, clicks: Sequence[Click]) -> list[Click]:
    """Return the clicks that are not stored yet; refuse those that contradict a stored one."""
    stored = store.pairs(pairs.round)
    said = {
        (one.annotator, one.key): one.verdict if stored[one.key].chosen == item.chosen else exchanged(one.verdict)
        for one in store.given(pairs.round)
        if (item := pairs.by_key.get(one.key)) is not None
    }
    fresh, contradicted = [], []
    for click in clicks:
        before = said.get((click.annotator, click.item.key))
        if before in (None, "skip"):
            fresh.append(click)
            said[click.annotator, click.item.key] = click.verdict
        elif before != click.verdict:
            contradicted.append(f"{click.annotator} on pair {click.item.pair_ids[0]}")
    if contradicted:
        raise DataError(
            f"{named}: contradicts stored verdicts, or an earlier line of its own: {_some(contradicted)}; remove these "
            "lines, or import them under another --annotator. Nothing was changed"
        )
    return fresh


def _unknown(named: Path, unknown: Sequence[Verdict], pairs: RoundPairs) -> str:
    rows = sorted(unknown, key=lambda verdict: verdict.line)
    names = _some([f"{verdict.name} (line {verdict.line})" for verdict in rows])
    return (
        f"{named}: round {pairs.round} of {pairs.run} has no pair {names}; remove these lines, or name the round that "
        "has them with --round. Nothing was changed"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
