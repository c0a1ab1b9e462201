"""The rows of the prompts' source as they stand in the file, before anything is dropped. Torch-free."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from prefloop.errors import DataError
from prefloop.prompt_inputs import embedded_prompts
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
    key: str
    prompt: str
    candidates: tuple[Candidate, ...]
    labelled: bool
    asked: Prompt

    @property
    def rated(self) -> tuple[Candidate, ...]:
        """The candidates that have a score, the best first."""
        known = [c for c in self.candidates if c.score is not None]
        return tuple(sorted(known, key=lambda c: c.score or 0.0, reverse=True))


@dataclass(frozen=True, slots=True)
class Scan:
    """A source's rows. `unreadable` says why rows cannot be used, `different` where the two sides' prompts differ,
    `half` where only one side is given."""

    rows: tuple[Row, ...]
    unreadable: tuple[str, ...] = ()
    different: tuple[str, ...] = ()
    cut: bool = False
    half: tuple[str, ...] = ()

    @property
    def readable(self) -> PromptSet:
        """The prompts of the rows that can be read, the first of each, where others stop the reader."""
        first: dict[str, Prompt] = {}
        for row in self.rows:
            first.setdefault(row.asked.prompt_id, row.asked)
        return PromptSet(tuple(first.values()))


def scan(settings: PromptSettings) -> Scan:
    """Read the rows of a source; those that cannot be used are noted, and do not stop the reading."""
    rows: list[Row] = []
    unreadable: list[str] = []
    different: list[str] = []
    half: list[str] = []
    source = read_rows(str(embedded_prompts(settings.path) or settings.path), settings.split)
    limit = min(settings.limit or MOST_ROWS, MOST_ROWS)
    seen = 0
    try:
        for place, row in islice(source, limit):
            seen += 1
            if _two_prompts(row, settings.column):
                different.append(f"{place}: {_said(row['chosen'])} against {_said(row['rejected'])}")
                continue
            if "rejected" in row and (row["rejected"] is None) != (row.get("chosen") is None):
                half.append(f"{place}: no {'rejected' if row['rejected'] is None else 'chosen'} completion")
            try:
                rows.append(_row(place, row, settings))
            except DataError as error:
                unreadable.append(str(error))
    except DataError as error:  # the file itself: nothing after it can be read
        unreadable.append(str(error))
    return Scan(tuple(rows), tuple(unreadable), tuple(different), seen == MOST_ROWS, tuple(half))


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
    return Row(place, json.dumps(value, sort_keys=True, default=str), _said(value), found, is_labelled(row), asked)


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
