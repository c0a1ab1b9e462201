"""Runs jobs in worker processes, one thread each; what is measured already is not done again."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.claims.engine.records import Job
from benchmarks.claims.engine.runner import MEASURED, folder_of, work

ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
"""Environment of the workers: two processes of one thread each are faster than one of two on tiny models."""


class Workers:
    """A pool for the whole command; with `count` 1 jobs are done in this process."""

    def __init__(self, count: int, out: Path, say: Callable[[str], None]) -> None:
        """Start `count` processes; runs go to `out`, progress to `say`."""
        self.out, self.say = out, say
        os.environ.update(ONE_THREAD)
        # Not forked: torch's threads would not survive it.
        self.pool = ProcessPoolExecutor(count, mp_context=get_context("spawn")) if count > 1 else None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Drop what has not begun."""
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def do(self, jobs: Sequence[Job], label: str) -> None:
        """Do jobs of which the numbers are not there.

        Raises:
            PrefloopError: one failed; what the others measured is kept.

        """
        waiting = {folder_of(job, self.out): job for job in jobs}
        missing = [job for folder, job in waiting.items() if not (folder / MEASURED).exists()]
        self.say(f"{label}: {len(waiting)} runs, {len(waiting) - len(missing)} of them measured already")
        if self.pool is None:
            for number, job in enumerate(missing, 1):
                self._tell(label, number, len(missing), work(job, self.out))
            return
        running = [self.pool.submit(work, job, self.out) for job in missing]
        try:
            for number, done in enumerate(as_completed(running), 1):
                self._tell(label, number, len(missing), done.result())
        finally:
            for future in running:
                future.cancel()

    def _tell(self, label: str, number: int, of: int, seconds: float) -> None:
        self.say(f"{label}: {number} of {of} done, {seconds:.0f} s")
