"""Several endpoints that serve one model: each request goes to the least busy one that is up.

An endpoint that fails is left alone for a while, longer each time, and tried with one request at a time until it
answers. What it was asked goes to another one meanwhile, or waits.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from prefloop.endpoint import Address, Trouble, delay_after
from prefloop.errors import SamplerError
from prefloop.sample._server_hold import Hold

BUSY = (429, 503)
"""Status that says something of the server and nothing of the request: waiting for it ends with `Lanes.patience`."""
R = TypeVar("R")
_log = logging.getLogger(__name__)


class Stopped(SamplerError):
    """Another request has failed for good, so this one was not made."""


@dataclass
class Lane:
    """One endpoint at work. `hold` keeps it at the policy; `level` is how much can be asked of it.

    `due` is when it may be asked again; `down_since` when it first failed since it last answered, on the clock of
    `time.monotonic`. `known` says that a request at `level` has been answered.
    """

    address: Address
    client: Any
    hold: Hold
    level: int = 0
    known: bool = False
    running: int = 0
    failures: int = 0
    due: float = 0.0
    down_since: float | None = None
    why: str = ""


@dataclass
class Lanes:
    """The endpoints of a sampler. `concurrency` requests at a time go to each.

    `patience` is how long all of them may be down, in seconds; `retries` how often one request is tried again after
    an answer that is an error and not one of `BUSY`.
    """

    lanes: Sequence[Lane]
    concurrency: int
    patience: float
    retries: int
    stopped: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _queue: list[object] = field(default_factory=list)

    def send(self, attempt: Callable[[Lane], R | Trouble]) -> tuple[Lane, R | Trouble]:
        """Return what `attempt` brings, or trouble that will not pass, and where. May be called by many threads.

        Raises:
            SamplerError: no endpoint has answered for longer than `patience`.
            Stopped: `stop` was called.

        """
        errors = 0
        while True:
            lane = self._take()
            found: R | Trouble = Trouble("stopped", again=True)
            try:
                found = attempt(lane)
            except BaseException:
                self.stop()
                raise
            finally:
                self._release(lane, found)
            if not isinstance(found, Trouble) or not found.again:
                return lane, found
            errors += found.status not in (None, *BUSY)
            if errors > self.retries:
                return lane, found

    def stop(self) -> None:
        """Start no more attempts."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()

    def _take(self) -> Lane:
        with self._changed:
            ticket = object()
            self._queue.append(ticket)  # first come, first served: what a dead endpoint was asked waits no longer
            try:
                return self._wait(ticket)
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def _wait(self, ticket: object) -> Lane:
        while True:
            if self.stopped:
                raise Stopped("sampler: stopped")
            now = time.monotonic()
            free = [lane for lane in self.lanes if lane.due <= now and lane.running < self._room(lane)]
            if free and self._queue[0] is ticket:
                lane = min(free, key=lambda lane: (lane.failures, lane.running))
                lane.running += 1
                return lane
            self._lose_patience(now)
            later = [lane.due - now for lane in self.lanes if lane.due > now]
            self._changed.wait(min([*later, 1.0]))

    def _room(self, lane: Lane) -> int:
        return 1 if lane.failures else self.concurrency

    def _lose_patience(self, now: float) -> None:
        since = [lane.down_since for lane in self.lanes if lane.down_since is not None]
        if len(since) == len(self.lanes) and now - max(since) > self.patience:
            self.stopped = True
            self._changed.notify_all()
            told = "; ".join(f"{lane.address.base_url}: {lane.why}" for lane in self.lanes)
            raise SamplerError(
                f"sampler.base_url: no endpoint has answered for {self.patience:g} s ({told}); see to the server and "
                "give the same command: finished parts are kept"
            )

    def _release(self, lane: Lane, found: object) -> None:
        with self._changed:
            lane.running -= 1
            if not isinstance(found, Trouble) or not found.again:
                lane.failures, lane.down_since, lane.due = 0, None, 0.0
            elif not self.stopped:
                self._fail(lane, found)
            self._changed.notify_all()

    def _fail(self, lane: Lane, found: Trouble) -> None:
        now = time.monotonic()
        if lane.down_since is None:
            lane.down_since = now
            _log.warning("sampler: %s does not answer (%s); it is tried again", lane.address.base_url, found.why)
        if now < lane.due:
            return  # requests that were under way fail together, and count once
        delay = delay_after(lane.failures, found)
        lane.failures += 1
        lane.why = found.why
        lane.due = now + (self.patience if delay is None else delay)
