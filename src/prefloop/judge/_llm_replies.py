"""What a judging model may answer, and how its reply is read: one verdict in the asked form, or none and why.

A reply is never guessed at. No number is taken from prose, none is clamped, and of two verdicts none is taken.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Protocol

Style = Literal["json", "text"]
"""json: the whole reply is one JSON object. text: the reply's last line is the verdict."""
REASON = "reason"
"""Key of a JSON reply that holds the judge's reasons."""
LONGEST = 200_000
"""Characters of the longest reply that is read."""
BEFORE = "`*_#>-\"' \t"
"""What may stand before a verdict on its line: Markdown, quotes and spaces."""
AROUND = "`*_\"' \t"
"""What may stand around a value. Neither a sign nor a point: -3 and .5 are not 3 and 5."""


class Values(Protocol):
    """A kind of value that a verdict can have."""

    def words(self) -> str:
        """Return what is asked for, in words; never itself a value."""
        ...

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of a value."""
        ...

    def parse(self, text: str) -> object | None:
        """Return the value that `text` spells, `None` if it spells none."""
        ...

    def take(self, value: object) -> object | None:
        """Return a JSON value if it is one of these values, else `None`."""
        ...


@dataclass(frozen=True)
class WholeNumber:
    """A whole number from `low` to `high`."""

    low: int
    high: int

    def words(self) -> str:
        """Return what is asked for, in words."""
        return f"whole number from {self.low} to {self.high}"

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema; an enumeration, which more servers enforce than bounds."""
        if self.high - self.low <= 100:
            return {"type": "integer", "enum": list(range(self.low, self.high + 1))}
        return {"type": "integer", "minimum": self.low, "maximum": self.high}

    def parse(self, text: str) -> float | None:
        """Read `4`, `4/5` or `4 out of 5`, where 5 must be the highest value."""
        found = re.fullmatch(r"([+-]?[0-9]{1,9})(?:\s*(?:/|out of)\s*([0-9]{1,9}))?", text)
        if found is None or (found[2] is not None and int(found[2]) != self.high):
            return None
        return self.take(int(found[1]))

    def take(self, value: object) -> float | None:
        """Take a whole number in range; 4.0 and true are none."""
        if not isinstance(value, int) or isinstance(value, bool) or not self.low <= value <= self.high:
            return None
        return float(value)


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    options: tuple[str, ...]

    def words(self) -> str:
        """Return what is asked for, in words."""
        return f"{', '.join(self.options[:-1])} or {self.options[-1]}"

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        return {"type": "string", "enum": list(self.options)}

    def parse(self, text: str) -> str | None:
        """Read an option, in small or capital letters."""
        return next((option for option in self.options if option.lower() == text.lower()), None)

    def take(self, value: object) -> str | None:
        """Take an option, in small or capital letters."""
        return self.parse(value) if isinstance(value, str) else None


@dataclass(frozen=True)
class Ranking:
    """All of `names` from best to worst. A value is a tuple of places, one for each name; equals share a place."""

    names: tuple[str, ...]

    def words(self) -> str:
        """Return what is asked for, in words."""
        return f"{', '.join(self.names)} from best to worst, joined by > or, between equals, by ="

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        return {"type": "string"}

    def parse(self, text: str) -> tuple[int, ...] | None:
        """Read `B > A = C`, in which every name stands once."""
        tiers = [[name.strip().upper() for name in tier.split("=")] for tier in text.split(">")]
        if sorted(name for tier in tiers for name in tier) != sorted(self.names):
            return None
        place = {name: index for index, tier in enumerate(tiers) for name in tier}
        return tuple(place[name] for name in self.names)

    def take(self, value: object) -> tuple[int, ...] | None:
        """Take a string that spells a ranking."""
        return self.parse(value) if isinstance(value, str) else None


@dataclass(frozen=True)
class Reading:
    """A verdict: one value for each label of its form; or `None`, and `why` in words."""

    values: tuple[Any, ...] | None
    why: str = ""


