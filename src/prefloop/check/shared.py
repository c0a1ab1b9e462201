"""Texts that several prompts share, found by hashes: 12 bytes a text. Torch-free."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from prefloop.rows import Prompt

TextsOf = Callable[[Prompt], Iterable[str]]
"""The texts of a prompt that are compared."""


class Texts:
    """The texts of some of `prompts`. `note` them first; looking them up is for afterwards."""

    def __init__(self, prompts: Sequence[Prompt], of: TextsOf) -> None:
        """Begin without texts."""
        self._prompts, self._of = prompts, of
        self._hashes, self._places = array("q"), array("I")
        self._ordered: np.ndarray | None = None

    def note(self, place: int, prompt: Prompt) -> None:
        """Take in the texts of the prompt at `place`."""
        for text in self._of(prompt):
            self._hashes.append(hash(text))
            self._places.append(place)

    def owner(self, text: str) -> Prompt | None:
        """Return the last prompt that has `text`; `None` where none has."""
        hashes, value = self._sorted(), hash(text)
        place = int(np.searchsorted(hashes, value, side="right")) - 1
        if place < 0 or int(hashes[place]) != value:
            return None
        found = self._prompts[self._places[int(self._order[place])]]
        return found if text in self._of(found) else None

    def in_common(self, others: "Texts") -> Iterator[tuple[Prompt, Prompt, str]]:
        """Yield each prompt of these that shares a text with one of `others`, that one, and the text."""
        mine = np.frombuffer(self._hashes, np.int64)
        both = np.isin(mine, np.frombuffer(others._hashes, np.int64))
        for place in np.unique(np.frombuffer(self._places, np.uint32)[both]).tolist():
            prompt = self._prompts[place]
            for text in dict.fromkeys(self._of(prompt)):
                owner = others.owner(text)
                if owner is not None:
                    yield prompt, owner, text

    def _sorted(self) -> np.ndarray:
        if self._ordered is None:
            hashes = np.frombuffer(self._hashes, np.int64)
            self._order = np.argsort(hashes, kind="stable")
            self._ordered = hashes[self._order]
        return self._ordered
