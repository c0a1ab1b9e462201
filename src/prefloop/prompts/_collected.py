"""The prompts of a source as its rows come, each once: repeats are noted, rows of one prompt are put together."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

from prefloop.prompts.store import StoredPrompts
from prefloop.rows import Candidate, Prompt
from prefloop.spool import Spool


@dataclass(frozen=True, slots=True)
class _More:
    """What a later row says of a prompt. `before` is the number, from 1, of the one before it; 0 where none is."""

    before: int
    candidates: tuple[Candidate, ...]
    gold: str | None


class _Places:
    """Which place a prompt's id has: a table of open addressing, 6 to 12 bytes an id, beside the ids themselves.

    Ids are digests, so that their last bits serve as hash.
    """

    def __init__(self, ids: "array[int]") -> None:
        self._ids = ids
        self._slots = array("I", bytes(4 * 1024))

    def of(self, number: int) -> int:
        """Return the place of an id; one that is not there is to be appended next, and its place is noted."""
        ids, slots = self._ids, self._slots
        mask = len(slots) - 1
        slot = number & mask
        while there := slots[slot]:
            if ids[there - 1] == number:
                return there - 1
            slot = (slot + 1) & mask
        place = len(ids)
        slots[slot] = place + 1
        if 3 * place > 2 * mask:
            self._grow(number)
        return place

    def _grow(self, last: int) -> None:
        size = 8 * len(self._slots)  # bytes of twice as many slots
        self._slots = array("I")  # the old ones are not needed
        slots = self._slots = array("I", bytes(size))
        mask = len(slots) - 1
        for place, number in enumerate(chain(self._ids, [last]), 1):
            slot = number & mask
            while slots[slot]:
                slot = (slot + 1) & mask
            slots[slot] = place


@dataclass
class Repeats:
    """Rows that were left out, as their prompt was there already. `shown` tells of the first ones."""

    count: int = 0
    with_other_gold: int = 0
    shown: list[str] = field(default_factory=list)

    def describe(self) -> tuple[str, ...]:
        """Return what was left out, in words; nothing where nothing was."""
        if not self.count:
            return ()
        more = ", …" if self.count > len(self.shown) else ""
        others = self.with_other_gold
        gold = f"; {others} of them with another gold answer, which is not used" if others else ""
        plural = "s" if self.count > 1 else ""
        return (f"{self.count} duplicate prompt{plural} dropped: {', '.join(self.shown)}{more}{gold}",)


SHOWN = 2
"""Repeats that are told of one by one."""


class Collected:
    """Prompts in the order in which they first came."""

    def __init__(self) -> None:
        """Begin without prompts."""
        self.repeats = Repeats()
        self._found = StoredPrompts()
        self._places = _Places(self._found.ids)
        self._gold = array("q")  # a hash of each gold answer
        self._more = Spool.of(_More)
        self._last = array("I")  # by place: the number, from 1, of the last of `_more`

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self._found)

    def place_of(self, identity: str) -> int:
        """Return the place of the prompt with this id; for a new one that is the number of prompts, and it is next."""
        return self._places.of(int(identity, 16))

    def add(self, prompt: Prompt) -> None:
        """Add the prompt that `place_of` has just found to be new."""
        self._found.append(prompt)
        self._gold.append(_hash(prompt.gold))

    def add_to(self, place: int, candidates: tuple[Candidate, ...], gold: str | None) -> None:
        """Add what another labelled row of a prompt says: candidates, and a gold answer where there was none."""
        if len(self._last) <= place:
            self._last.extend(array("I", bytes(4 * (len(self._found) - len(self._last)))))
        characters = sum(len(c.text) for c in candidates) + len(gold or "")
        self._more.append(_More(self._last[place], candidates, gold), characters)
        self._last[place] = len(self._more)
        self._gold[place] = self._gold[place] or _hash(gold)

    def note_repeat(self, place: int, row: str, gold: str | None) -> None:
        """Note that `row`, with this gold answer, is left out: its prompt is there already."""
        self.repeats.count += 1
        self.repeats.with_other_gold += _hash(gold) != self._gold[place]
        if len(self.repeats.shown) < SHOWN:
            self.repeats.shown.append(f"{row} repeats {self._found[place].source}")

    def finish(self) -> StoredPrompts:
        """Return all prompts, each with what its rows say."""
        del self._places, self._gold
        if not self._last:
            return self._found
        merged = StoredPrompts()
        for place, prompt in enumerate(self._found):
            last = self._last[place] if place < len(self._last) else 0
            merged.append(_with_more(prompt, list(self._said_later(last))[::-1]))
        return merged

    def _said_later(self, number: int) -> Iterator[_More]:
        while number:
            more = self._more[number - 1]
            yield more
            number = more.before


def _hash(gold: str | None) -> int:
    """Return 64 bits by which gold answers are told apart; 0 is that there is none."""
    return 0 if gold is None else hash(gold) or 1


def _with_more(prompt: Prompt, later: list[_More]) -> Prompt:
    """Return a prompt with the completions of its other labelled rows."""
    if not later:
        return prompt
    candidates, known, gold = list(prompt.candidates), set(prompt.candidates), prompt.gold
    for more in later:
        candidates += [candidate for candidate in more.candidates if candidate not in known]
        known.update(more.candidates)
        gold = more.gold if gold is None else gold
    return replace(prompt, candidates=tuple(candidates), gold=gold)
