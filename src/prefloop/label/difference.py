"""Which words of two texts differ."""

import re
from difflib import SequenceMatcher

Segments = list[tuple[str, bool]]
"""A text in pieces; true: the other text does not have this one."""

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|\s+|[^\w\s]")
"""Words, runs of white space, signs; scripts that write no spaces go by character."""
EXACT = 400
"""Up to this many words every word counts for finding the common parts. Above it `difflib` passes over frequent ones,
without which a text that repeats itself takes minutes."""
SHORTEST = 3
"""Common parts of fewer words between two differences are marked with them: marks that change word by word cannot be
read."""
LITTLE = 0.1
"""Texts with a smaller common share have no marks: all of it would be marked."""


def differences(left: str, right: str) -> tuple[Segments, Segments]:
    """Return both texts in pieces, each with whether it differs. The pieces of a text joined are the text.

    Example:
        >>> differences("a red car stood here", "a red bus stood here")[1]
        [('a red ', False), ('bus', True), (' stood here', False)]

    """
    words: list[list[str]] = [_WORD.findall(text) for text in (left, right)]
    matcher = SequenceMatcher(None, words[0], words[1], autojunk=max(map(len, words)) > EXACT)
    blocks = [block for block in matcher.get_matching_blocks() if block.size]
    kept = [
        block
        for index, block in enumerate(blocks)
        if _count(words[0][block.a : block.a + block.size]) >= SHORTEST
        or _touches_end(words, block, first=index == 0, last=index == len(blocks) - 1)
    ]
    sides: list[Segments] = []
    for side, text in enumerate(words):
        common = [(block[side], block[side] + block.size) for block in kept]
        sides.append(_pieces(text, common))
    shared = sum(len(piece.strip()) for piece, differs in sides[0] if not differs)
    if not shared or shared < LITTLE * min(len(left), len(right)):
        return [(left, False)], [(right, False)]
    return sides[0], sides[1]


def _count(words: list[str]) -> int:
    return sum(not word.isspace() for word in words)


def _touches_end(words: list[list[str]], block: tuple[int, int, int], *, first: bool, last: bool) -> bool:
    """Whether a common part is the beginning or the end of both texts: marks beside it are on one side of it only."""
    a, b, size = block
    return (first and a == b == 0) or (last and a + size == len(words[0]) and b + size == len(words[1]))


def _pieces(words: list[str], common: list[tuple[int, int]]) -> Segments:
    found: Segments = []
    at = 0
    for start, end in [*common, (len(words), len(words))]:
        found += [("".join(words[at:start]), True), ("".join(words[start:end]), False)]
        at = end
    return [(text, differs) for text, differs in found if text]
