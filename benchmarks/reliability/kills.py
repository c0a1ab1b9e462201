"""Processes that end before they are done: at every write point, and at random moments, again and again."""

import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.reliability.points import Fault
from benchmarks.reliability.records import Bench, Outcome, Trial
from benchmarks.reliability.victims import Ended

ACTIONS = {
    "kill": "SIGKILL before a write point",
    "torn": "SIGKILL in the middle of a file",
    "term": "SIGTERM at a write point",
    "enospc": "disk full at a write point",
    "memory": "MemoryError at a write point",
}
AT_RANDOM = {signal.SIGKILL: "SIGKILL at a random moment", signal.SIGTERM: "SIGTERM at a random moment"}
STARTING = 2.5
"""Seconds that a process of its own takes to import torch, about."""
FAILS = 74
"""Exit code for a disk or a memory that is used up."""
EXITS = {"kill": (-9,), "torn": (-9,), "term": (75, 0), "enospc": (FAILS, 0), "memory": (FAILS, 0)}
"""Exit codes that are right for an action; 0 where the fault hit something that a run can do without."""
STRIDE = 60
"""One trial takes every 60th write point: so many times in a row does its run die."""


def at_points(bench: Bench, action: str, stride: int = STRIDE, most: int | None = None) -> Iterator[Trial]:
    """Yield trials that together hit every write point; each restarts one run until every point of its share was hit.

    Points that only a recovery has (removing leftovers, say) are hit too, as they come.
    """
    names = [n for n in bench.points if action != "torn" or n.startswith(("parquet", "safetensors", "open"))]
    names = list(dict.fromkeys(names))
    shares = [names[i::stride] for i in range(min(stride, len(names)))]
    for number, share in enumerate(shares if most is None else shares[:most]):
        yield Trial(ACTIONS[action], f"{action} {number}/{stride}", _share(action, tuple(share)))


def _share(action: str, share: Sequence[str]) -> Callable[[Bench, Path], Outcome]:
    def attempt(bench: Bench, folder: Path) -> Outcome:
        began = time.monotonic()
        out, spared, faults = folder / "run", set(bench.points) - set(share), 0
        problems: list[str] = []
        while True:
            hit = folder / f"hit-{faults}"
            ended = bench.launch(out, Fault(action, out, frozenset(spared), hit)).wait()
            found = hit.read_text(encoding="utf-8").splitlines()
            problems += wrong_end(ended, action, found)
            if not found or ended is None or faults > 4 * len(share) + 20:
                break
            faults += 1
            spared.add(found[0])
        ended, lost, more = bench.finish(out)
        problems += more
        if faults < len(share) / 2:
            problems.append(f"only {faults} of {len(share)} points were reached")
        seconds = time.monotonic() - began
        return Outcome(
            ACTIONS[action], folder.name, faults, not problems, lost, seconds, f"exit {ended.code}", tuple(problems[:5])
        )

    return attempt


def wrong_end(ended: Ended | None, action: str, hit: Sequence[str]) -> list[str]:
    """Return what is wrong with how a process ended at the point `hit`."""
    if ended is None:
        return [f"hangs after {hit[0] if hit else 'no fault'}"]
    allowed = EXITS[action] if hit else (0,)
    if ended.code not in allowed or ended.traceback:
        return [f"{hit[0] if hit else 'no fault'}: exit code {ended.code}: {ended.said.strip()[-300:]}"]
    return []


def at_random(
    bench: Bench, number: int, trials: int, seed: int, in_a_row: int = 3, real: bool = False
) -> Iterator[Trial]:
    """Yield trials that send signal `number` up to `in_a_row` times to one run, at moments drawn by `seed`.

    `real`: to processes that were started as a person would start them, not forked ones.
    """
    kind = AT_RANDOM[signal.Signals(number)] + (", processes started anew" if real else "")
    for index in range(trials):
        yield Trial(kind, f"{kind} {index}", _random(kind, number, f"{seed} {index}", in_a_row))


def _random(kind: str, number: int, drawn: str, in_a_row: int) -> Callable[[Bench, Path], Outcome]:
    def attempt(bench: Bench, folder: Path) -> Outcome:
        began = time.monotonic()
        real = "anew" in kind
        rng = random.Random(f"{kind} {drawn}")
        out, faults = folder / "run", 0
        problems: list[str] = []
        # The second and third blow fall on a run that has less left to do, or is recovering.
        for share in (0.9, 0.6, 0.4)[:in_a_row]:
            victim = bench.launch(out, real=real)
            if victim.wait(STARTING * real + rng.uniform(0.02, share * bench.seconds)) is not None:
                break
            ended = victim.end(number)
            faults += 1
            if ended.code not in (-number, 75, 0) or ended.traceback:
                problems.append(f"exit code {ended.code}: {ended.said.strip()[-300:]}")
        ended, lost, more = bench.finish(out)
        problems += more
        seconds = time.monotonic() - began
        return Outcome(kind, folder.name, faults, not problems, lost, seconds, f"exit {ended.code}", tuple(problems))

    return attempt
