"""What of a run folder can be copied elsewhere as it stands: batches of files that belong together. Changes nothing."""

import os
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from prefloop.artifact import ASIDE, KEY, MANIFEST, PARTS, read_manifest, read_parts
from prefloop.disk import file_digest, read_sealed
from prefloop.errors import CorruptArtifact
from prefloop.train.states import STATE, STATES, states

TEXTS = ("recipe.yaml", "summary.json", "report.html", ".loggers.json")
"""Files of a run folder that are written anew, whole."""
DATABASES = ("judge-store/verdicts.sqlite", "labels.sqlite")
"""SQLite files of a run: what judges were paid for, and what people have said."""
STAGE = re.compile(r"(prompts|start|held-out|round-\d+)(/[\w-][\w.-]*)*")
"""Folders of a run that hold artifacts, by their place in it."""


@dataclass(frozen=True)
class Batch:
    """Files of a folder that count together. `files` are named from the run folder, with their SHA-256.

    `seal` is what is written after them, in this order: names and bytes. `whole`: other files of the folder are none of
    the run's.
    """

    folder: str
    files: Mapping[str, str]
    seal: Mapping[str, bytes]
    whole: bool = False


def batches(root: Path, done: Mapping[str, tuple[int, ...]]) -> Iterator[Batch]:
    """Yield what can be copied of the run in `root`, earlier stages first; what is being written is left out.

    `done` has the `stamp` of manifests, by folder, whose artifacts need no second look.
    """
    for folder in sorted(_stages(root)):
        name = folder.relative_to(root).as_posix()
        try:
            if found := stamp(folder / MANIFEST):
                if done.get(name) != found:
                    yield _finished(folder, name)
                continue
            yield _begun(folder, name)
            for state in states(folder / STATES):
                yield _state(state, state.relative_to(root).as_posix())
        except (OSError, CorruptArtifact):  # it is being finished, replaced or moved aside now
            continue
    texts = {name: data for name in TEXTS if (data := _bytes(root / name)) is not None}
    yield Batch("", {}, texts)


def _stages(root: Path) -> Iterator[Path]:
    for path, folders, names in os.walk(root):
        folder = Path(path)
        folders[:] = [f for f in folders if not f.startswith(".") and not ASIDE.search(f)]
        if KEY not in names and MANIFEST not in names:
            continue
        folders.clear()  # an artifact holds no other
        if STAGE.fullmatch(folder.relative_to(root).as_posix()):
            yield folder


def _finished(folder: Path, name: str) -> Batch:
    data = (folder / MANIFEST).read_bytes()
    files = {f"{name}/{file}": entry["sha256"] for file, entry in read_manifest(folder)["files"].items()}
    return Batch(name, files, {f"{name}/{MANIFEST}": data}, whole=True)


def _begun(folder: Path, name: str) -> Batch:
    key = (folder / KEY).read_bytes()
    noted = {part: digest for part, digest in read_parts(folder).items() if (folder / part).is_file()}
    lines = "".join(f"{digest}  {part}\n" for part, digest in noted.items())
    seal = {f"{name}/{KEY}": key, **({f"{name}/{PARTS}": lines.encode()} if noted else {})}
    return Batch(name, {f"{name}/{part}": digest for part, digest in noted.items()}, seal)


def _state(folder: Path, name: str) -> Batch:
    data = (folder / STATE).read_bytes()
    files = {f"{name}/{file}": digest for file, digest in read_sealed(folder / STATE)["files"].items()}
    return Batch(name, files, {f"{name}/{STATE}": data})


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def digest_of_bytes(data: bytes) -> str:
    """Return the SHA-256 of bytes, 64 hexadecimal digits."""
    return sha256(data).hexdigest()


def snapshot(database: Path, to: Path) -> str:
    """Copy an SQLite file that may be in use, and return the SHA-256 of the copy.

    Raises:
        sqlite3.Error: it cannot be read.

    """
    source = sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True, timeout=60.0)
    with closing(source), closing(sqlite3.connect(to)) as copy:
        source.backup(copy)
        copy.execute("pragma journal_mode=delete")
    return file_digest(to)


def changed_at(database: Path) -> tuple[int, ...]:
    """Return what changes when an SQLite file does; nothing where there is none."""
    found = [database, database.with_name(f"{database.name}-wal")]
    return tuple(number for path in found for number in stamp(path))


def stamp(path: Path) -> tuple[int, ...]:
    """Return date and size of a file; nothing where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_size)
