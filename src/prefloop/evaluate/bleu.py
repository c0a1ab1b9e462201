"""BLEU of a corpus (Papineni et al. 2002, ACL, "BLEU: a Method for Automatic Evaluation of Machine Translation").

Counts are kept apart from the score, so that they can be pooled over a corpus, and a part taken out again.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, log

Words = Sequence[str]
_Gram = tuple[str, ...]
_Counts = Counter[_Gram]


@dataclass(frozen=True, slots=True)
class Matches:
    """What BLEU is made of, summed over hypotheses: per n-gram size `clipped` of `total`, and both lengths in words."""

    clipped: tuple[int, ...]
    total: tuple[int, ...]
    length: int
    reference_length: int

    @classmethod
    def none(cls, order: int) -> "Matches":
        """Return the counts of an empty corpus."""
        return cls((0,) * order, (0,) * order, 0, 0)

    def __add__(self, other: "Matches") -> "Matches":
        return self._with(other, 1)

    def __sub__(self, other: "Matches") -> "Matches":
        return self._with(other, -1)

    def _with(self, other: "Matches", sign: int) -> "Matches":
        return Matches(
            tuple(a + sign * b for a, b in zip(self.clipped, other.clipped, strict=True)),
            tuple(a + sign * b for a, b in zip(self.total, other.total, strict=True)),
            self.length + sign * other.length,
            self.reference_length + sign * other.reference_length,
        )


def bleu_of(matches: Matches) -> float:
    """Return BLEU, 0–1: BP · exp(mean over n of log p_n), BP = min(1, exp(1 − r/c)); 0 where a p_n is 0.

    p_n is the modified n-gram precision (section 2.1.1), c the length of the hypotheses, r the sum of the lengths of
    their references, for each the one closest in length (section 2.2.2). Of two equally close ones the shorter counts,
    as in sacrebleu; the paper does not say. No smoothing.
    """
    if not all(matches.clipped):
        return 0.0
    logs = [log(hit / total) for hit, total in zip(matches.clipped, matches.total, strict=True)]
    return exp(min(0.0, 1 - matches.reference_length / matches.length) + sum(logs) / len(logs))


def matches(hypothesis: Words, references: Sequence[Words], order: int = 4) -> Matches:
    """Return the counts of one hypothesis: an n-gram counts at most as often as in the reference that has it most."""
    clipped, total = [], []
    for size in range(1, order + 1):
        counts = _grams(hypothesis, size)
        ceilings = [_grams(reference, size) for reference in references]
        clipped.append(sum(min(count, max(c[gram] for c in ceilings)) for gram, count in counts.items()))
        total.append(counts.total())
    return Matches(tuple(clipped), tuple(total), len(hypothesis), _closest(len(hypothesis), map(len, references)))


def matches_of_others(texts: Sequence[Words], order: int = 4) -> list[Matches]:
    """Return for each of two or more texts its counts with all others as references."""
    lengths = [len(text) for text in texts]
    clipped: list[list[int]] = [[] for _ in texts]
    for size in range(1, order + 1):
        counts = [_grams(text, size) for text in texts]
        most, second = _two_highest(counts)
        for hits, own in zip(clipped, counts, strict=True):
            # The highest count among the others is the highest of all, unless it is this text's own.
            hits.append(sum(min(n, second.get(gram, 0) if n == most[gram] else most[gram]) for gram, n in own.items()))
    return [
        Matches(
            tuple(clipped[i]),
            tuple(max(0, n - size) for size in range(order)),
            n,
            _closest(n, (m for j, m in enumerate(lengths) if j != i)),
        )
        for i, n in enumerate(lengths)
    ]


def _two_highest(counts: Sequence[_Counts]) -> tuple[dict[_Gram, int], dict[_Gram, int]]:
    """Return each n-gram's highest count in a text, and its highest in another text where there is one."""
    most: dict[_Gram, int] = {}
    second: dict[_Gram, int] = {}
    for own in counts:
        for gram, n in own.items():
            top = most.get(gram, 0)
            if n > top:
                most[gram] = n
            if top:
                second[gram] = max(second.get(gram, 0), min(n, top))
    return most, second


def _grams(text: Words, size: int) -> _Counts:
    return Counter(zip(*(text[i:] for i in range(size)), strict=False))


def _closest(length: int, others: Iterable[int]) -> int:
    return min(others, key=lambda other: (abs(other - length), other))
