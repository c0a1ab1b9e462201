"""What is wrong with the pairs that data bring along: they are looked at as they stand in the file. Torch-free."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from prefloop.check.finding import Finding, Seen, Severity, counted, short
from prefloop.check.scan import Row, Scan

GAP = 1.5
"""Chosen completions that are so many times as long as rejected ones, or as short, are a warning: our own choice."""
ENOUGH = 10
"""Pairs from which a length gap is told."""


@dataclass
class Lengths:
    """Sums over the pairs with two texts: pairs, characters of each side, and pairs whose chosen side is longer."""

    pairs: int = 0
    chosen: int = 0
    rejected: int = 0
    longer: int = 0

    def add(self, chosen: str, rejected: str) -> None:
        """Count a pair."""
        if chosen.strip() and rejected.strip():
            self.pairs += 1
            self.chosen += len(chosen)
            self.rejected += len(rejected)
            self.longer += len(chosen) > len(rejected)


class Pairs:
    """The pairs of rows: the best and the worst completion of each that has completions with different scores.

    Texts are told apart by hashes, so that none is kept.
    """

    def __init__(self) -> None:
        """Begin without rows."""
        self.rows_with_candidates, self.count = 0, 0
        self.identical, self.empty, self.ties, self.prompt_repeated = Seen(), Seen(), Seen(), Seen()
        self.lengths = Lengths()
        self._duplicates, self._contradictions = (Seen(), Seen()), (Seen(), Seen())
        self._first: dict[int, str] = {}
        self._labels: dict[int, tuple[str, float | None]] = {}

    @property
    def duplicates(self) -> Seen:
        """Pairs, then labels, that stand there more than once."""
        return self._duplicates[0] + self._duplicates[1]

    @property
    def contradictions(self) -> Seen:
        """Pairs, then labels, that say the opposite of an earlier one."""
        return self._contradictions[0] + self._contradictions[1]

    def __call__(self, row: Row) -> None:
        """Take in a row."""
        if not row.candidates:
            return
        self.rows_with_candidates += 1
        if any(not c.text.strip() for c in row.candidates):
            self.empty.add(row.place)
        if row.labelled:
            self._label(row)
        rated = row.rated
        if len(rated) < 2:
            return
        if rated[0].score == rated[-1].score:
            self.ties.add(row.place)
        else:
            self._pair(row, rated[0].text, rated[-1].text)

    def _pair(self, row: Row, chosen: str, rejected: str) -> None:
        self.count += 1
        self.lengths.add(chosen, rejected)
        begins = chosen.startswith(row.prompt) or rejected.startswith(row.prompt)
        if begins and row.prompt.strip() and len(row.prompt) > 1:
            self.prompt_repeated.add(row.place)
        if chosen == rejected:
            self.identical.add(row.place)
            return
        same, turned = hash((row.key, chosen, rejected)), hash((row.key, rejected, chosen))
        duplicates, contradictions = self._duplicates[0], self._contradictions[0]
        if turned in self._first:
            contradictions.add(f"{row.place} prefers what {self._first[turned]} rejects: {short(chosen)}")
        if same in self._first:
            duplicates.add(f"{row.place} repeats {self._first[same]}")
        self._first.setdefault(same, row.place)

    def _label(self, row: Row) -> None:
        duplicates, contradictions = self._duplicates[1], self._contradictions[1]
        for candidate in row.candidates:
            known = self._labels.setdefault(hash((row.key, candidate.text)), (row.place, candidate.score))
            if known[1] != candidate.score:
                contradictions.add(f"{row.place} labels what {known[0]} labels otherwise: {short(candidate.text)}")
            elif known[0] != row.place:
                duplicates.add(f"{row.place} repeats {known[0]}")


def pair_findings(scan: Scan, pairs: Pairs, trained_on: bool) -> Iterator[Finding]:
    """Yield what is wrong with the pairs; where the recipe does not train on them these are facts, no warnings."""
    severity: Severity = "warning" if trained_on else "info"
    yield from counted(
        "different_prompts",
        scan.different,
        "rows whose chosen and rejected conversation have different prompts",
        "give both sides the same turns before the answer, or remove the rows: they stop the reader",
        "error",
    )
    if not pairs.rows_with_candidates:
        return
    use = "trains on them" if trained_on else "does not train on them: it samples its own"
    yield Finding("pairs", "info", f"{pairs.count} pairs in the data; this recipe {use}", pairs.count)
    yield from counted(
        "half_pairs",
        scan.half,
        "rows with one side of a pair only: no pair can be made of them",
        "give both sides, or remove the rows: they stop the run",
        "error" if trained_on else "info",
    )
    yield from _one_by_one(pairs, severity)
    yield from _among_rows(pairs, severity)
    yield from _length_gap(pairs.lengths, severity)


def _one_by_one(pairs: Pairs, severity: Severity) -> Iterator[Finding]:
    yield from counted(
        "identical_pairs",
        pairs.identical,
        "pairs with the same text on both sides: they teach nothing and are dropped",
        "remove them, or see why the source holds them",
        severity,
    )
    yield from counted(
        "empty_completions",
        pairs.empty,
        "rows with an empty completion: the model would learn to end, or not to, at once",
        "remove the rows",
        severity,
    )
    yield from counted(
        "ties",
        pairs.ties,
        "rows whose completions all have the same score: no pair can be made of them",
        "expect fewer pairs than rows, or give finer scores",
        severity,
    )
    yield from counted(
        "prompt_repeated",
        pairs.prompt_repeated,
        "pairs in which a completion begins with its prompt: the model would see it twice",
        "cut the prompt off the completions",
        severity,
    )


def _among_rows(pairs: Pairs, severity: Severity) -> Iterator[Finding]:
    yield from counted(
        "duplicate_pairs", pairs.duplicates, "pairs that stand there more than once", "keep one of each", severity
    )
    yield from counted(
        "contradictory_pairs",
        pairs.contradictions,
        "pairs that say the opposite of an earlier one about the same prompt",
        "decide which label is right, or remove both; of rows with the same prompt only the first is read",
        severity,
    )


def _length_gap(lengths: Lengths, severity: Severity) -> Iterator[Finding]:
    if not lengths.pairs:
        return
    chosen, rejected = lengths.chosen / lengths.pairs, lengths.rejected / lengths.pairs
    longer = lengths.longer / lengths.pairs
    ratio = chosen / rejected
    far = abs(math.log(ratio)) > math.log(GAP) and lengths.pairs >= ENOUGH
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
