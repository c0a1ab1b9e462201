"""Instructions on words, letters, case, commas and language."""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, StringConstraints

from prefloop.constraints.language import detected, known_languages
from prefloop.constraints.textparts import Relation, capital_tokens, compare

Count = Annotated[int, Field(ge=0)]
Phrase = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


@dataclass(frozen=True)
class Existence:
    """Every keyword occurs somewhere, in any case, also inside a longer word.

    The authors read a keyword as a regular expression, here it is plain text; the same on their data.
    """

    keywords: Annotated[tuple[Phrase, ...], Field(min_length=1)]

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        return all(occurrences(keyword, text) for keyword in self.keywords)


@dataclass(frozen=True)
class Frequency:
    """The keyword occurs less often than, or at least, `frequency` times; counted as in `Existence`."""

    keyword: Phrase
    frequency: Count
    relation: Relation

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        return compare(occurrences(self.keyword, text), self.relation, self.frequency)


@dataclass(frozen=True)
class ForbiddenWords:
    """None of the words occurs, in any case; part of a longer word is no occurrence."""

    forbidden_words: Annotated[tuple[Phrase, ...], Field(min_length=1)]

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in self.forbidden_words)


@dataclass(frozen=True)
class LetterFrequency:
    """The letter, or other character, occurs less often than, or at least, `let_frequency` times, in any case."""

    letter: Annotated[str, StringConstraints(min_length=1, max_length=1)]
    let_frequency: Count
    let_relation: Relation

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        return compare(text.lower().count(self.letter.lower()), self.let_relation, self.let_frequency)


@dataclass(frozen=True)
class CapitalWordFrequency:
    """Tokens all in capitals are fewer than, or at least, `capital_frequency`. See `textparts.capital_tokens`."""

    capital_frequency: Count
    capital_relation: Relation

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        return compare(len(capital_tokens(text)), self.capital_relation, self.capital_frequency)


@dataclass(frozen=True)
class EnglishCapital:
    """English, and without a small letter. A text without a language's features counts, if in capitals."""

    def __post_init__(self) -> None:
        known_languages()  # so that a missing detector is known before any work

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        return text.isupper() and detected(text) in ("en", None)


@dataclass(frozen=True)
class EnglishLowercase:
    """English, and without a capital letter. A text without a language's features counts, if in small letters."""

    def __post_init__(self) -> None:
        known_languages()  # so that a missing detector is known before any work

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        return text.islower() and detected(text) in ("en", None)


@dataclass(frozen=True)
class ResponseLanguage:
    """The text's language is `language`, an ISO 639-1 code; one without a language's features counts as followed.

    `zh` means either script; the authors' detector knows `zh-cn` and `zh-tw` only.
    """

    language: Phrase

    def __post_init__(self) -> None:
        if self.language not in (known := known_languages()):
            raise ValueError(f"no such language; the detector knows {', '.join(sorted(known))}")

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        found = detected(text)
        return found is None or found == self.language or found.startswith(f"{self.language}-")


@dataclass(frozen=True)
class NoComma:
    """No comma; those of other scripts, such as the Arabic one, are not looked for."""

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        return "," not in text


def occurrences(keyword: str, text: str) -> int:
    """Return how often a keyword occurs in any case, without overlap."""
    return len(re.findall(re.escape(keyword), text, re.IGNORECASE))
