"""Keeping one endpoint at the round's policy: told before it is asked, looked at again when it may have been restarted.

A server that dies and comes back serves what it was started with. Where a request names the policy that is no danger:
the new process does not know the name. Where weights are exchanged under one name, what was answered counts only once
a later look has shown that the same process, with the same weights, was there all the time.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prefloop.endpoint import Trouble

UNKNOWN = 404
"""Status with which a server does not know the model; SGLang says 400 of an adapter, and names it."""
LOOK_AFTER = 2.0
"""Seconds after which an endpoint is looked at again before it is asked for more."""


@dataclass(frozen=True)
class Serving:
    """How an endpoint is asked for the policy: the model's name and further fields of a request.

    `version` is what a response must say of its weights if it says anything. `check` says whether the endpoint still
    serves the policy; `None` where no other process would answer to the name.
    """

    model: str
    extra: tuple[tuple[str, str], ...] = ()
    version: str | None = None
    check: Callable[[], bool | Trouble] | None = None

    def is_unknown(self, found: Trouble) -> bool:
        """Return whether the endpoint does not know the policy, or no longer."""
        return found.status == UNKNOWN or (found.status == 400 and any(name in found.why for _, name in self.extra))

    def agrees(self, response: Any) -> bool:
        """Return whether a response is by these weights, as far as it says; SGLang's do."""
        facts = response.get("metadata") if isinstance(response, dict) else None
        said = facts.get("weight_version") if isinstance(facts, dict) else None
        return self.version is None or said is None or said == self.version


@dataclass(frozen=True)
class Held:
    """What a request goes by: how to ask, and in which life of the endpoint that was found out."""

    serving: Serving
    life: int


@dataclass(frozen=True)
class Receipt:
    """What an answer was asked by, and when it came, on the clock of `time.monotonic`."""

    held: Held
    at: float


@dataclass
class Hold:
    """One endpoint's state. `tell` makes it serve the policy. May be used by many threads.

    `life` counts the times that it was found to serve something else than it was told.
    """

    tell: Callable[[], Serving | Trouble]
    serving: Serving | None = None
    life: int = 0
    _doubted: bool = False
    _seen: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ready(self) -> Held | Trouble:
        """Return how to ask for the policy, after telling the endpoint of it where that is needed."""
        with self._lock:
            old = self._doubted or time.monotonic() - self._seen > LOOK_AFTER
            if self.serving is not None and self.serving.check is not None and old and (found := self._look()):
                return found
            if self.serving is None:
                now = time.monotonic()
                told = self.tell()
                if isinstance(told, Trouble):
                    return told
                self.serving, self._seen, self._doubted = told, now, False
            return Held(self.serving, self.life)

    def doubt(self, held: Held, gone: bool = False) -> None:
        """Look again before the next request: the endpoint may be another process now. `gone`: it surely is.

        `held` is what the request went by that made one doubt; another may have found out meanwhile.
        """
        with self._lock:
            if held.life == self.life:
                self._doubted = True
                if gone:
                    self._lose()

    def sure(self, receipt: Receipt) -> bool:
        """Return whether an answer is known to be the policy's."""
        with self._lock:
            if receipt.held.serving.check is None:
                return True
            return receipt.held.life == self.life and receipt.at <= self._seen

    def look(self) -> None:
        """Find out whether what came until now is the policy's; what cannot be found out is not."""
        with self._lock:
            if self.serving is not None and self.serving.check is not None and self._look():
                self._lose()

    def _look(self) -> Trouble | None:
        """Ask the endpoint what it serves; drop what was known of it if that is something else now."""
        assert self.serving is not None
        assert self.serving.check is not None
        now = time.monotonic()
        found = self.serving.check()
        if isinstance(found, Trouble):
            return found
        if found:
            self._seen, self._doubted = now, False
        else:
            self._lose()
        return None

    def _lose(self) -> None:
        self.serving = None
        self.life += 1
