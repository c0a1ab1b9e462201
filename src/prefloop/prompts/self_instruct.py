"""New prompts in the manner of given ones: what a policy is shown, what is read from its text, what is kept.

Self-Instruct, Wang et al. 2022, arXiv:2212.10560: a language model continues a numbered list of tasks, and a task is
kept if it is unlike every task that is there (ROUGE-L below 0.7) and names nothing that a text model cannot see.
Recalled from the paper, not looked up: 8 examples a time, 6 of them given and 2 made; the limit 0.7; words such as
image. The wording, the other limits and everything else here are ours. Self-Rewarding (arXiv:2401.10020) makes its
prompts likewise.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from prefloop.errors import ConfigError

EXAMPLES, MADE_EXAMPLES = 8, 2
"""Tasks shown in one request, and how many of them may be made ones."""
UNSEEN = (
    "image",
    "images",
    "picture",
    "pictures",
    "photo",
    "graph",
    "graphs",
    "chart",
    "file",
    "files",
    "map",
    "video",
)
"""Words of tasks that a model of texts cannot do."""
_NUMBER = re.compile(r"(?:^|\n)[ \t]*Task[ \t]+[0-9]+[ \t]*:")
_WORD = re.compile(r"\w+")


def request(examples: Sequence[str]) -> str:
    """Return the beginning of a list of tasks that is to be continued."""
    lines = [f"Task {number}: {' '.join(text.split())}" for number, text in enumerate(examples, 1)]
    return "\n".join(["Below is a list of different tasks.", "", *lines, f"Task {len(examples) + 1}:"])


def read_tasks(text: str, ended: bool) -> list[str]:
    """Return the tasks of a continuation. Where the text was cut off (`ended` false), the last one is left out."""
    found = _NUMBER.split(text)
    if not ended:
        found = found[:-1]
    return [task for part in found if (task := part.strip().partition("\n\n")[0].strip())]


@dataclass(frozen=True)
class Limits:
    """What a new task must keep to. `similarity` is ROUGE-L with any other; lengths are in words.

    Raises:
        ConfigError: a limit is out of range.

    """

    similarity: float = 0.7
    """A task with this ROUGE-L or more with any other is dropped, in (0, 1]. Self-Instruct's, recalled."""
    fewest: int = 4
    """Words of the shortest task, ≥ 1. Ours."""
    most: int = 150
    """Words of the longest task. Ours."""

    def __post_init__(self) -> None:
        if not 0 < self.similarity <= 1:
            raise ConfigError(f"similarity: must be in (0, 1], got {self.similarity}")
        if not 1 <= self.fewest <= self.most:
            raise ConfigError(f"words: the shortest must be ≥ 1 and ≤ the longest, got {self.fewest} and {self.most}")


@dataclass
class Pool:
    """The tasks that are there, given and made, and why others were dropped."""

    limits: Limits
    made: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    _known: list[tuple[list[str], Counter[str]]] = field(default_factory=list)

    def know(self, text: str) -> None:
        """Take in a given task, unchecked."""
        words = _words(text)
        self._known.append((words, Counter(words)))

    def offer(self, text: str) -> bool:
        """Keep a new task if it passes; else count why not."""
        words = _words(text)
        why = self._objection(text, words)
        if why:
            self.dropped[why] += 1
            return False
        self.made.append(text)
        self._known.append((words, Counter(words)))
        return True

    def _objection(self, text: str, words: list[str]) -> str:
        if not self.limits.fewest <= len(words) <= self.limits.most:
            return "too short or too long"
        if not set(words).isdisjoint(UNSEEN):
            return "about what a text does not show"
        if not text[0].isalnum() and text[0] not in "\"'(¿¡":
            return "begins with a sign"
        counts = Counter(words)
        for others, their_counts in self._known:
            # A common subsequence is no longer than the words in common.
            if _f1(sum((counts & their_counts).values()), len(words), len(others)) >= self.limits.similarity and (
                rouge_l(words, others) >= self.limits.similarity
            ):
                return "like another"
        return ""


def rouge_l(one: Sequence[str], two: Sequence[str]) -> float:
    """Return ROUGE-L of two sequences of words: the F1 of their longest common subsequence (Lin 2004), in [0, 1].

    Example:
        >>> round(rouge_l("police killed the gunman".split(), "police kill the gunman".split()), 2)
        0.75

    """
    row = [0] * (len(two) + 1)
    for word in one:
        before = 0
        for place, other in enumerate(two, 1):
            above = row[place]
            row[place] = before + 1 if word == other else max(above, row[place - 1])
            before = above
    return _f1(row[-1], len(one), len(two))


def _f1(common: int, one: int, two: int) -> float:
    return 2 * common / (one + two) if common else 0.0


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
