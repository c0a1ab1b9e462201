"""`python -m benchmarks.reliability`: hurt runs in every way, print what comes of it, write docs/reliability.md.

The same command goes on after a stop: results are in OUT/results.jsonl, and what was survived is not tried again.
"""

import argparse
import os
import random
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from benchmarks import machine
from benchmarks.reliability import damages, kills, others, page, subject
from benchmarks.reliability.points import Fault
from benchmarks.reliability.records import Bench, Outcome, Trial, append, read
from benchmarks.reliability.victims import MODULES, fork, warm

ROOT = Path(__file__).resolve().parents[2]
console = Console(soft_wrap=True, highlight=False)


def main(arguments: list[str]) -> int:
    """Run what the command line asks for; return the exit status."""
    asked = parser().parse_args(arguments)
    out = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    warm(MODULES)
    bench = ready(out)
    results = out / "results.jsonl"
    known = {o.name for o in read(results) if o.survived}
    todo = [t for t in all_trials(bench, asked) if safe_name(t.name) not in known and asked.kinds in t.kind]
    console.print(f"{len(bench.points)} write points; {len(todo)} trials to go, {len(known)} done")
    end = time.monotonic() + 60 * asked.minutes
    for number, trial in enumerate(todo):
        if time.monotonic() > end:
            console.print(f"{asked.minutes:g} minutes are over; the same command goes on")
            break
        outcome = one(bench, trial)
        append(results, outcome)
        word = "survived" if outcome.survived else f"NOT SURVIVED: {'; '.join(outcome.problems)}"
        told = f"{trial.name}: {outcome.faults} faults, {outcome.seconds:.1f} s, {word}"
        console.print(f"{number + 1}/{len(todo)} {told}", markup=False)
    found = read(results)
    if asked.page:
        page.write(asked.page, found, provenance(arguments, found))
    console.print(page.table(found), markup=False)
    return int(any(not o.survived for o in found))


def parser() -> argparse.ArgumentParser:
    """Return the command line's description."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__)
    found.add_argument(
        "--share", type=float, default=0.5, help="share of trials at write points beside SIGKILL, which has all"
    )
    found.add_argument("--random", type=int, default=30, help="trials of each signal at random moments, default 30")
    found.add_argument("--real", type=int, default=8, help="of these again in processes of their own, default 8")
    found.add_argument("--each", type=int, default=5, help="trials of each failure of the machine, default 5")
    found.add_argument("--damages", type=int, default=600, help="damaged files, drawn by the seed, default 600")
    found.add_argument("--quick", action="store_true", help="a few trials of most kinds, as the tests do")
    found.add_argument("--kinds", default="", metavar="TEXT", help="only kinds that contain TEXT")
    found.add_argument("--minutes", type=float, default=1e6, help="begin no trial after so many minutes")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--out", type=Path, default=ROOT / "runs" / "reliability")
    found.add_argument("--page", type=Path, default=ROOT / "docs" / "reliability.md")
    return found


def ready(out: Path) -> Bench:
    """Make the run that nobody disturbs, note its write points, and time it."""
    whole, hits = out / "whole", out / "points.txt"
    if not (whole / "report.html").is_file():
        shutil.rmtree(whole, ignore_errors=True)
        hits.unlink(missing_ok=True)
        fork(subject.command(whole), out / "whole.log", Fault("none", whole, frozenset(), hits)).wait()
    shutil.rmtree(out / "timed", ignore_errors=True)
    began = time.monotonic()
    ended = fork(subject.command(out / "timed"), out / "timed.log").wait()
    seconds = time.monotonic() - began
    lost, names = subject.lost(out / "timed", whole)
    if ended is None or ended.code or lost or names:
        raise SystemExit(f"two undisturbed runs differ, or do not end: {names} {ended}")
    points = tuple(dict.fromkeys(hits.read_text(encoding="utf-8").splitlines()))
    return Bench(out, whole, seconds, points)


def all_trials(bench: Bench, asked: argparse.Namespace) -> Iterator[Trial]:
    """Yield every trial that is asked for."""
    if asked.quick:
        yield from a_few(bench, asked.seed)
        return
    rng = random.Random(f"share {asked.seed}")
    for action in kills.ACTIONS:
        share = 1.0 if action == "kill" and asked.share > 0 else asked.share
        yield from (t for t in kills.at_points(bench, action) if rng.random() < share)
    for number in (signal.SIGKILL, signal.SIGTERM):
        yield from kills.at_random(bench, number, asked.random, asked.seed)
        yield from kills.at_random(bench, number, asked.real, asked.seed, real=True)
    damaged = [t for state in damages.STATES for t in damages.trials(bench, state)]
    yield from rng.sample(damaged, min(asked.damages, len(damaged)))
    yield from others.trials(bench, asked.each, asked.seed)


def a_few(bench: Bench, seed: int) -> Iterator[Trial]:
    """Yield a trial of most kinds: what a test has time for."""
    for action in ("kill", "torn", "enospc"):
        yield from kills.at_points(bench, action, stride=len(bench.points) // 2, most=1)
    yield from kills.at_random(bench, signal.SIGKILL, 1, seed, in_a_row=2)
    names = ("round-000/2-judged/manifest.json bit flipped", "5-policy/model.safetensors zeroed")
    yield from (t for t in damages.trials(bench, "finished") if t.name.endswith(names))
    yield from (t for t in damages.trials(bench, "in sampling") if "1-samples/part-00000.parquet bit" in t.name)
    yield from (t for t in others.trials(bench, 1, seed) if t.kind in (others.TWO, others.READ_ONLY, others.LOCKLESS))


def safe_name(name: str) -> str:
    """Return a trial's name as a folder's."""
    return name.replace("/", ".")


def one(bench: Bench, trial: Trial) -> Outcome:
    """Try in a fresh folder, which is kept where the run did not survive."""
    folder = bench.folder / "trials" / safe_name(trial.name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    outcome = trial.attempt(bench, folder)
    if outcome.survived:
        shutil.rmtree(folder)
    return outcome


def provenance(arguments: list[str], found: list[Outcome]) -> list[str]:
    """Return how the table was made."""
    shown = [os.path.relpath(a) if os.path.isabs(a) else a for a in arguments]
    command = shlex.join(["python", "-m", "benchmarks.reliability", *shown])
    minutes = sum(o.seconds for o in found) / 60
    return [
        f"{datetime.now(UTC):%Y-%m-%d} · `{command}` · {minutes:.0f} minutes of trials",
        f"{machine.machine('cpu')} · {machine.versions()}",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
