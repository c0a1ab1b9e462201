"""What is wrong with the pairs that data bring along: they are looked at as they stand in the file. Torch-free."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from prefloop.check.finding import Finding, Severity, counted, short
from prefloop.check.scan import Row, Scan

GAP = 1.5
"""Chosen completions that are so many times as long as rejected ones, or as short, are a warning: our own choice."""
ENOUGH = 10
"""Pairs from which a length gap is told."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The best and the worst completion of a row."""

    row: Row
    chosen: str
    rejected: str


def pairs_of(rows: Sequence[Row]) -> list[Pair]:
    """Return the pair of each row that has completions with different scores."""
    return [
        Pair(row, row.rated[0].text, row.rated[-1].text)
        for row in rows
        if len(row.rated) > 1 and row.rated[0].score != row.rated[-1].score
    ]


def pair_findings(scan: Scan, trained_on: bool) -> Iterator[Finding]:
    """Yield what is wrong with the pairs; where the recipe does not train on them these are facts, no warnings."""
    severity: Severity = "warning" if trained_on else "info"
    pairs = pairs_of(scan.rows)
    yield from counted(
        "different_prompts",
        scan.different,
        "rows whose chosen and rejected conversation have different prompts",
        "give both sides the same turns before the answer, or remove the rows: they stop the reader",
        "error",
    )
    if not any(row.candidates for row in scan.rows):
        return
    use = "trains on them" if trained_on else "does not train on them: it samples its own"
    yield Finding("pairs", "info", f"{len(pairs)} pairs in the data; this recipe {use}", len(pairs))
    yield from counted(
        "half_pairs",
        scan.half,
        "rows with one side of a pair only: no pair can be made of them",
        "give both sides, or remove the rows: they stop the run",
        "error" if trained_on else "info",
    )
    yield from _one_by_one(scan.rows, pairs, severity)
    yield from _among_rows(scan.rows, pairs, severity)
    yield from _length_gap(pairs, severity)


def _one_by_one(rows: Sequence[Row], pairs: Sequence[Pair], severity: Severity) -> Iterator[Finding]:
    yield from counted(
        "identical_pairs",
        [p.row.place for p in pairs if p.chosen == p.rejected],
        "pairs with the same text on both sides: they teach nothing and are dropped",
        "remove them, or see why the source holds them",
        severity,
    )
    empty = [(row.place, c.text) for row in rows for c in row.candidates if not c.text.strip()]
    yield from counted(
        "empty_completions",
        list(dict.fromkeys(place for place, _ in empty)),
        "rows with an empty completion: the model would learn to end, or not to, at once",
        "remove the rows",
        severity,
    )
    yield from counted(
        "ties",
        [r.place for r in rows if len(r.rated) > 1 and r.rated[0].score == r.rated[-1].score],
        "rows whose completions all have the same score: no pair can be made of them",
        "expect fewer pairs than rows, or give finer scores",
        severity,
    )
    yield from counted(
        "prompt_repeated",
        [p.row.place for p in pairs if p.row.prompt.strip() and _repeats(p)],
        "pairs in which a completion begins with its prompt: the model would see it twice",
        "cut the prompt off the completions",
        severity,
    )


def _repeats(pair: Pair) -> bool:
    return any(side.startswith(pair.row.prompt) and len(pair.row.prompt) > 1 for side in (pair.chosen, pair.rejected))


def _among_rows(rows: Sequence[Row], pairs: Sequence[Pair], severity: Severity) -> Iterator[Finding]:
    first: dict[tuple[str, str, str], str] = {}
    duplicates, contradictions = [], []
    for pair in pairs:
        place = pair.row.place
        same, turned = (pair.row.key, pair.chosen, pair.rejected), (pair.row.key, pair.rejected, pair.chosen)
        if pair.chosen == pair.rejected:
            continue
        if turned in first:
            contradictions.append(f"{place} prefers what {first[turned]} rejects: {short(pair.chosen)}")
        if same in first:
            duplicates.append(f"{place} repeats {first[same]}")
        first.setdefault(same, place)
    labels: dict[tuple[str, str], tuple[str, float | None]] = {}
    for row in rows:
        for candidate in row.candidates if row.labelled else ():
            place, score = labels.setdefault((row.key, candidate.text), (row.place, candidate.score))
            if score != candidate.score:
                contradictions.append(f"{row.place} labels what {place} labels otherwise: {short(candidate.text)}")
            elif place != row.place:
                duplicates.append(f"{row.place} repeats {place}")
    yield from counted(
        "duplicate_pairs", duplicates, "pairs that stand there more than once", "keep one of each", severity
    )
    yield from counted(
        "contradictory_pairs",
        contradictions,
        "pairs that say the opposite of an earlier one about the same prompt",
        "decide which label is right, or remove both; of rows with the same prompt only the first is read",
        severity,
    )


def _length_gap(pairs: Sequence[Pair], severity: Severity) -> Iterator[Finding]:
    known = [p for p in pairs if p.chosen.strip() and p.rejected.strip()]
    if not known:
        return
    chosen, rejected = fmean(len(p.chosen) for p in known), fmean(len(p.rejected) for p in known)
    longer = sum(len(p.chosen) > len(p.rejected) for p in known) / len(known)
    ratio = chosen / rejected
    far = abs(math.log(ratio)) > math.log(GAP) and len(known) >= ENOUGH
    yield Finding(
        "length_gap",
        severity if far else "info",
        f"chosen completions have {chosen:.0f} characters, rejected ones {rejected:.0f}: {ratio:.2f} times; chosen is "
        f"the longer side in {longer:.0%} of pairs",
        ratio,
        advice="the model can lower its loss by length alone: balance the pairs, or take loss.kind=ln_dpo, simpo or "
        "r_dpo"
        if far
        else "",
    )
