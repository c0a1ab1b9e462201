"""A stage's output on disk: a folder of parts and files, and a manifest that is written last.

    folder/
      part-00000.parquet …   rows, written one by one, each whole or absent
      key.json               what the folder is being made from, written first
      manifest.json          the key again, with size, SHA-256 and row count of every file; written last

A folder with a manifest is finished and never changes. Without one, the missing parts are made under the same key.
A folder of another key is refused, naming the settings that differ, unless the caller replaces it.
Every file is written under a temporary name, flushed to disk, and renamed; the folder entry is flushed too.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

from prefloop.columns import count_rows, read_rows, write_rows
from prefloop.errors import ConfigError, CorruptArtifact, RunLocked, StaleArtifact
from prefloop.rows import digest_of

R = TypeVar("R")

KEY = "key.json"
MANIFEST = "manifest.json"
TEMPORARY = ".writing-"
LARGEST = 2**63
"""No artifact has so many rows, and none took so many seconds."""
_OF_KEY: dict[str, tuple[type, ...]] = {"stage": (str,), "settings": (dict,), "inputs": (dict,), "format": (int,)}
_OF_MANIFEST: dict[str, tuple[type, ...]] = {
    **{"key": (str,), "digest": (str,), "rows": (int,), "files": (dict,), "facts": (dict,)},
    "seconds": (float, int, type(None)),
}
_RENAME = "rename its folder and rerun to make it again"


@dataclass(frozen=True)
class Key:
    """What a stage's output depends on: its own settings and the digests of its inputs, nothing else."""

    stage: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    format: int = 1

    @property
    def digest(self) -> str:
        """16 hexadecimal digits."""
        return digest_of(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """Return the key as JSON takes it."""
        return {
            "stage": self.stage,
            "settings": dict(self.settings),
            "inputs": dict(self.inputs),
            "format": self.format,
        }


@dataclass(frozen=True)
class Artifact(Generic[R]):
    """A finished stage output: `digest` covers its key and the bytes of its files."""

    path: Path
    record: type[R] | None
    manifest: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits; the same rows made in the same way have the same digest."""
        return str(self.manifest["digest"])

    @property
    def rows(self) -> int:
        """Number of rows over all parts."""
        return int(self.manifest["rows"])

    @property
    def seconds(self) -> float | None:
        """Wall time of the process that finished it, in seconds; `None` where it was not measured."""
        value = self.manifest["seconds"]
        return None if value is None else float(value)

    @property
    def facts(self) -> dict[str, Any]:
        """Counts and results that the stage noted."""
        return dict(self.manifest["facts"])

    def __iter__(self) -> Iterator[R]:
        for part in self.parts():
            yield from part

    def parts(self) -> Iterator[list[R]]:
        """Yield the rows of each part, in order.

        Raises:
            CorruptArtifact: a part is missing or damaged.

        """
        if self.record is None:
            return
        for path in self.part_paths():
            yield list(read_rows(path, self.record))

    def part_paths(self) -> Iterator[Path]:
        """Yield the files of the parts, in order, each compared with the manifest first.

        Raises:
            CorruptArtifact: a part is missing or damaged.

        """
        for name in sorted(n for n in self.manifest["files"] if n.startswith("part-")):
            self.check_file(name)
            yield self.path / name

    def check_file(self, name: str) -> None:
        """Compare one file with the manifest.

        Raises:
            CorruptArtifact: the file is missing or its bytes differ.

        """
        expected = self.manifest["files"][name]
        path = self.path / name
        _refuse_link(path, self.path)
        if not path.is_file():
            raise CorruptArtifact(f"{path}: listed in {MANIFEST} but missing; rerun with --redo to make it again")
        if path.stat().st_size != expected["bytes"] or file_digest(path) != expected["sha256"]:
            raise CorruptArtifact(f"{path}: its bytes differ from {MANIFEST}; rerun with --redo to make it again")


@dataclass
class Building(Generic[R]):
    """An unfinished stage output."""

    path: Path
    key: Key
    record: type[R] | None

    def has_part(self, index: int) -> bool:
        """Whether part `index` is already on disk."""
        return (self.path / part_name(index)).exists()

    def parts(self) -> Iterator[list[R]]:
        """Yield the rows of the parts written so far, in order."""
        assert self.record is not None
        for path in sorted(self.path.glob("part-*.parquet")):
            _refuse_link(path, self.path)
            yield list(read_rows(path, self.record))

    def write_part(self, index: int, rows: Iterable[R]) -> None:
        """Write part `index`, whole or not at all."""
        assert self.record is not None
        record = self.record
        with replacing(self.path / part_name(index)) as temporary:
            write_rows(temporary, record, rows)

    def finish(self, facts: Mapping[str, Any] | None = None, seconds: float | None = None) -> Artifact[R]:
        """Write the manifest: from here on the artifact is finished. `seconds` is the wall time that it took."""
        files = {
            str(path.relative_to(self.path)): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
            for path in sorted(self.path.rglob("*"))
            if path.is_file() and not _is_private(path.relative_to(self.path))
        }
        rows = 0
        if self.record is not None:
            rows = sum(count_rows(self.path / name) for name in files if name.startswith("part-"))
        manifest = {
            **self.key.as_dict(),
            "key": self.key.digest,
            "digest": digest_of(self.key.digest, {name: f["sha256"] for name, f in files.items()}),
            "rows": rows,
            "files": files,
            "facts": dict(facts or {}),
            "seconds": seconds,
            "prefloop": version("prefloop"),
        }
        write_json(self.path / MANIFEST, manifest)
        return Artifact(self.path, self.record, manifest)


def open_artifact(path: Path, key: Key, record: type[R] | None, replace: bool = False) -> Artifact[R] | Building[R]:
    """Return the finished artifact of `key` in `path`, or what there is of it, to be finished.

    With `replace`, a folder that was made from another key is moved aside (to `NAME.replaced-N`), not deleted.

    Raises:
        StaleArtifact: the folder was made from another key and `replace` is false.
        CorruptArtifact: manifest or key file is not readable JSON.

    """
    found = _read_key(path)
    if found is not None and found != _jsonable(key.as_dict()):
        if not replace:
            raise StaleArtifact(_difference(path, found, _jsonable(key.as_dict())))
        set_aside(path, "replaced")
        found = None
    if (path / MANIFEST).exists():
        return Artifact(path, record, read_manifest(path))
    path.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    if found is None:
        write_json(path / KEY, key.as_dict())
    return Building(path, key, record)


def load_artifact(path: Path, record: type[R] | None) -> Artifact[R] | None:
    """Return the finished artifact in `path`, whatever its key; `None` if there is none."""
    return Artifact(path, record, read_manifest(path)) if (path / MANIFEST).exists() else None


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the artifact in `path`, once all that is read of it is what it should be.

    Raises:
        CorruptArtifact: it is no JSON, a field is missing or something else, or a file name leads out of the folder.

    """
    manifest = _checked(path / MANIFEST, read_json(path / MANIFEST), (*_OF_KEY, *_OF_MANIFEST))
    for name in ("rows", "seconds"):
        if not 0 <= (manifest[name] or 0) < LARGEST:
            raise CorruptArtifact(
                f"{path / MANIFEST}: {name} must be a count, got {str(manifest[name])[:40]}; {_RENAME}"
            )
    for name, entry in manifest["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name or len(name) > 200:
            raise CorruptArtifact(f"{path / MANIFEST}: files: {name[:99]!r} is no name inside the folder; {_RENAME}")
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or type(entry.get("sha256")) is not str:
            raise CorruptArtifact(f"{path / MANIFEST}: files: {name[:100]!r} has no bytes and sha256; {_RENAME}")
    return manifest


def _checked(path: Path, value: Any, names: Iterable[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CorruptArtifact(f"{path}: must hold an object, got {type(value).__name__}; {_RENAME}")
    for name in names:
        kinds = (_OF_KEY | _OF_MANIFEST)[name]
        if name not in value or type(value[name]) not in kinds:
            found = repr(value[name])[:60] if name in value else "nothing"
            raise CorruptArtifact(f"{path}: {name} must be {kinds[0].__name__}, got {found}; {_RENAME}")
    return value


def _refuse_link(path: Path, folder: Path) -> None:
    """Refuse a file that is a link to somewhere else: its bytes are not the run's."""
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise CorruptArtifact(f"{path}: a link out of its folder; put the file itself there, or rerun with --redo")


def set_aside(path: Path, reason: str) -> Path:
    """Rename `path` to the first free `NAME.REASON-N` and return the new name."""
    number = 1
    while (target := path.with_name(f"{path.name}.{reason}-{number}")).exists():
        number += 1
    path.rename(target)
    flush_folder(target.parent)
    return target


def part_name(index: int) -> str:
    """Return the file name of part `index`."""
    return f"part-{index:05d}.parquet"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; on a clean exit flush it and rename it to `path`.

    Works for a file and for a folder. After an exception the temporary is removed and `path` is untouched.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    _remove(temporary)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        flush_tree(temporary)
        os.replace(temporary, path)
        flush_folder(path.parent)
    finally:
        _remove(temporary)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        CorruptArtifact: the file is not valid UTF-8 JSON.

    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise CorruptArtifact(f"{path}: not valid JSON ({error}); {_RENAME}") from error


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_tree(path: Path) -> None:
    """Flush a file, or every file of a folder and the folder itself, to disk."""
    for item in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if item.is_file():
            with item.open("rb") as file:
                os.fsync(file.fileno())
    if path.is_dir():
        flush_folder(path)


def flush_folder(path: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the run folder's lock. The lock ends with the process, however that dies.

    Raises:
        RunLocked: another process holds it.

    """
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "a+", opener=_no_link) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise RunLocked(
                f"{root}: in use by another process ({holder}); wait for it, or give this run another --out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()}\n")
        file.flush()
        yield


def _no_link(path: str, flags: int) -> int:
    """Open a file, but none that a link names: a lock is written to, and a link may lead to any file of the user's."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ConfigError(f"{path}: is a link, and no run of prefloop makes one; remove it") from error


def _is_private(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts) or relative.name in (KEY, MANIFEST)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()


def _remove_leftovers(path: Path) -> None:
    for leftover in path.glob(f"{TEMPORARY}*"):
        _remove(leftover)


def _read_key(path: Path) -> Any | None:
    if (path / MANIFEST).exists():
        manifest = read_manifest(path)
        return {name: manifest[name] for name in _OF_KEY}
    if not (path / KEY).exists():
        return None
    return _checked(path / KEY, read_json(path / KEY), _OF_KEY)


def _jsonable(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _difference(path: Path, found: Any, wanted: Any) -> str:
    changes = [
        f"{name}: {before!r} → {after!r}"
        for name, before, after in sorted(_flat_changes(found["settings"], wanted["settings"]))
    ]
    inputs = sorted(
        name
        for name in {*found["inputs"], *wanted["inputs"]}
        if found["inputs"].get(name) != wanted["inputs"].get(name)
    )
    if inputs:
        changes.append(f"changed input: {', '.join(inputs)}")
    if found["format"] != wanted["format"]:
        changes.append("another version of prefloop")
    return (
        f"{path}: made with other settings ({'; '.join(changes) or 'another stage'}). Set them back, choose another "
        "--out, or pass --redo to move the old result aside and make this stage and later ones again"
    )


def _flat_changes(before: Any, after: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        for name in {*before, *after}:
            yield from _flat_changes(before.get(name), after.get(name), f"{prefix}.{name}" if prefix else name)
    elif before != after:
        yield prefix, before, after
