"""`python -m benchmarks.reliability.fuzz`: give every reader hostile input; count what is read, refused, crashes.

Each reader runs in a process of its own, so that a crash of native code is counted too, with a limit on memory and on
the time of one input. Half of the inputs are mutations of well-formed ones, the rest is made by hypothesis; a few are
giants. All of them are functions of the seed.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from rich.console import Console

from benchmarks import machine
from benchmarks.reliability.mutate import mutated
from benchmarks.reliability.readers import READ, Reader, readers
from prefloop.errors import PrefloopError

console = Console(soft_wrap=True, highlight=False, markup=False)
ROOT = Path(__file__).resolve().parents[2]
LONGEST = 60
"""Seconds of CPU time that one input may take, so that a busy machine changes no count."""
MEMORY = 8 * 2**30
"""Bytes of address space that a reader's process may take; the libraries alone map about three gigabytes."""
LONGEST_MESSAGE = 4_000
"""Characters of the longest message that still counts as clear."""
_WHOSE = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
COUNT = "count.json"
KEPT = 5
"""Crashes that are kept as examples."""
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


@dataclass
class Count:
    """What became of a reader's inputs. `unclear`: refused, but not by file, line or field. `seconds` is CPU time."""

    reader: str
    what: str
    inputs: int = 0
    read: int = 0
    refused: int = 0
    unclear: int = 0
    crashed: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    examples: list[str] = field(default_factory=list)


class TooSlow(BaseException):
    """An input took longer than `LONGEST` seconds; no reader may catch it."""


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow


@contextmanager
def limit() -> Iterator[None]:
    """Raise `TooSlow` where the block takes more than `LONGEST` seconds of CPU time."""
    before = signal.signal(signal.SIGPROF, _too_slow)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def unclear(reader: Reader, why: str) -> str:
    """Return what a refusal lacks: the place, a bearable length, or characters that a terminal can show."""
    if not any(place in why for place in reader.places):
        return "names no place"
    if len(why) > LONGEST_MESSAGE:
        return f"has {len(why)} characters"
    return "has characters that a terminal obeys" if _UNSEEN.search(why) else ""


def give(reader: Reader, data: bytes, scratch: Path, count: Count) -> None:
    """Give one input to a reader and count what comes of it."""
    folder = scratch / "input"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    count.inputs += 1
    began = time.process_time()
    try:
        with limit():
            why = reader.read(data, folder)
    except PrefloopError as error:
        why = str(error)
    except (Exception, TooSlow) as error:  # everything else is what this program looks for
        count.crashed += 1
        _keep(count, f"{type(error).__name__}: {str(error)[:200]}", data)
        return
    finally:
        taken = time.process_time() - began
        count.seconds += taken
        count.slowest = max(count.slowest, taken)
    if why == READ:
        count.read += 1
    elif lacking := unclear(reader, why):
        count.unclear += 1
        _keep(count, f"{lacking}: {why[:200]!r}", data)
    else:
        count.refused += 1


def _keep(count: Count, what: str, data: bytes) -> None:
    kind = what[:40]
    if len(count.examples) < KEPT and not any(example.startswith(kind) for example in count.examples):
        count.examples.append(f"{what} ← {data[:300]!r}")


