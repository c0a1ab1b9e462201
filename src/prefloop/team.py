"""The processes of one run: who they are, what they tell each other, and how all learn that one has failed.

`torchrun` (or `prefloop run --nproc N`) starts one process for each rank, and every rank runs the same code. Rank 0 is
the main one: it decides, writes, and speaks to the person. Small facts travel through torch's key-value store as JSON,
sums of tensors through gloo or NCCL; nothing is pickled. Waiting for another rank looks at the store again and again,
so that a failure anywhere ends the wait with its cause, and a stage that takes hours needs no long timeout.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from prefloop.errors import ConfigError, RankLost

if TYPE_CHECKING:
    from torch import Tensor

FAILURE = "failure"
"""Key of what the first rank that failed has told."""
ALIVE = "alive"
"""Key, with a rank behind it, of a number that rises while the rank's process runs."""
MOST_SLEEP = 0.1
"""Seconds between looks at the store, at most."""


def seconds(variable: str, default: float) -> float:
    """Return the seconds that an environment variable names, or `default`.

    Raises:
        ConfigError: it names none.

    """
    text = os.environ.get(variable)
    if text is None:
        return default
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise ConfigError(f"{variable}={text}: must be a number of seconds > 0; leave it out for {default:.0f}")
    return found


class Store(Protocol):
    """What is used of torch's key-value store."""

    def set(self, key: str, value: str) -> None:
        """Set a key."""
        ...

    def get(self, key: str) -> bytes:
        """Return the value of a key that is there."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys are there."""
        ...

    def add(self, key: str, amount: int) -> int:
        """Add to a counter and return it."""
        ...

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Set a key that is not there yet, and return its value."""
        ...


@dataclass(eq=False)
class Team:
    """One rank's view of all `size` ranks; `local_size` of them are on its machine. Alone, every call is free."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    store: Store | None = None
    add: Callable[[Any], object] | None = None
    """Sums a tensor over all ranks, in place."""
    stalled: float = math.inf
    """Seconds without a sign of life after which a rank is given up."""
    _turn: int = 0

    @property
    def main(self) -> bool:
        """Whether this rank decides, writes and speaks."""
        return self.rank == 0

    def tell(self, value: Any = None) -> Any:
        """Return the main rank's `value`, JSON; the others wait for it."""
        if self.store is None:
            return value
        key = self._next()
        if self.main:
            self.store.set(key, json.dumps(value))
            return value
        return self._await(key)

    def gathered(self, value: Any = None) -> list[Any]:
        """Return the `value` of every rank, JSON, in their order, once all have given theirs."""
        if self.store is None:
            return [value]
        key = self._next()
        self.store.set(f"{key}/{self.rank}", json.dumps(value))
        return [self._await(f"{key}/{rank}") for rank in range(self.size)]

    def claims(self, count: int) -> Iterator[int]:
        """Yield numbers below `count`, each on one rank only, to whoever asks first."""
        if self.store is None:
            yield from range(count)
            return
        key = self._next()
        while (number := self.store.add(key, 1) - 1) < count:
            self.check_others()
            yield number

    def sum(self, tensor: "Tensor") -> "Tensor":
        """Replace `tensor` by its sum over all ranks, in place, and return it."""
        if self.add is not None:
            self.add(tensor)
        return tensor

    def check_others(self) -> None:
        """Raise what another rank has failed with, if one has.

        Raises:
            RankLost: names the rank and its cause.

        """
        assert self.store is not None
        if self.store.check([FAILURE]):
            raise lost(json.loads(self.store.get(FAILURE)))

    def _next(self) -> str:
        # Every rank asks for the same things in the same order.
        self._turn += 1
        return f"turn-{self._turn}"

    def _await(self, key: str) -> Any:
        assert self.store is not None
        pause = 0.001
        signs, since = [""] * self.size, [time.monotonic()] * self.size
        look = time.monotonic() + self.stalled / 10
        while not self.store.check([key]):
            self.check_others()
            if time.monotonic() > look:
                self._check_life(signs, since)
                look = time.monotonic() + self.stalled / 10
            time.sleep(pause)
            pause = min(2 * pause, MOST_SLEEP)
        return json.loads(self.store.get(key))

    def _check_life(self, signs: list[str], since: list[float]) -> None:
        """Note each rank's last sign of life in `signs`, and in `since` when it changed.

        Raises:
            RankLost: one has given none for too long.

        """
        assert self.store is not None
        for rank in range(self.size):
            key = f"{ALIVE}/{rank}"
            sign = self.store.get(key).decode() if self.store.check([key]) else ""
            if sign != signs[rank]:
                signs[rank], since[rank] = sign, time.monotonic()
            elif time.monotonic() - since[rank] > self.stalled:
                raise RankLost(
                    f"rank {rank} gave no sign of life for {self.stalled:.0f} s: it hangs, or its machine is gone; "
                    "what is finished is on disk, and the same command goes on"
                )


def lost(cause: dict[str, Any]) -> RankLost:
    """Return the error of a rank that stops because another has failed."""
    error = RankLost(f"rank {cause['rank']} on {cause['host']} stopped: {cause['why']}")
    error.exit_code = cause["exit_code"]
    return error


ALONE = Team()
"""A run in one process."""
