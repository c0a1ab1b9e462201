"""A finding of `prefloop check`: how bad, how many, where, and what to do."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from prefloop.errors import printable

Severity = Literal["error", "warning", "info"]

SHOWN = 3
"""Example rows of a finding."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    `name` is stable and meant for scripts. `number` is what was counted or measured, in the unit that `text` names.
    An error stops a run; a warning spoils one; an info is a fact to look at.
    """

    name: str
    severity: Severity
    text: str
    number: float | None = None
    examples: tuple[str, ...] = ()
    advice: str = ""

    def lines(self) -> Iterator[str]:
        """Yield the finding as lines of text, without characters that a terminal would obey."""
        yield from map(printable, self._lines())

    def _lines(self) -> Iterator[str]:
        label = "" if self.severity == "info" else f"{self.severity.upper()} "
        yield f"{label}{self.name}: {self.text}"
        yield from (f"    {example}" for example in self.examples)
        if self.advice:
            yield f"    do: {self.advice}"


@dataclass
class Seen:
    """How many were seen, and the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(example)

    def __add__(self, later: "Seen") -> "Seen":
        """Return what was seen here and then there."""
        return Seen(self.count + later.count, [*self.first, *later.first][:SHOWN])

    def __len__(self) -> int:
        """Return how many were seen."""
        return self.count


def counted(
    name: str, places: Sequence[str] | Seen, text: str, advice: str, severity: Severity = "warning"
) -> Iterator[Finding]:
    """Yield a finding with the first of `places` as examples, if there are any; `text` follows their number."""
    if places:
        shown = places.first if isinstance(places, Seen) else places[:SHOWN]
        yield Finding(name, severity, f"{len(places)} {text}", len(places), tuple(shown), advice)


def worst(findings: Iterable[Finding]) -> Severity:
    """Return the worst severity; info where there is none."""
    order: tuple[Severity, ...] = ("info", "warning", "error")
    return max((f.severity for f in findings), key=order.index, default="info")


def short(text: str, length: int = 60) -> str:
    """Return `text` on one line, cut."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def quantiles(values: Sequence[int]) -> str:
    """Return shortest, quartiles, 95th percentile and longest of `values`, by nearest rank."""
    ordered = sorted(values)
    at = [ordered[round(q * (len(ordered) - 1))] for q in (0, 0.25, 0.5, 0.75, 0.95, 1)]
    return "min {} · 25 % {} · median {} · 75 % {} · 95 % {} · max {}".format(*at)
