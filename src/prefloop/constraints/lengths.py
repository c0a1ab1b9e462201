"""Instructions on how many words, sentences and paragraphs there are."""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from prefloop.constraints.textparts import Relation, compare, count_sentences, count_words
from prefloop.constraints.wording import Count, Phrase


@dataclass(frozen=True)
class NumberWords:
    """Words are fewer than, or at least, `num_words`. See `textparts.count_words`."""

    num_words: Count
    relation: Relation

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        return compare(count_words(text), self.relation, self.num_words)


@dataclass(frozen=True)
class NumberSentences:
    """Sentences are fewer than, or at least, `num_sentences`. See `textparts.count_sentences`."""

    num_sentences: Count
    relation: Relation

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        return compare(count_sentences(text), self.relation, self.num_sentences)


@dataclass(frozen=True)
class NumberParagraphs:
    """Exactly `num_paragraphs` parts between Markdown dividers `***`; a blank one is allowed first and last only."""

    num_paragraphs: Count

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        parts = [part.strip() for part in text.split("***")]
        return all(parts[1:-1]) and sum(map(bool, parts)) == self.num_paragraphs


@dataclass(frozen=True)
class NthParagraphFirstWord:
    """Exactly `num_paragraphs` paragraphs, and number `nth_paragraph`, from 1, starts with `first_word`, in any case.

    Paragraphs are separated by exactly two line breaks. Blank ones do not count, but do take a place when the nth is
    looked up, as in the authors' code. A word ends at punctuation; quotes before it are ignored.
    """

    num_paragraphs: Annotated[int, Field(gt=0)]
    nth_paragraph: Annotated[int, Field(gt=0)]
    first_word: Phrase

    def __post_init__(self) -> None:
        if self.nth_paragraph > self.num_paragraphs:
            raise ValueError(f"nth_paragraph {self.nth_paragraph} is above num_paragraphs {self.num_paragraphs}")

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        parts = [part.strip() for part in text.split("\n\n")]
        if sum(map(bool, parts)) != self.num_paragraphs or not parts[self.nth_paragraph - 1]:
            return False
        word = parts[self.nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
        return re.split(r"[.,?!'\"]", word, maxsplit=1)[0].lower() == self.first_word.lower()
