"""Work of a round that begins before the stage above it is finished, on the parts that are on disk already.

While a server draws completions, those that are there can be judged; while an endpoint judges, pairs of what it has
said can be scored under the reference. The parts on disk are the queue: nothing is handed over in memory, so that a
kill loses no more than it did, and however far one stage is ahead of another, memory holds a part of each. What is made
ahead lies on a `shelf` until its stage takes it over, and is the same as what the stage would have made.

Only where the sampler or the judge waits on an endpoint: what computes in this process would only get in its own way.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

from prefloop import shelf, stages
from prefloop.artifact import MANIFEST, Artifact, Key
from prefloop.batching import Scorer, scored_ahead, serves
from prefloop.errors import Interrupted, PrefloopError
from prefloop.protocols import RoundContext, Sampler, needs_logps
from prefloop.rows import JudgedGroup, PolicyRef, PreferencePair, Prompt, SampleGroup
from prefloop.stages import Draw, NamedJudge, Run

R = TypeVar("R")


@dataclass
class Worker:
    """A thread that goes over the parts of a stage as they are finished.

    `work` yields after each part that it has looked at. `complete` tells it that the stage above is finished.
    """

    work: Callable[["Worker"], Iterator[None]]
    run: Run
    done: int = 0
    """Parts looked at so far."""
    error: BaseException | None = None
    complete: threading.Event = field(default_factory=threading.Event)
    """Set when the stage above is finished, so that there will be no further part."""
    _leave: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._go, name="ahead", daemon=True)
        self._thread.start()

    def _go(self) -> None:
        try:
            for _ in self.work(self):
                self.done += 1
                if self._leave.is_set() or self.run.stop():
                    return
        except _Left:
            pass
        except BaseException as error:  # raised again in the main thread
            self.error = error

    @property
    def failed(self) -> bool:
        """Whether it has stopped with an error."""
        return self.error is not None

    def ended(self) -> bool:
        """Return whether there is nothing to wait for: the parts are all there, or nobody wants more of them."""
        return self.complete.is_set() or self._leave.is_set()

    def wait(self, label: str, parts: int) -> None:
        """Wait until all parts are looked at, and show how far it is.

        Raises:
            Interrupted: the run was asked to stop.
            PrefloopError: what the work has failed with.

        """
        self.complete.set()
        shown = self.done
        self.run.progress.start(label, parts, "parts", shown)
        while self._thread.is_alive():
            self._thread.join(shelf.POLL)
            self.run.progress.advance(self.done - shown)
            shown = self.done
        self.run.progress.finish()
        if self.error is not None:
            raise self.error
        self.run.check_stop(label)

    def parts(self, folder: Path, key: Key, record: type[R]) -> Iterator[list[R]]:
        """Yield the parts of the artifact of `key` in `folder` as they are finished, until it is `complete`."""
        yield from shelf.as_they_come(folder, key, record, self.ended)
        if not self.complete.is_set():
            raise _Left

    def leave(self) -> None:
        """End after the part in hand."""
        self._leave.set()
        self._thread.join()


class _Left(Exception):
    """There are more parts, and nobody waits for them here."""


def waits(component: object) -> bool:
    """Return whether a sampler or judge waits on an endpoint, or on one of several."""
    if getattr(component, "base_url", None) is not None:
        return True
    members = getattr(component, "judges", ())
    return any(isinstance(m, Mapping) and m.get("base_url") is not None for m in members)


def sampled_and_judged(
    run: Run, folder: Path, prompts: Sequence[Prompt], draw: Draw, named: NamedJudge, context: RoundContext
) -> tuple[Artifact[SampleGroup], Artifact[JudgedGroup]]:
    """1-samples and 2-judged in `folder`, at once where `worth` says so."""
    above, below = folder / "1-samples", folder / "2-judged"
    if not worth(run, draw.sampler, named) or (above / MANIFEST).exists() or not run.team.main:
        samples = stages.sample(run, above, prompts, draw, context)
        return samples, stages.judge(run, below, samples, named, context)
    key = stages.samples_key(run, prompts, draw, context)

    def judge(worker: Worker) -> Iterator[None]:
        made = stages.judged_ahead(below, named)
        for index, groups in enumerate(worker.parts(above, key, SampleGroup)):
            found = made.take(index)
            if found is None or not stages.judges_these(found, groups, named):
                made.put(index, stages.judge_part(groups, named, context))
            yield

    worker = Worker(judge, run)
    # A judge that has failed for good ends the sampling too: see to it, and the same command goes on.
    until_failed = replace(run, stop=lambda: worker.failed or run.stop())
    try:
        samples = stages.sample(until_failed, above, prompts, draw, context)
    except BaseException as error:
        worker.leave()
        if isinstance(error, Interrupted) and worker.error is not None:
            raise worker.error from None
        raise
    worker.wait("judge", len(samples.stored_parts()))
    return samples, stages.judge(run, below, samples, named, context)


def worth(run: Run, sampler: Sampler, named: NamedJudge) -> bool:
    """Return whether sampling and what follows are to go on at once."""
    return run.recipe.overlap and (waits(sampler) or waits(named.judge))


@dataclass(frozen=True)
class Scored:
    """What 4-batches needs beside the round's own pairs: replayed ones, the reference, and the policy that starts."""

    replayed: Sequence[Artifact[PreferencePair]]
    reference: PolicyRef | None
    policy: PolicyRef


@contextmanager
def scoring(run: Run, folder: Path, scored: Scored, named: NamedJudge, context: RoundContext) -> Iterator[None]:
    """Inside, pairs of what is judged already are scored under the reference, for 4-batches in `folder`.

    Begins with the replayed pairs, as 4-batches does; not before the samples are there, if they are drawn in this
    process. An error in here is not the round's: 4-batches meets it again.
    """
    apart = scored.reference is None or run.team.size > 1 or run.parts.corrector is not None
    apart |= needs_logps(run.parts.pair_builder)
    if apart or not worth(run, run.parts.sampler, named) or (folder / "4-batches" / MANIFEST).exists():
        yield
        return

    def score(worker: Worker) -> Iterator[None]:
        while not (waits(run.parts.sampler) or (folder / "1-samples" / MANIFEST).exists() or worker.ended()):
            time.sleep(shelf.POLL)
        if worker.ended():
            raise _Left  # before a model is loaded that nobody waits for
        scorer = Scorer.of(run, scored.reference, scored.policy)
        made = scored_ahead(run, folder / "4-batches", scorer)
        judged = shelf.folder_of(folder / "2-judged")
        groups = (group for part in worker.parts(judged, stages.ahead_key(named), JudgedGroup) for group in part)
        older = (pair for artifact in scored.replayed for pair in artifact)
        pairs = chain(older, run.parts.pair_builder(groups, context))
        for index, part in enumerate(scorer.parts(pairs, Counter())):
            if not serves(scorer.gap(part)) and made.take(index) is None:
                made.put(index, scorer.scored(part))
            yield

    worker = Worker(score, run)
    try:
        yield
    finally:
        worker.leave()
    if worker.error is not None and not isinstance(worker.error, PrefloopError):
        raise worker.error
