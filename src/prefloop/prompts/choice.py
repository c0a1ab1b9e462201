"""Which prompts, in which order: by what their index says, so that none of them is read for it."""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from prefloop.errors import DataError
from prefloop.prompts.store import NO_ORIGIN, Picked, ids_of, index_of, pick
from prefloop.rows import Prompt


def first_by_id(prompts: Sequence[Prompt], most: int | None) -> Picked:
    """Return the `most` prompts with the smallest ids, in the order of ids; with None all of them."""
    return pick(prompts, np.argsort(index_of(prompts).ids, kind="stable")[:most])


def drawn(prompts: Sequence[Prompt], seed: int) -> NDArray[np.int64]:
    """Return the places of prompts in an order that only `seed` and their ids decide: by `digest_of(seed, id)`."""
    texts = (f'[{seed},"{name}"]'.encode() for name in ids_of(prompts))
    keys = np.fromiter((int.from_bytes(sha256(text).digest()[:8]) for text in texts), np.uint64, len(prompts))
    return np.argsort(keys, kind="stable")


def places_by_origin(prompts: Sequence[Prompt], none: str) -> dict[str, NDArray[np.int64]]:
    """Return the places of the prompts of each origin, in the order in which these first appear.

    Raises:
        DataError: a prompt has none; its place is followed by what `none` says.

    """
    found = index_of(prompts)
    nameless = np.flatnonzero(found.origins == NO_ORIGIN)
    if len(nameless):
        raise DataError(f"{prompts[int(nameless[0])].source}: {none}")
    numbers, first = np.unique(found.origins, return_index=True)
    return {found.names[number]: np.flatnonzero(found.origins == number) for number in numbers[np.argsort(first)]}


class Margins(Mapping[str, float]):
    """Margins by prompt id (see `protocols.Allotment`), 16 bytes each; gone through in the order of ids."""

    def __init__(self, margins: Iterable[tuple[str, float]]) -> None:
        """Take in ids and their margins; of several with one id, the last."""
        ids, values = array("Q"), array("d")
        for name, margin in margins:
            ids.append(int(name, 16))
            values.append(margin)
        backwards = np.frombuffer(ids, np.uint64)[::-1] if ids else np.empty(0, np.uint64)
        self.ids, last = np.unique(backwards, return_index=True)
        self.values_by_id = np.frombuffer(values, np.float64)[::-1][last] if ids else np.empty(0)

    def __getitem__(self, name: str) -> float:
        """Return the margin of a prompt."""
        number = int(name, 16)
        place = int(np.searchsorted(self.ids, np.uint64(number)))
        if place == len(self.ids) or int(self.ids[place]) != number:
            raise KeyError(name)
        return float(self.values_by_id[place])

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        """Yield the ids."""
        return (f"{number:016x}" for number in self.ids)


def by_id(margins: Mapping[str, float]) -> Iterable[tuple[str, float]]:
    """Return ids and margins in the order of ids."""
    return margins.items() if isinstance(margins, Margins) else sorted(margins.items())
