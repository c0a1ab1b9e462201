"""Instructions on format: lists, highlights, sections, titles, JSON, what stands at the start and at the end."""

import json
import re
from dataclasses import dataclass

from prefloop.constraints.wording import Count, Phrase

ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
"""The options of `ConstrainedResponse`; the prompts name them, the data do not."""


@dataclass(frozen=True)
class NumberPlaceholders:
    """At least `num_placeholders` pairs of square brackets, each on one line; they may be empty."""

    num_placeholders: Count

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        return len(re.findall(r"\[[^\]\n]*\]", text)) >= self.num_placeholders


@dataclass(frozen=True)
class Postscript:
    """The marker occurs somewhere, in any case. `P.S.` and `P.P.S` may have a space after each full stop.

    Not only at the start of a line, and nothing need follow: so in the authors' code.
    """

    postscript_marker: Phrase

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
        pattern = spaced.get(self.postscript_marker, re.escape(self.postscript_marker))
        return re.search(pattern, text, re.IGNORECASE) is not None


@dataclass(frozen=True)
class NumberBulletLists:
    """Exactly `num_bullets` lines that start with `-` or with a single `*`, after white space.

    A ruler of hyphens counts and a line in bold type does not, both as in the authors' code. A lone `*` counts there
    and hides the next line; here it does not count.
    """

    num_bullets: Count

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        lines = (line.lstrip() for line in text.split("\n"))
        return sum(bool(re.match(r"-|\*[^*]", line)) for line in lines) == self.num_bullets


@dataclass(frozen=True)
class ConstrainedResponse:
    """One of `ANSWERS` occurs; other text may stand around it."""

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        return any(answer in text for answer in ANSWERS)


@dataclass(frozen=True)
class NumberHighlightedSections:
    """At least `num_highlights` spans between single or between double asterisks, each on one line and not blank."""

    num_highlights: Count

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        spans = re.findall(r"\*([^*\n]*)\*", text) + re.findall(r"\*\*([^*\n]*)\*\*", text)
        return sum(bool(span.strip()) for span in spans) >= self.num_highlights


@dataclass(frozen=True)
class MultipleSections:
    """The splitter with a number behind it occurs at least `num_sections` times, in the splitter's own case."""

    section_spliter: Phrase
    num_sections: Count

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        return len(re.findall(rf"{re.escape(self.section_spliter)}\s?\d+", text)) >= self.num_sections


@dataclass(frozen=True)
class JsonFormat:
    """All of it is one JSON value, with or without Markdown ticks around it."""

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        body = re.sub(r"\A```(?:json|Json|JSON)?|```\Z", "", text.strip())
        try:
            json.loads(body)
        except (ValueError, RecursionError):
            return False
        return True


@dataclass(frozen=True)
class Title:
    """Something not blank stands on one line between `<<` and `>>`."""

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", text))


@dataclass(frozen=True)
class TwoResponses:
    """Two different texts with six asterisks between them; the asterisks may also stand first and last."""

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        parts = [part.strip() for part in text.split("******")]
        if not all(parts[1:-1]):
            return False
        answers = [part for part in parts if part]
        return len(answers) == 2 and answers[0] != answers[1]


@dataclass(frozen=True)
class RepeatPrompt:
    """The text starts with `prompt_to_repeat`, in any case."""

    prompt_to_repeat: Phrase

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        return text.strip().lower().startswith(self.prompt_to_repeat.lower())


@dataclass(frozen=True)
class EndPhrase:
    """The text ends with `end_phrase`, in any case; double quotes behind it are ignored."""

    end_phrase: Phrase

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        return text.strip().strip('"').lower().endswith(self.end_phrase.lower())


@dataclass(frozen=True)
class Quotation:
    """The first and the last character are straight double quotes."""

    def __call__(self, text: str) -> bool:
        """Return whether `text` follows."""
        bare = text.strip()
        return len(bare) > 1 and bare[0] == bare[-1] == '"'
