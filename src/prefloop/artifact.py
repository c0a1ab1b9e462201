"""A stage's output on disk: a folder of parts and files, and a manifest that is written last.

    folder/
      part-00000.parquet …   rows, written one by one, each whole or absent
      key.json               what the folder is being made from, written first
      parts.sha256           SHA-256 of each part, noted before the part gets its name: what is not so is made again
      manifest.json          the key again, with size, SHA-256 and row count of every file; written last

A folder with a manifest is finished and never changes. Without one, the missing parts are made under the same key.
A folder of another key is refused, naming the settings that differ, unless the caller replaces it.
Every file is written under a temporary name, flushed to disk, and renamed; the folder entry is flushed too.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

from prefloop.columns import count_rows, read_rows, write_rows
from prefloop.disk import (
    TEMPORARY,
    file_digest,
    flush_folder,
    flush_tree,
    locked,
    note_line,
    read_json,
    read_sealed,
    remove,
    replacing,
    sealed,
    set_aside,
    write_json,
    write_text,
)
from prefloop.errors import CorruptArtifact, StaleArtifact
from prefloop.manifest import OF_KEY, OLD_FIELDS, checked_fields, checked_manifest, refuse_links
from prefloop.rows import digest_of

__all__ = [
    "KEY",
    "MANIFEST",
    "PARTS",
    "TEMPORARY",
    "Artifact",
    "Building",
    "Key",
    "file_digest",
    "flush_folder",
    "flush_tree",
    "load_artifact",
    "locked",
    "open_artifact",
    "read_json",
    "read_key",
    "read_manifest",
    "read_parts",
    "replacing",
    "restore_beside",
    "set_aside",
    "write_json",
    "write_text",
]

R = TypeVar("R")

KEY = "key.json"
MANIFEST = "manifest.json"
PARTS = "parts.sha256"
ASIDE = re.compile(r"\.(replaced|damaged|earlier)-\d+$")
"""Names of what was set aside."""


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

    def stored_parts(self) -> "list[StoredPart[R]]":
        """Return the parts, in order, none of them read yet: for stages that go part by part."""
        return [StoredPart(self, name) for name in self._part_names()]

    def part_paths(self) -> Iterator[Path]:
        """Yield the files of the parts, in order, each compared with the manifest first.

        Raises:
            CorruptArtifact: a part is missing or damaged.

        """
        for name in self._part_names():
            self.check_file(name)
            yield self.path / name

    def _part_names(self) -> list[str]:
        return sorted((n for n in self.manifest["files"] if n.startswith("part-")), key=_by_number)

    def check_file(self, name: str) -> None:
        """Compare one file with the manifest.

        Raises:
            CorruptArtifact: the file is missing or its bytes differ.

        """
        expected = self.manifest["files"][name]
        path = self.path / name
        refuse_links([path], self.path)
        if not path.is_file():
            raise CorruptArtifact(f"{path}: listed in {MANIFEST} but missing; rerun with --redo to make it again")
        if path.stat().st_size != expected["bytes"] or file_digest(path) != expected["sha256"]:
            raise CorruptArtifact(f"{path}: its bytes differ from {MANIFEST}; rerun with --redo to make it again")


@dataclass(frozen=True)
class StoredPart(Generic[R]):
    """The rows of one part of a finished artifact, read anew each time that they are iterated over.

    Iterating raises CorruptArtifact where the file is missing or damaged.
    """

    artifact: Artifact[R]
    name: str

    def __len__(self) -> int:
        """Return the number of rows, without reading them."""
        return count_rows(self.artifact.path / self.name)

    def __iter__(self) -> Iterator[R]:
        assert self.artifact.record is not None
        self.artifact.check_file(self.name)
        yield from read_rows(self.artifact.path / self.name, self.artifact.record)


@dataclass
class Building(Generic[R]):
    """An unfinished stage output."""

    path: Path
    key: Key
    record: type[R] | None
    shared: bool = False
    """Whether several processes make it, each some of the parts."""

    @cached_property
    def _whole(self) -> dict[str, str]:
        """SHA-256 of every part that is on disk as it was written."""
        noted = read_parts(self.path)
        return {n: d for n, d in noted.items() if (self.path / n).is_file() and file_digest(self.path / n) == d}

    def look_again(self) -> None:
        """Forget which parts are there: other processes have written some."""
        self.__dict__.pop("_whole", None)

    def has_part(self, index: int) -> bool:
        """Whether part `index` is already on disk, with the bytes that were written."""
        return part_name(index) in self._whole

    def parts(self) -> Iterator[list[R]]:
        """Yield the rows of the parts written so far, in order."""
        assert self.record is not None
        for name in sorted(self._whole, key=_by_number):
            refuse_links([self.path / name], self.path)
            yield list(read_rows(self.path / name, self.record))

    def write_part(self, index: int, rows: Iterable[R]) -> None:
        """Write part `index`, whole or not at all."""
        assert self.record is not None
        record, name = self.record, part_name(index)
        with replacing(self.path / name) as temporary:
            write_rows(temporary, record, rows)
            digest = file_digest(temporary)
            note_line(self.path / PARTS, f"{digest}  {name}")
        self._whole[name] = digest

    def finish(self, facts: Mapping[str, Any] | None = None, seconds: float | None = None) -> Artifact[R]:
        """Write the manifest: from here on the artifact is finished. `seconds` is the wall time that it took.

        Raises:
            CorruptArtifact: a part is not what was written.

        """
        files = {
            str(path.relative_to(self.path)): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
            for path in sorted(self.path.rglob("*"))
            if path.is_file() and not _is_private(path.relative_to(self.path))
        }
        for name in files:  # what an export wrote beside the parts has to be on disk before the manifest is
            if name not in self._whole:
                flush_tree(self.path / name)
        for name, digest in self._whole.items():
            if files.get(name, {}).get("sha256") != digest:
                raise CorruptArtifact(f"{self.path / name}: changed after it was written; rerun to make it again")
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
        manifest = sealed(manifest)
        write_json(self.path / MANIFEST, manifest)
        return Artifact(self.path, self.record, manifest)


def open_artifact(path: Path, key: Key, record: type[R] | None, replace: bool = False) -> Artifact[R] | Building[R]:
    """Return the finished artifact of `key` in `path`, or what there is of it, to be finished.

    With `replace`, a folder that was made from another key is moved aside (to `NAME.replaced-N`), not deleted.

    Raises:
        StaleArtifact: the folder was made from another key and `replace` is false.
        CorruptArtifact: manifest or key file is not readable JSON.

    """
    found = _found_key(path)
    if found is not None and found != _jsonable(key.as_dict()):
        if not replace:
            raise StaleArtifact(_difference(path, found, _jsonable(key.as_dict())))
        set_aside(path, "replaced")
        found = None
    if (path / MANIFEST).exists():
        return Artifact(path, record, read_manifest(path))
    if found is None and any(path.glob("part-*")):
        set_aside(path, "damaged")  # parts of an unknown key
    path.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    if found is None:
        write_json(path / KEY, {**key.as_dict(), "key": key.digest})
    return Building(path, key, record)


def load_artifact(path: Path, record: type[R] | None) -> Artifact[R] | None:
    """Return the finished artifact in `path`, whatever its key; `None` if there is none.

    Raises:
        CorruptArtifact: its manifest is damaged.

    """
    return Artifact(path, record, read_manifest(path)) if (path / MANIFEST).exists() else None


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the artifact in `path`.

    Raises:
        CorruptArtifact: it is not JSON, was changed after it was written, or a field is not what it should be.

    """
    return checked_manifest(path / MANIFEST, read_sealed(path / MANIFEST, without=OLD_FIELDS))


