"""Putting many requests to several endpoints at once, and keeping only answers that are known to be the policy's."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from prefloop.endpoint import Trouble
from prefloop.errors import SamplerError
from prefloop.sample._server_hold import Held, Receipt, Serving
from prefloop.sample._server_lanes import Lane, Lanes, Stopped
from prefloop.sample._server_wire import LEVEL_REFUSED, LEVELS, Drawn, Wanted, read

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What one endpoint drew."""

    drawn: list[Drawn]
    lane: Lane
    receipt: Receipt

    @property
    def sure(self) -> bool:
        """Whether it is known to be the policy's."""
        return self.lane.hold.sure(self.receipt)


@dataclass(frozen=True)
class Asking:
    """The requests of one call of the sampler, on their way.

    `call` sends one at a level of detail; `refusal` says in words why one failed for good; `tells` says that an
    endpoint which does not know the policy is told of it again.
    """

    lanes: Lanes
    call: Callable[[Wanted, Lane, int, Serving], Any]
    refusal: Callable[[Wanted, Lane, Trouble], str]
    tells: bool

    def draw(self, asked: Sequence[Wanted]) -> list[list[Drawn]]:
        """Return the completions of each request, in order.

        Raises:
            SamplerError: the endpoints failed for good, or refuse a request.

        """
        answers: dict[int, list[Answer]] = {}
        while missing := [index for index in range(len(asked)) if index not in answers]:
            found = self._answers([asked[index] for index in missing])
            for lane in self.lanes.lanes:
                if any(one.lane is lane and not one.sure for some in found for one in some):
                    lane.hold.look()
            sure = {index: some for index, some in zip(missing, found, strict=True) if all(one.sure for one in some)}
            if len(sure) < len(missing):
                _log.warning(
                    "sampler: %d of %d requests are made again: their endpoint was restarted, or has other weights now",
                    *(len(missing) - len(sure), len(missing)),
                )
            answers |= sure
        return [[drawn for one in answers[index] for drawn in one.drawn] for index in range(len(asked))]

    def _answers(self, asked: Sequence[Wanted]) -> list[list[Answer]]:
        with ThreadPoolExecutor(self.lanes.concurrency * len(self.lanes.lanes)) as pool:
            futures = [pool.submit(self._answer, wanted) for wanted in asked]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    if isinstance(error := future.exception(), BaseException) and not isinstance(error, Stopped):
                        raise error
            except BaseException:
                self.lanes.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in futures]

    def _answer(self, wanted: Wanted) -> list[Answer]:
        """Ask until all completions of a request are there. Runs in a thread of its own."""
        answers: list[Answer] = []
        while (count := sum(len(one.drawn) for one in answers)) < wanted.count:
            # With the same seed the server would send the same again.
            rest = replace(wanted, count=wanted.count - count, seed=wanted.seed + count)
            lane, found = self.lanes.send(partial(self._attempt, rest))
            if isinstance(found, Trouble):
                self.lanes.stop()
                raise SamplerError(self.refusal(wanted, lane, found))
            answers.append(found)
        return answers

    def _attempt(self, wanted: Wanted, lane: Lane) -> Answer | Trouble:
        """Ask once, after the endpoint was told of the policy."""
        held = lane.hold.ready()
        if isinstance(held, Trouble):
            return held
        found = self._asked(wanted, lane, held)
        if not isinstance(found, Trouble):
            return Answer(found, lane, Receipt(held, time.monotonic()))
        unknown = self.tells and held.serving.is_unknown(found)
        if unknown or found.status is None:
            lane.hold.doubt(held, gone=unknown)
        # One that was restarted does not know the policy's name, and is told of it again.
        return replace(found, again=True) if unknown else found

    def _asked(self, wanted: Wanted, lane: Lane, held: Held) -> list[Drawn] | Trouble:
        """Ask for as much as the server can tell, and for less where it refuses that."""
        level = lane.level
        while True:
            found: Any = self.call(wanted, lane, level, held.serving)
            if not isinstance(found, Trouble):
                lane.level, lane.known = max(level, lane.level), True
                if not held.serving.agrees(found):
                    lane.hold.doubt(held, gone=True)
                    return Trouble("it answered with other weights than the policy's", again=True, status=200)
                return read(found, wanted)
            # Another request may have found out meanwhile that the server can tell less than this one asks for.
            settled = level == LEVELS - 1 or (lane.known and level >= lane.level)
            if settled or found.status not in LEVEL_REFUSED:
                return found
            level = max(level + 1, lane.level)
