"""What one person does at the page: look at a pair, judge it, take that back. No HTTP here."""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefloop.errors import ConfigError
from prefloop.label.consensus import agreement_of, as_json
from prefloop.label.difference import differences
from prefloop.label.pairs import Item, RoundPairs
from prefloop.label.store import BOTH_BAD, CHOSEN, REJECTED, SKIP, TIE, Click, Store
from prefloop.rows import VERBATIM, digest_of

SAID = ("left", "right", TIE, BOTH_BAD, SKIP)
"""What the page says: sides of the screen."""
LONGEST_EVENT = 64


@dataclass(frozen=True)
class Desk:
    """The pairs of a round and what was said of them.

    The page learns neither which side is chosen nor any score. Which side stands left is drawn from the annotator and
    the pair, so it is the same after a reload and another one for the next person.
    """

    pairs: RoundPairs
    store: Store

    def next(self, annotator: str, *, skipped: bool = False, key: str | None = None) -> dict[str, Any]:
        """Return the pair to judge next, and how far the annotator is.

        Args:
            annotator: who asks.
            skipped: go through the pairs that the annotator skipped, the longest skipped first.
            key: show this pair.

        """
        mine = {one.key: one for one in self.store.given(self.pairs.round, annotator) if one.key in self.pairs.by_key}
        open_ = [item for item in self.pairs.items if item.key not in mine]
        passed = sorted((one for one in mine.values() if one.verdict == SKIP), key=lambda one: one.number)
        item = None if key is None else self.pairs.by_key.get(key)
        if item is None and open_:
            item = open_[0]
        elif item is None and skipped and passed:
            item = self.pairs.by_key[passed[0].key]
        return {
            "annotator": annotator,
            "run": self.pairs.run,
            "round": self.pairs.round,
            "progress": {
                "total": len(self.pairs.items),
                "judged": len(mine) - len(passed),
                "skipped": len(passed),
            },
            "can_undo": self.store.can_undo(self.pairs.round, annotator),
            "pair": None if item is None else self._shown(item, annotator),
        }

    def click(self, annotator: str, *, key: str, said: str, event: str, skipped: bool) -> dict[str, Any]:
        """Store a verdict and return the next pair. It is on disk when this returns; the same event is stored once.

        Raises:
            ConfigError: an unknown pair or verdict, or no usable event.

        """
        item = self.pairs.by_key.get(key)
        if item is None:
            raise ConfigError(f"round {self.pairs.round} has no pair {key[:40]!r}; reload the page")
        if said not in SAID:
            raise ConfigError(f"a verdict is one of {', '.join(SAID)}, got {said[:40]!r}")
        self.store.add(
            self.pairs.round, self.pairs.judged, [Click(_event(event), annotator, item, _meant(said, item, annotator))]
        )
        return self.next(annotator, skipped=skipped)

    def undo(self, annotator: str, *, event: str, skipped: bool) -> dict[str, Any]:
        """Take the annotator's last click back and return its pair; without one, the next pair."""
        key = self.store.undo(self.pairs.round, annotator, _event(event))
        return self.next(annotator, skipped=skipped, key=key)

    def agreement(self) -> dict[str, Any]:
        """Return how far people agree on this round."""
        given = [one for one in self.store.given(self.pairs.round) if one.key in self.pairs.by_key]
        return as_json(agreement_of(given))

    def _shown(self, item: Item, annotator: str) -> dict[str, Any]:
        sides = (item.chosen, item.rejected)
        left, right = differences(*(sides if chosen_is_left(item.key, annotator) else sides[::-1]))
        return {
            "key": item.key,
            "prompt": [{"role": "" if m.role == VERBATIM else m.role, "text": m.content} for m in item.messages],
            "prefix": item.prefix,
            "left": left,
            "right": right,
        }


def chosen_is_left(key: str, annotator: str) -> bool:
    """Return which side the chosen completion of a pair has on the screen of an annotator."""
    name = unicodedata.normalize("NFC", annotator).casefold()
    return int(digest_of("side", name, key)[:8], 16) % 2 == 0


def _meant(said: str, item: Item, annotator: str) -> str:
    sides: Mapping[str, str] = {"left": CHOSEN, "right": REJECTED}
    if not chosen_is_left(item.key, annotator):
        sides = {"left": REJECTED, "right": CHOSEN}
    return sides.get(said, said)


def _event(event: str) -> str:
    if not 8 <= len(event) <= LONGEST_EVENT:
        raise ConfigError(f"a click has a name of 8 to {LONGEST_EVENT} characters, got {len(event)}; reload the page")
    return event
