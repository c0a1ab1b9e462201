"""Completions cut into steps without tokenizing anything: each step is a slice of the ids as they were sampled."""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from prefloop.errors import ConfigError
from prefloop.rows import Step

SEPARATORS = {
    "lines": r"\n+",
    "sentences": r"\n+|(?<=[.!?])[ \t]+(?=[A-Z0-9$(])",
    "labels": r"\n+(?=Step [0-9]+:)",
}
"""Regular expressions of what ends a step, by name; it belongs to the step before it."""


def separator(split: str) -> re.Pattern[str]:
    """Return the pattern of what ends a step: one of `SEPARATORS` by name, or a regular expression.

    Raises:
        ConfigError: not a regular expression, or one that matches nothing at all.

    """
    try:
        pattern = re.compile(SEPARATORS.get(split, split))
    except re.error as error:
        raise ConfigError(
            f"corrector.split: {split!r} is neither {', '.join(SEPARATORS)} nor a regular expression: {error}"
        ) from error
    if not split or pattern.fullmatch("") is not None:
        raise ConfigError(
            f"corrector.split: {split!r} matches an empty text, so that every letter would end a step; write what "
            f"stands between steps, or one of {', '.join(SEPARATORS)}"
        )
    return pattern


def step_ends(text: str, pattern: re.Pattern[str], finished: bool) -> list[int]:
    """Return after how many characters each step ends. A step is never blank: blanks go to the step before or after.

    Where `finished` is false the text was cut off, and what stands after the last separator is no step.
    """
    ends: list[int] = []
    begin = 0
    for match in pattern.finditer(text):
        if text[begin : match.end()].strip():
            ends.append(match.end())
            begin = match.end()
        elif ends:
            ends[-1] = begin = match.end()
    if finished and text[begin:].strip():
        ends.append(len(text))
    elif finished and ends:
        ends[-1] = len(text)
    return ends


@dataclass(frozen=True)
class Decoding:
    """How ids become text. `text` returns that of a completion's first ids; `pieces` remembers that of single ones."""

    text: Callable[[Sequence[int]], str]
    pieces: dict[int, str] = field(default_factory=dict)

    def piece(self, token: int) -> str:
        """Return the text of one token by itself."""
        if token not in self.pieces:
            self.pieces[token] = self.text([token])
        return self.pieces[token]


def cut(ids: Sequence[int], text: str, ends: Sequence[int], decoding: Decoding) -> list[Step]:
    """Return the steps whose texts end after `ends` characters, as slices of `ids`.

    A step ends with the first token after which all of its text is there. If that token holds the beginning of the next
    step too, that beginning goes to this one: ids are never changed. Joined, the steps are the beginning of `text`, and
    their tokens the beginning of `ids`.

    Args:
        ids: as sampled; an end token that `text` does not show is no part of a step.
        text: what they decode to.
        ends: see `step_ends`.
        decoding: how `ids` became `text`.

    """
    reach = reach_of(ids, text, decoding)
    steps: list[Step] = []
    begin = shown = 0
    for end in ends:
        count = bisect_left(reach, end, lo=begin)
        if count == begin or count == len(reach):
            continue  # the step lies within the last token of the one before
        steps.append(Step(text[shown : reach[count]], count - begin))
        begin, shown = count, reach[count]
    return steps


def reach_of(ids: Sequence[int], text: str, decoding: Decoding) -> list[int]:
    """Return how many characters of `text` are there after 0, 1, 2, … of `ids`; never falling."""
    reach = [0]
    for length in _lengths(ids, text, decoding):
        reach.append(max(reach[-1], length))
    return reach


def _lengths(ids: Sequence[int], text: str, decoding: Decoding) -> Iterator[int]:
    pieces = [decoding.piece(token) for token in ids]
    if "".join(pieces) == text:  # as with most tokenizers and texts; else the beginnings are decoded one by one
        total = 0
        for piece in pieces:
            total += len(piece)
            yield total
        return
    for count in range(1, len(ids) + 1):
        shown = decoding.text(ids[:count])
        yield len(shown) if text.startswith(shown) else 0  # it ends within a character, or is an end token
