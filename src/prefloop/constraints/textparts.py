"""Words, sentences and capital tokens of a text, and the eight readings of the loose criterion."""

import re
from typing import Literal

Relation = Literal["less than", "at least"]

_ABBREVIATION = re.compile(
    r"mr|mrs|ms|dr|prof|st|sr|jr|vs|etc|e\.g|i\.e|al|cf|inc|ltd|co|corp|no|vol|fig|dept|est|approx|gen|col|sgt|capt|lt"
    r"|rev|hon|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|a\.m|p\.m|u\.s|u\.k|ph\.d",
    re.IGNORECASE,
)
_MARKS = re.compile(r"[.!?…]+[\"'”’)\]}*_]*(?=\s|$)|[。！？।؟]+[\"'”’)\]}」』*_]*")
_SPLITS = re.compile(r"[\s;@#$%&?!()\[\]{}<>\"“”«»…]+|[:,](?!\d)|--+|\.{2,}")
_CONTRACTION = re.compile(r"(.+?)(n't|'s|'m|'d|'ll|'re|'ve)", re.IGNORECASE)
_FUSED = re.compile(r"(can)(not)|(gim)(me)|(gon)(na)|(got)(ta)|(lem)(me)|(wan)(na)", re.IGNORECASE)


def compare(count: int, relation: Relation, threshold: int) -> bool:
    """Return whether `count` is less than, or at least, `threshold`."""
    return count < threshold if relation == "less than" else count >= threshold


def count_words(text: str) -> int:
    """Return the number of runs of letters, digits and underscores: "don't" and "well-known" have two each."""
    return len(re.findall(r"\w+", text))


def count_sentences(text: str) -> int:
    """Return the number of sentences.

    A sentence ends at a full stop, question mark, exclamation mark or ellipsis before white space or the end, closing
    quotes, brackets and asterisks included; and at the marks of Chinese, Japanese, Hindi and Arabic. No sentence ends
    at a full stop after a common English abbreviation or a single capital letter, nor at an ellipsis before a small
    letter. What follows the last end is a sentence if it is not blank. A line break ends none, and "1." in a list is a
    sentence of its own, both as in the authors' tokenizer.

    That tokenizer is NLTK's Punkt with a model trained on English newspapers. The counts can differ at abbreviations
    that only one of the two knows, at initials ("Vitamin C. It helps" ends no sentence here), at full stops before a
    small letter, where the trained model weighs how often it saw the next word with a capital, and at marks of other
    scripts, where it ends none.

    Example:
        >>> count_sentences('Dr. Who left. "Why?" she asked')
        3

    """
    count = start = 0
    for mark in _MARKS.finditer(text):
        if _ends_sentence(text, start, mark):
            count += 1
            start = mark.end()
    return count + bool(text[start:].strip())


def _ends_sentence(text: str, start: int, mark: re.Match[str]) -> bool:
    dots = mark[0].rstrip("\"'”’)]}*_")
    if dots in ("...", "…"):
        return not text[mark.end() :].lstrip()[:1].islower()
    if dots != ".":
        return True
    last = text[start : mark.start()].rsplit(maxsplit=1)
    word = last[-1].lstrip("\"'“‘([{*_") if last else ""
    is_initial = len(word) == 1 and word.isupper() and word != "I"
    return not is_initial and _ABBREVIATION.fullmatch(word) is None


def capital_tokens(text: str) -> list[str]:
    """Return the tokens whose letters are all capitals: "NASA", "I", "COVID-19", and both halves of "DON'T".

    Tokens are those of NLTK's Treebank tokenizer, which the authors use, as far as it matters here: white space and
    most punctuation separate, hyphens, slashes, full stops and asterisks within a word do not, and a contraction is
    two tokens. Single quotes around a word stay with it.
    """
    return [part for token in _SPLITS.split(text) for part in _parts(token) if part.isupper()]


def _parts(token: str) -> list[str]:
    bare = token.strip(".,:")
    found = _CONTRACTION.fullmatch(bare) or _FUSED.fullmatch(bare)
    return [part for part in found.groups() if part] if found else [token]


def loose_readings(text: str) -> tuple[str, ...]:
    """Return the eight readings of the loose criterion (arXiv 2311.07911).

    The text as it is, without its first line, without its last, without both; and each of these without asterisks.
    Models tend to put an introduction first and a closing remark last, and to mark words in bold.
    """
    lines = text.split("\n")
    cuts = (text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])))
    return (*cuts, *(cut.replace("*", "") for cut in cuts))
