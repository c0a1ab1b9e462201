"""Files that change behind a run's back - cut, zeroed, deleted, a bit flipped - of a finished run or of a half."""

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.reliability.points import Fault
from benchmarks.reliability.records import Bench, Outcome, Trial, last_line
from benchmarks.reliability.victims import Ended
from prefloop.artifact import MANIFEST, PARTS, file_digest, read_parts

CLEAR = (2, 3)
"""Exit codes with which a rerun may say that it cannot use a file."""


def cut(path: Path) -> None:
    """Keep the first half."""
    os.truncate(path, path.stat().st_size // 2)


def zero(path: Path) -> None:
    """Keep the size, lose the content."""
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    """Change one bit, which the file's name decides."""
    data = bytearray(path.read_bytes())
    bit = random.Random(path.name + path.parent.name).randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": cut,
    "zeroed": zero,
    "deleted": Path.unlink,
    "bit flipped": flip,
}
STATES = {
    "finished": "",
    "in training": "rename round-001/5-policy/.state/.writing-step-",
    "in sampling": "rename round-001/1-samples/.writing-part-00001.parquet",
    "in evaluation": "rename round-002/6-report/2-judged/.writing-part-00001.parquet",
}
"""Runs that are damaged, and how the name of the write point begins before whose last one they were killed."""
UNWATCHED = (".lock", ".writing-")
"""Files that hold nothing: doctor need not name them."""


def prepare(bench: Bench, state: str) -> Path:
    """Return a folder with a run in that state, which is made once."""
    out = bench.folder / "states" / state.replace(" ", "-")
    if state == "finished":
        return bench.whole
    if not out.is_dir():
        # The command names the folder, and so do no results: it may be moved.
        making = out.with_name(f"{out.name}-making")
        shutil.rmtree(making, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        last = [
            name
            for name in bench.points
            if name.startswith(STATES[state]) and name.count("/") == STATES[state].count("/")
        ][-1]
        spared = frozenset(name for name in bench.points if name != last)
        bench.launch(making, Fault("kill", making, spared, out.with_suffix(".hit"))).wait()
        making.rename(out)
    return out


def trials(bench: Bench, state: str, names: Callable[[str], bool] = lambda name: True) -> Iterator[Trial]:
    """Yield a trial for each file of a run in `state` and each damage."""
    source = prepare(bench, state)
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        name = str(path.relative_to(source))
        for damage in DAMAGES if path.stat().st_size else ("deleted",):
            if names(name):
                kind = f"file {damage}, " + ("finished run" if state == "finished" else "half-finished run")
                yield Trial(kind, f"{state}: {name} {damage}", _damage(kind, state, name, damage))


def _damage(kind: str, state: str, name: str, damage: str) -> Callable[[Bench, Path], Outcome]:
    def attempt(bench: Bench, folder: Path) -> Outcome:
        began = time.monotonic()
        out = folder / "run"
        shutil.copytree(prepare(bench, state), out)
        before = (out / name).read_bytes()
        DAMAGES[damage](out / name)
        after = (out / name).read_bytes() if (out / name).is_file() else None
        problems = [] if after == before else _unnamed(bench, out, name)
        ended, lost, wrong = bench.finish(out)
        if ended.traceback:
            problems.append(f"traceback: {last_line(ended.said)}")
        told = ended.code in CLEAR and Path(name).name in ended.said
        if ended.code == 0 or not told:
            problems += wrong
        else:
            lost = 0  # nothing was made of it, and the message names it
        how = "told clearly" if told else "same bytes" if ended.code == 0 else f"exit {ended.code}"
        return Outcome(kind, folder.name, 1, not problems, lost, time.monotonic() - began, how, tuple(problems))

    return attempt


def _says_enough(folder: Path) -> bool:
    """Return whether the noted parts still cover all that are there, as before a part that a kill prevented."""
    noted = read_parts(folder)
    unfinished = not (folder / MANIFEST).is_file()
    return unfinished and all(noted.get(path.name) == file_digest(path) for path in folder.glob("part-*.parquet"))


def _unnamed(bench: Bench, out: Path, name: str) -> list[str]:
    """Return what is wrong with what `prefloop doctor` says of a damaged file."""
    if any(part in name for part in UNWATCHED) or (Path(name).name == PARTS and _says_enough((out / name).parent)):
        return []
    ended: Ended | None = bench.run(["doctor", str(out)]).wait()
    if ended is None or ended.traceback:
        return ["doctor: hangs or fails"]
    if ended.code == 0 or Path(name).name not in ended.said:
        return [f"doctor: exit code {ended.code}, does not name {name}"]
    return []
