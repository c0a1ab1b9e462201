"""What else goes wrong with a machine: a full disk, a clock that jumps, a second process, little memory."""

import errno
import fcntl
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.reliability.kills import FAILS
from benchmarks.reliability.records import Bench, Outcome, Trial, last_line
from benchmarks.reliability.victims import Ended

FULL, MEMORY = "a small disk runs full", "memory runs out (address-space limit)"
CLOCK, TWO = "the clock is set back", "two processes on one run"
READ_ONLY, LOCKLESS = "a read-only folder", "a file system without locks"
DAY = 86400
Body = Callable[[Bench, Path], tuple[int, list[str]]]


def trials(bench: Bench, each: int, seed: int) -> Iterator[Trial]:
    """Yield `each` trials of every kind; those of small disks only where this process may mount one."""
    rng = random.Random(f"others {seed}")
    for index in range(each):
        if can_mount():
            yield _trial(FULL, index, _small_disk(rng.uniform(0.3, 14.0)))
        yield _trial(MEMORY, index, _little_memory(rng.randrange(1, 400)))
        yield _trial(CLOCK, index, _clock(-rng.uniform(1, 400) * DAY))
        yield _trial(TWO, index, _two(rng.uniform(0.0, 0.8)))
    yield _trial(READ_ONLY, 0, _read_only)
    yield _trial(LOCKLESS, 0, _lockless)


def _trial(kind: str, index: int, body: Body) -> Trial:
    def attempt(bench: Bench, folder: Path) -> Outcome:
        began = time.monotonic()
        faults, problems = body(bench, folder)
        ended, lost, more = bench.finish(folder / "run")
        problems += more
        seconds = time.monotonic() - began
        return Outcome(kind, folder.name, faults, not problems, lost, seconds, f"exit {ended.code}", tuple(problems))

    return Trial(kind, f"{kind} {index}", attempt)


def can_mount() -> bool:
    """Return whether a small file system can be had here."""
    return os.geteuid() == 0 and shutil.which("mount") is not None


def clear(ended: Ended | None, *codes: int) -> list[str]:
    """Return what is wrong with how a process ended that had to end in one of `codes`, and say why."""
    if ended is None:
        return ["hangs"]
    if ended.code in codes and not ended.traceback:
        return []
    return [f"exit code {ended.code}: {ended.said.strip()[-300:]}"]


def _small_disk(megabytes: float) -> Body:
    def body(bench: Bench, folder: Path) -> tuple[int, list[str]]:
        disk, out = folder / "disk", folder / "run"
        disk.mkdir()
        size = f"size={int(megabytes * 1e6)}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk], capture_output=True, check=False)
        if done.returncode:
            return 0, []
        try:
            ended = bench.launch(disk / "run").wait()
            if (disk / "run").is_dir():
                shutil.copytree(disk / "run", out)  # as if room had been made
        finally:
            subprocess.run(["umount", disk], check=True)
        return int(ended is None or ended.code != 0), clear(ended, FAILS, 0)

    return body


def _little_memory(megabytes: int) -> Body:
    def limit() -> None:
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        most = used + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    def body(bench: Bench, folder: Path) -> tuple[int, list[str]]:
        ended = bench.launch(folder / "run", before=limit).wait()
        # A library in C++ or Rust may abort: that is a kill like any other.
        problems = [] if ended is not None and ended.code < 0 else clear(ended, FAILS, 0)
        return int(ended is None or ended.code != 0), problems

    return body


def _clock(jump: float) -> Body:
    """Kill a run, and go on with a clock that shows an earlier time and goes back at every look."""

    def back() -> None:
        now, looks = time.time(), itertools.count()
        time.time = lambda: now + jump - next(looks)
        time.time_ns = lambda: int(time.time() * 1e9)

    def body(bench: Bench, folder: Path) -> tuple[int, list[str]]:
        out = folder / "run"
        victim = bench.launch(out)
        if victim.wait(bench.seconds / 2) is None:
            victim.end(signal.SIGKILL)
        for number, path in enumerate(sorted(out.rglob("*"))):
            os.utime(path, times=(time.time() - jump + number,) * 2)  # files of the future
        return 1, clear(bench.launch(out, before=back).wait(), 0)

    return body


def _two(after: float) -> Body:
    def body(bench: Bench, folder: Path) -> tuple[int, list[str]]:
        out = folder / "run"
        first = bench.launch(out)
        first.wait(after * bench.seconds)
        second = bench.launch(out)
        ends = [second.wait(), first.wait()]
        problems = clear(ends[0], 2, 0) + clear(ends[1], 2, 0)
        if all(e is not None and e.code == 2 for e in ends):
            problems.append("both were refused")
        refused = [e for e in ends if e is not None and e.code == 2]
        if any("in use by another process" not in e.said for e in refused):
            problems.append(f"not told why: {last_line(refused[0].said)}")
        return 1, problems

    return body


def _read_only(bench: Bench, folder: Path) -> tuple[int, list[str]]:
    """Refuse every change below the run folder, as a disk that is mounted for reading does."""
    out = folder / "run"
    shutil.copytree(bench.whole, out)
    shutil.rmtree(out / "round-002")

    def refuse() -> None:

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (writes or event in ("os.mkdir", "os.rename", "os.remove")) and str(arguments[0]).startswith(str(out)):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(arguments[0]))

        sys.addaudithook(audit)

    ended = bench.launch(out, before=refuse).wait()
    problems = clear(ended, FAILS)
    if ended is not None and "Read-only file system" not in ended.said:
        problems.append(f"not told why: {last_line(ended.said)}")
    return 1, problems


def _lockless(bench: Bench, folder: Path) -> tuple[int, list[str]]:
    def without() -> None:
        def flock(*_: Any) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        fcntl.flock = flock

    ended = bench.launch(folder / "run", before=without).wait()
    problems = clear(ended, 2)
    if ended is not None and "no file locks" not in ended.said:
        problems.append(f"not told why: {last_line(ended.said)}")
    return 1, problems
