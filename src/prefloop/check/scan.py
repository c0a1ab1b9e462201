"""The rows of the prompts' source as they stand in the file, before anything is dropped. Torch-free."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from prefloop.check.finding import Seen
from prefloop.errors import DataError
from prefloop.prompt_inputs import embedded_prompts
from prefloop.prompts._collected import Collected
from prefloop.prompts.candidates import candidates, is_labelled, with_explicit_prompt
from prefloop.prompts.dataset import PromptSet, messages_and_gold, origin_of, read_rows, side_of
from prefloop.recipe import PromptSettings
from prefloop.rows import Candidate, Prompt, prompt_id

MOST_ROWS = 200_000
"""Rows that are looked at; of a larger source, the first."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row that can be read. `key` tells prompts apart; `prompt` is its text as a person reads it."""

    place: str
    key: int
    prompt: str
    candidates: tuple[Candidate, ...]
    labelled: bool
    asked: Prompt

    @property
    def rated(self) -> tuple[Candidate, ...]:
        """The candidates that have a score, the best first."""
        known = [c for c in self.candidates if c.score is not None]
        return tuple(sorted(known, key=lambda c: c.score or 0.0, reverse=True))


@dataclass(slots=True)
class Scan:
    """What was noted of a source's rows. `unreadable` says why rows cannot be used, `different` where the two sides'
    prompts differ, `half` where only one side is given; `rows` could be read, and `cut` says that more were not."""

    rows: int = 0
    unreadable: Seen = field(default_factory=Seen)
    different: Seen = field(default_factory=Seen)
    half: Seen = field(default_factory=Seen)
    cut: bool = False


def scan(settings: PromptSettings, *readers: Callable[[Row], object]) -> Scan:
    """Go through the rows of a source; those that can be read are given to each of `readers`, and none is kept.

    Those that cannot be used are noted, and do not stop the reading.
    """
    found = Scan()
    source = read_rows(str(embedded_prompts(settings.path) or settings.path), settings.split)
    limit = min(settings.limit or MOST_ROWS, MOST_ROWS)
    seen = 0
    try:
        for place, row in islice(source, limit):
            seen += 1
            if _two_prompts(row, settings.column):
                found.different.add(f"{place}: {_said(row['chosen'])} against {_said(row['rejected'])}")
                continue
            if "rejected" in row and (row["rejected"] is None) != (row.get("chosen") is None):
                found.half.add(f"{place}: no {'rejected' if row['rejected'] is None else 'chosen'} completion")
            try:
                readable = _row(place, row, settings)
            except DataError as error:
                found.unreadable.add(str(error))
                continue
            found.rows += 1
            for reader in readers:
                reader(readable)
    except DataError as error:  # the file itself: nothing after it can be read
        found.unreadable.add(str(error))
    found.cut = seen == MOST_ROWS
    return found


class Readable:
    """The prompts of the rows that can be read, the first of each, where others stop the reader."""

    def __init__(self) -> None:
        """Begin without prompts."""
        self._found = Collected()

    def __call__(self, row: Row) -> None:
        """Take in a row."""
        if self._found.place_of(row.asked.prompt_id) == len(self._found):
            self._found.add(row.asked)

    def prompts(self) -> PromptSet:
        """Return them; nothing can be taken in afterwards."""
        return PromptSet(self._found.finish())


def _row(place: str, row: Mapping[str, Any], settings: PromptSettings) -> Row:
    column = settings.column
    row = with_explicit_prompt(place, row, column)
    messages, gold = messages_and_gold(place, row, column, settings.gold)
    identity, found = prompt_id(messages), candidates(place, row)
    side, origin = side_of(identity, settings.holdout), origin_of(place, row)
    asked = Prompt(identity, messages, gold, side, place, candidates=found, origin=origin)
    value = row["messages" if column == "prompt" and "prompt" not in row else column]
    if isinstance(value, list) and column != "prompt" and value and _role(value[-1]) == "assistant":
        value = value[:-1]
    key = hash(value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str))
    return Row(place, key, _said(value), found, is_labelled(row), asked)


def _two_prompts(row: Mapping[str, Any], column: str) -> bool:
    """Return whether a row without a prompt of its own has conversations that differ before the last turn."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if column in row or "messages" in row or not (isinstance(chosen, list) and isinstance(rejected, list)):
        return False
    return chosen[:-1] != rejected[:-1]


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, dict) else None


def _said(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(f"{_role(t)}: {t.get('content')}" for t in value if isinstance(t, dict))
    return str(value)
