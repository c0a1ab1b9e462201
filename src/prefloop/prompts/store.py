"""Any number of prompts in a few bytes of memory each: the rows lie in a `Spool`, and an index says what rounds go by.

What chooses prompts works on the index (`index_of`), and returns a view of those that it took (`pick`): it reads them
when they are asked for.
"""

import json
from abc import abstractmethod
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prefloop.artifact import Artifact
from prefloop.rows import HOLDOUT, TRAIN, Candidate, Message, Prompt
from prefloop.spool import Spool

NO_ORIGIN = -1
WINDOW = 2
"""Parts of an artifact that are held in memory."""


@dataclass(frozen=True)
class PromptIndex:
    """What is known of prompts without reading them, 14 bytes each; every array is `[prompt]`.

    `ids` are prompt ids as numbers, `origins` places in `names`, or `NO_ORIGIN`.
    """

    ids: NDArray[np.uint64]
    held_out: NDArray[np.bool_]
    has_gold: NDArray[np.bool_]
    origins: NDArray[np.int32]
    names: tuple[str, ...]

    def take(self, places: NDArray[np.int64]) -> "PromptIndex":
        """Return the index of the prompts at `places`."""
        flags = self.held_out[places], self.has_gold[places]
        return PromptIndex(self.ids[places], *flags, self.origins[places], self.names)

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.ids)

    def names_of(self, places: NDArray[np.int64]) -> Iterator[str]:
        """Yield the ids of the prompts at `places`, as they stand in `Prompt.prompt_id`."""
        for first in range(0, len(places), 4096):
            yield from (f"{number:016x}" for number in self.ids[places[first : first + 4096]].tolist())