def read_key(path: Path) -> dict[str, Any]:
    """Return what the key file of the artifact in `path` says.

    Raises:
        CorruptArtifact: it is not JSON, or was changed after it was written.

    """
    found = read_json(path / KEY)
    if isinstance(found, dict):
        known = {name: value for name, value in found.items() if name in OF_KEY}
        # The files of an older version do not repeat the key's digest.
        if known.keys() == OF_KEY.keys() and (found == known or found == {**known, "key": digest_of(known)}):
            return checked_fields(path / KEY, known)
    raise CorruptArtifact(f"{path / KEY}: changed after it was written; rename its folder and rerun to make it again")


def read_parts(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every part in `path` that was noted when it was written."""
    if not (path / PARTS).is_file():
        return {}
    lines = (path / PARTS).read_text(encoding="utf-8", errors="replace").splitlines()
    words = [line.split() for line in lines]
    return {pair[1]: pair[0] for pair in words if len(pair) == 2 and pair[1].startswith("part-")}


def restore_beside(path: Path) -> None:
    """Write key and noted parts of a finished artifact anew: its manifest holds the same."""
    manifest = read_manifest(path)
    write_json(path / KEY, {**{name: manifest[name] for name in OF_KEY}, "key": manifest["key"]})
    parts = {name: file["sha256"] for name, file in manifest["files"].items() if name.startswith("part-")}
    if parts:
        write_text(path / PARTS, "".join(f"{digest}  {name}\n" for name, digest in parts.items()))


def part_name(index: int) -> str:
    """Return the file name of part `index`."""
    return f"part-{index:05d}.parquet"


def _by_number(name: str) -> tuple[int, str]:
    """Sort key of part names, which grow longer from part 100,000 on."""
    return len(name), name


def _is_private(relative: Path) -> bool:
    aside = any(part.startswith(".") or ASIDE.search(part) for part in relative.parts)
    return aside or relative.name in (KEY, MANIFEST, PARTS)


def _remove_leftovers(path: Path) -> None:
    for leftover in path.glob(f"{TEMPORARY}*"):
        remove(leftover)


def _found_key(path: Path) -> dict[str, Any] | None:
    if (path / MANIFEST).exists():
        manifest = read_manifest(path)
        return {name: manifest[name] for name in OF_KEY}
    return read_key(path) if (path / KEY).exists() else None


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