@dataclass(frozen=True)
class Form:
    """What a verdict must look like: every label once, each with one of `values`."""

    labels: tuple[str, ...]
    values: Values

    def instructions(self, style: Style) -> str:
        """Return what the judge is told about its reply. Sent back as a reply, it is no verdict."""
        if style == "json":
            keys = ", ".join(f'"{label}": <{self.values.words()}>' for label in self.labels)
            return (
                "Reply with one JSON object and nothing else:\n"
                f'{{"{REASON}": <your reasons in a few sentences, a string>, {keys}}}'
            )
        lines = "\n".join(f"{_shown(label)}: <{self.values.words()}>" for label in self.labels)
        several = "these lines, each of them once" if len(self.labels) > 1 else "this line, once"
        return (
            "First give your reasons in a few sentences. "
            f"Then end with {several} and with nothing after, in exactly this form:\n{lines}"
        )

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of a reply: reasons first, so that the verdict follows from them."""
        properties = {REASON: {"type": "string"}, **{label: self.values.schema() for label in self.labels}}
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }

    def read(self, reply: str, style: Style) -> Reading:
        """Return the one verdict of `reply`, or none and why. Reasoning up to a last `</think>` is not read."""
        if len(reply) > LONGEST:
            return Reading(None, f"the reply has {len(reply)} characters")
        reply = reply.rpartition("</think>")[2].strip()
        if not reply:
            return Reading(None, "the reply is empty")
        return self._read_json(reply) if style == "json" else self._read_text(reply)

    def _read_json(self, reply: str) -> Reading:
        fenced = re.fullmatch(r"```(?:json)?\s*\n(.*)\n\s*```", reply, re.DOTALL)
        try:
            found = json.loads(fenced[1] if fenced else reply, object_pairs_hook=_once, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            return Reading(None, f"not one JSON object ({str(error)[:80]})")
        if not isinstance(found, dict):
            return Reading(None, f"not a JSON object but {type(found).__name__}")
        if set(found) - {REASON} != set(self.labels):
            wanted, there = ", ".join(self.labels), ", ".join(repr(key)[:40] for key in list(found)[:5]) or "none"
            return Reading(None, f"the JSON object must have the keys {wanted}, it has {there}")
        values = [self.values.take(found[label]) for label in self.labels]
        return self._complete(values, [found[label] for label in self.labels])

    def _read_text(self, reply: str) -> Reading:
        lines = [line for line in reply.splitlines() if line.strip(BEFORE)]
        named = [self._named_by(line) for line in lines]
        for label in self.labels:
            times = len(mentions(label, reply))
            if times != 1:
                return Reading(None, f"{_shown(label)} stands {times} times in the reply, not once")
            if label not in named:
                return Reading(None, f"{_shown(label)} is not on a line of its own")
        if named[-1] is None:
            return Reading(None, "the last line is not the verdict")
        spelled = {label: _value(line) for label, line in zip(named, lines, strict=True) if label is not None}
        texts = [spelled[label] for label in self.labels]
        return self._complete([self.values.parse(text) for text in texts], texts)

    def _named_by(self, line: str) -> str | None:
        """Return the label whose verdict `line` holds and nothing before it."""
        for label in self.labels:
            found = mentions(label, line)
            if found and not line[: found[0].start()].strip(BEFORE):
                return label
        return None

    def _complete(self, values: Sequence[object | None], given: Sequence[object]) -> Reading:
        for value, said, label in zip(values, given, self.labels, strict=True):
            if value is None:
                return Reading(None, f"{_shown(label)} must be {self.values.words()}, got {str(said)[:40]!r}")
        return Reading(tuple(values))


def mentions(label: str, text: str) -> list[re.Match[str]]:
    """Return every place where `text` has `label` and a colon or equals sign, however they are decorated."""
    return list(re.finditer(rf"{re.escape(label)}[\s*_`\"']*[:=]", text, re.IGNORECASE | re.ASCII))


def _value(line: str) -> str:
    return re.split("[:=]", line, maxsplit=1)[1].strip(AROUND).rstrip("." + AROUND)


def _shown(label: str) -> str:
    return label[:1].upper() + label[1:]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