class Prompts(Sequence[Prompt]):
    """Prompts that are read when they are asked for; equal to any sequence of the same prompts."""

    @property
    @abstractmethod
    def known(self) -> PromptIndex:
        """What is known of them without reading them."""

    @overload
    def __getitem__(self, place: int) -> Prompt: ...
    @overload
    def __getitem__(self, place: slice) -> "Picked": ...
    def __getitem__(self, place: int | slice) -> "Prompt | Picked":
        """Return a prompt, or a view of several."""
        if isinstance(place, slice):
            return Picked(self, np.arange(len(self))[place])
        place = place + len(self) if place < 0 else place
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self._read(place)

    def __eq__(self, other: object) -> bool:
        """Compare with another sequence of prompts, one by one."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    @abstractmethod
    def _read(self, place: int) -> Prompt: ...


class _Builder:
    """An index that grows."""

    def __init__(self) -> None:
        self.ids, self._held_out, self._has_gold = array("Q"), bytearray(), bytearray()
        self._origins = array("i")
        self._names: dict[str, int] = {}

    def add(self, name: str, held_out: bool, has_gold: bool, origin: str | None) -> None:
        """Note one more prompt."""
        self.ids.append(int(name, 16))
        self._held_out.append(held_out)
        self._has_gold.append(has_gold)
        self._origins.append(NO_ORIGIN if origin is None else self._names.setdefault(origin, len(self._names)))

    def index(self) -> PromptIndex:
        """Return the index; nothing can be added while it is in use."""
        return PromptIndex(
            np.frombuffer(self.ids, np.uint64),
            np.frombuffer(self._held_out, np.bool_),
            np.frombuffer(self._has_gold, np.bool_),
            np.frombuffer(self._origins, np.int32),
            tuple(self._names),
        )


class StoredPrompts(Prompts):
    """All prompts of a source. `append` them first; the index, and views, are for afterwards."""

    def __init__(self) -> None:
        """Begin without prompts."""
        self._rows = Spool(encode, decode)
        self._index = _Builder()

    @property
    def ids(self) -> "array[int]":
        """Prompt ids as numbers, in order."""
        return self._index.ids

    def append(self, prompt: Prompt) -> None:
        """Add a prompt at the end."""
        self._index.add(prompt.prompt_id, prompt.split == HOLDOUT, prompt.gold is not None, prompt.origin)
        characters = sum([len(m.content) for m in prompt.messages])
        if prompt.candidates:
            characters += sum([len(c.text) for c in prompt.candidates])
        self._rows.append(prompt, characters)

    @property
    def known(self) -> PromptIndex:
        """What is known of them without reading them."""
        return self._index.index()

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self._rows)

    def __iter__(self) -> Iterator[Prompt]:
        """Yield all prompts, in order."""
        return iter(self._rows)

    def _read(self, place: int) -> Prompt:
        return self._rows[place]


class MadePrompts(Prompts):
    """The prompts of a finished artifact, read part by part; at most `WINDOW` parts are held at once.

    Reading raises CorruptArtifact where a part is missing or damaged.
    """

    def __init__(self, artifact: Artifact[Prompt]) -> None:
        """Read no more than how many rows each part has."""
        self._artifact, self._parts = artifact, artifact.stored_parts()
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self._held: OrderedDict[int, list[Prompt]] = OrderedDict()

    @cached_property
    def known(self) -> PromptIndex:
        """What is known of them without reading them whole."""
        known = _Builder()
        for path in self._artifact.part_paths():
            table = pq.read_table(path, columns=["prompt_id", "split", "gold", "origin"])
            gold = pc.is_valid(table["gold"]).to_pylist()
            columns = [table[name].to_pylist() for name in ("prompt_id", "split", "origin")]
            for name, split, origin, has_gold in zip(*columns, gold, strict=True):
                known.add(name, split == HOLDOUT, has_gold, origin)
        return known.index()

    def __len__(self) -> int:
        """Return the number of prompts."""
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[Prompt]:
        """Yield all prompts, in order."""
        return iter(self._artifact)

    def _read(self, place: int) -> Prompt:
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        if number not in self._held:
            self._held[number] = list(self._parts[number])
            if len(self._held) > WINDOW:
                self._held.popitem(last=False)
        return self._held[number][place - int(self._starts[number])]


class Picked(Prompts):
    """Some prompts of a sequence, in an order of their own: a view of 8 bytes a prompt."""

    def __init__(self, base: Sequence[Prompt], places: NDArray[np.int64]) -> None:
        """Show the prompts of `base` that stand at `places`; a view of a view is one of what that shows."""
        self.base: Sequence[Prompt] = base.base if isinstance(base, Picked) else base
        self.places: NDArray[np.int64] = base.places[places] if isinstance(base, Picked) else places

    @property
    def known(self) -> PromptIndex:
        """What is known of them without reading them."""
        return index_of(self.base).take(self.places)

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.places)

    def _read(self, place: int) -> Prompt:
        return self.base[int(self.places[place])]


def index_of(prompts: Sequence[Prompt]) -> PromptIndex:
    """Return the index of prompts, wherever they are."""
    if isinstance(prompts, Prompts):
        return prompts.known
    known = _Builder()
    for prompt in prompts:
        known.add(prompt.prompt_id, prompt.split == HOLDOUT, prompt.gold is not None, prompt.origin)
    return known.index()


def pick(prompts: Sequence[Prompt], places: NDArray[np.int64]) -> Picked:
    """Return a view of the prompts at `places`."""
    return Picked(prompts, places)


def ids_of(prompts: Sequence[Prompt]) -> Iterator[str]:
    """Yield the ids of prompts, in order."""
    found = index_of(prompts)
    return found.names_of(np.arange(len(found)))


def sides_of(prompts: Sequence[Prompt]) -> Iterator[tuple[str, str]]:
    """Yield id and split of prompts, in order."""
    held_out = index_of(prompts).held_out
    return ((name, HOLDOUT if out else TRAIN) for name, out in zip(ids_of(prompts), held_out, strict=True))


def encode(prompt: Prompt) -> bytes:
    """Return a prompt as a line of JSON."""
    turns = [(m.role, m.content) for m in prompt.messages]
    rated = [(c.text, c.score, c.source) for c in prompt.candidates]
    row = (prompt.prompt_id, turns, prompt.gold, prompt.split, prompt.source, prompt.media, rated, prompt.origin)
    return json.dumps(row).encode()


def decode(line: bytes) -> Prompt:
    """Return the prompt that `encode` made a line of."""
    name, turns, gold, split, source, media, rated, origin = json.loads(line)
    messages = tuple([Message(role, content) for role, content in turns])
    candidates = tuple([Candidate(text, score, of) for text, score, of in rated])
    return Prompt(name, messages, gold, split, source, tuple(media), candidates, origin)
