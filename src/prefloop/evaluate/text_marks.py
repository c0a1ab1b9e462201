"""Which words of two texts differ: what the report marks in examples.

Texts with much in common are compared word by word, in order. Where they have little in common, as two stories have,
that would mark everything and show nothing: there, the longer words are marked that the other text does not have.
"""

import re
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby

LEAST_SHARED = 0.25
"""Share of words in common, of the longer text, below which only words that the other lacks are marked (ours)."""
LETTERS = 4
"""Letters from which on a word is marked in texts with little in common; shorter ones are mostly grammar (ours)."""

_MOST_WORDS = 400  # of either text that are compared word by word; what follows counts as different
_REPEATS = 60  # of one word, beyond which it is no anchor: a loop of one word would take quadratic time
_SIGNS = re.compile(r"[\W_]+")
_WORD = re.compile(r"\S+\s*|\s+")

Part = tuple[str, bool]
"""A stretch of text, and whether it differs."""


@dataclass(frozen=True, slots=True)
class Marked:
    """Both texts in stretches that differ or not, and how alike they are: words in common, share of the longer one."""

    before: tuple[Part, ...]
    after: tuple[Part, ...]
    alike: float

    @property
    def marks(self) -> bool:
        """Whether anything is marked."""
        return any(differs for _, differs in (*self.before, *self.after))


def marked(before: str, after: str) -> Marked:
    """Return both texts with their differences.

    Example:
        >>> marked("a red ball", "a blue ball").after
        (('a ', False), ('blue ', True), ('ball', False))

    """
    ours, theirs = _WORD.findall(before), _WORD.findall(after)
    alike = likeness(before, after)
    if alike < LEAST_SHARED or not ours or not theirs:
        return Marked(_lacking(ours, theirs), _lacking(theirs, ours), alike)
    one, other = ours[:_MOST_WORDS], theirs[:_MOST_WORDS]
    matcher = SequenceMatcher(None, [w.strip() for w in one], _anchors(other), autojunk=False)
    parts: tuple[list[Part], list[Part]] = ([], [])
    for kind, a, b, c, d in matcher.get_opcodes():
        for side, words in zip(parts, (one[a:b], other[c:d]), strict=True):
            if words:
                side.append(("".join(words), kind != "equal"))
    for side, rest in zip(parts, (ours[_MOST_WORDS:], theirs[_MOST_WORDS:]), strict=True):
        if rest:
            side.append(("".join(rest), True))
    return Marked(tuple(parts[0]), tuple(parts[1]), alike)


def likeness(before: str, after: str) -> float:
    """Return how many words two texts have in common, in any order, as a share of the longer one; 1 for two empty.

    Example:
        >>> likeness("a red ball", "a blue ball of wool")
        0.4

    """
    ours, theirs = Counter(before.split()), Counter(after.split())
    longest = max(ours.total(), theirs.total())
    return (ours & theirs).total() / longest if longest else 1.0


def _anchors(words: list[str]) -> list[str]:
    """Return words as the matcher sees them: after many repeats a word is made unlike any other."""
    seen: Counter[str] = Counter()
    found = []
    for place, word in enumerate(word.strip() for word in words):
        seen[word] += 1
        found.append(word if seen[word] <= _REPEATS else f"\0{place}")
    return found


def _lacking(words: list[str], others: list[str]) -> tuple[Part, ...]:
    """Return `words` with those marked that are not among `others`, whatever their case and signs around them."""
    known = {_bare(word) for word in others}
    marks = [len(bare := _bare(word)) >= LETTERS and bare not in known for word in words]
    return tuple(("".join(w for w, _ in run), mark) for mark, run in groupby(zip(words, marks, strict=True), _second))


def _bare(word: str) -> str:
    return _SIGNS.sub("", word).casefold()


def _second(pair: tuple[str, bool]) -> bool:
    return pair[1]