def fuzz(reader: Reader, inputs: int, seed: int, scratch: Path, giants: bool = True) -> Count:
    """Give `inputs` inputs to a reader, and its seeds and giants beside them."""
    count = Count(reader.name, reader.what)

    def one(data: bytes) -> None:
        give(reader, data, scratch, count)

    for data in reader.seeds:
        one(data)
    if giants:
        for data in reader.giants():
            one(data)
    random_ = random.Random(f"{seed} {reader.name}")
    for _ in range(inputs // 2):
        one(mutated(reader.seeds, random_))
    _made(reader, inputs - inputs // 2, seed, one)
    return count


def _made(reader: Reader, inputs: int, seed: int, one: Callable[[bytes], None]) -> None:
    """Give what hypothesis makes, in batches: it draws ever more slowly within one."""
    left, batch = inputs, 0
    while left > 0:
        size = min(left, 1000)

        @hypothesis_seed(seed * 1_000_003 + batch)
        @settings(
            max_examples=size,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(reader.made)
        def run(data: bytes) -> None:
            one(data)

        run()
        left, batch = left - size, batch + 1


def _child(reader: Reader, inputs: int, seed: int, scratch: Path) -> None:
    """Run one reader and write its count."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    count = fuzz(reader, inputs, seed, scratch)
    (scratch / COUNT).write_text(json.dumps(asdict(count)), encoding="utf-8")


def _count_of(reader: Reader, inputs: int, seed: int, scratch: Path) -> Count:
    """Run one reader in a process of its own; one that dies is a crash."""
    (scratch / COUNT).unlink(missing_ok=True)
    child = multiprocessing.get_context("fork").Process(target=_child, args=(reader, inputs, seed, scratch))
    child.start()
    child.join()
    if child.exitcode == 0:
        return Count(**json.loads((scratch / COUNT).read_text(encoding="utf-8")))
    return Count(reader.name, reader.what, crashed=1, examples=[f"the process ended with {child.exitcode}"])


def shares(found: list[Reader], inputs: int) -> dict[str, int]:
    """Return how many inputs each reader gets: those of slow readers count for several."""
    whole = sum(1 / reader.cost for reader in found)
    return {reader.name: round(inputs / reader.cost / whole) + 1 for reader in found}


def main(arguments: list[str]) -> int:
    """Run what the command line asks for; return 1 if anything crashed or was unclear."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="of all readers together, default 100000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", default="", help="only readers whose name contains this")
    parser.add_argument("--out", type=Path, default=None, help="folder for hostile_input.json and .md; default: docs")
    asked = parser.parse_args(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        found = [reader for reader in readers(Path(scratch)) if asked.reader in reader.name]
        each = shares(found, asked.inputs)
        counts = []
        for reader in found:
            counts.append(_count_of(reader, each[reader.name], asked.seed, Path(scratch)))
            console.print(_line(counts[-1]))
    record = {
        "command": f"python -m benchmarks.reliability.fuzz --inputs {asked.inputs} --seed {asked.seed}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.machine("cpu"),
        "versions": machine.versions(),
        "inputs": sum(c.inputs for c in counts),
        "seconds": round(sum(c.seconds for c in counts), 1),
        "wall_seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(sum(resource.getrusage(who).ru_utime for who in _WHOSE), 1),
        "readers": [asdict(c) for c in counts],
    }
    bad = sum(c.crashed + c.unclear for c in counts)
    if not asked.reader or asked.out is not None:
        write(record, asked.out or ROOT / "docs")
    console.print(f"{record['inputs']} inputs, {record['seconds']} s, {bad} crashed or unclear")
    return int(bad > 0)


def _line(count: Count) -> str:
    shown = f"{count.reader:<22}{count.inputs:>7} inputs{count.read:>7} read{count.refused:>7} refused"
    shown += (
        f"{count.unclear:>6} unclear{count.crashed:>6} crashed{count.seconds:>8.1f} s, slowest {count.slowest:.2f} s"
    )
    return "\n".join([shown, *(f"    {example}" for example in count.examples)])


def write(record: dict[str, Any], folder: Path) -> None:
    """Write the result for programs and for people."""
    text = json.dumps(record, indent=1, ensure_ascii=True)
    (folder / "hostile_input.json").write_text(text + "\n", encoding="utf-8")
    head = (ROOT / "benchmarks" / "reliability" / "hostile_input.md").read_text(encoding="utf-8")
    (folder / "hostile_input.md").write_text(head.replace("{{ table }}", page(record)), encoding="utf-8")


def page(record: dict[str, Any]) -> str:
    """Return the counts as a Markdown table, with command, machine and date."""
    rows = [
        "| reader | reads | inputs | read | refused by place | refused unclearly | crashed | slowest, s |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for c in record["readers"]:
        counts = [f"{c[name]:,}" for name in ("inputs", "read", "refused", "unclear", "crashed")]
        rows.append(f"| {c['reader']} | {c['what']} | {' | '.join(counts)} | {c['slowest']:.2f} |")
    totals = [sum(c[name] for c in record["readers"]) for name in ("inputs", "read", "refused", "unclear", "crashed")]
    rows.append(f"| **all** | | {' | '.join(f'**{total:,}**' for total in totals)} | |")
    about = (
        f"Command: `{record['command']}`. Date: {record['date']}. Machine: {record['machine']}. {record['versions']}. "
        f"CPU time {record['cpu_seconds']:.0f} s, of which {record['seconds']:.0f} s in the readers, on one core."
    )
    return "\n".join([*rows, "", about])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
