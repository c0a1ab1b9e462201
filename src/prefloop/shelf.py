"""Parts of a stage that are made before its inputs are finished, until the stage takes them over.

    round-000/.2-judged.ahead/   an unfinished artifact that never becomes a finished one; goes when its stage is done

Whoever takes a part over compares what it was made from with the finished inputs first: these may have been made anew
since. What is taken over is what the stage would have made itself, bit for bit.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from prefloop.artifact import KEY, Artifact, Building, Key, open_artifact, part_name, read_key, read_parts
from prefloop.columns import read_rows
from prefloop.disk import file_digest, remove
from prefloop.errors import CorruptArtifact, StaleArtifact

R = TypeVar("R")

POLL = 0.05
"""Seconds between looks for the next part."""


@dataclass(frozen=True)
class Shelf(Generic[R]):
    """What was made ahead of the stage in folder `stage`."""

    building: Building[R]

    @classmethod
    def of(cls, stage: Path, key: Key, record: type[R]) -> "Shelf[R]":
        """Return the shelf of a stage, emptied if it holds what was made under another key or is damaged."""
        path = folder_of(stage)
        try:
            opened = open_artifact(path, key, record)
        except (CorruptArtifact, StaleArtifact):
            remove(path)
            opened = open_artifact(path, key, record)
        if isinstance(opened, Artifact):  # none of ours is ever finished
            remove(path)
            return cls.of(stage, key, record)
        return cls(opened)

    def put(self, index: int, rows: list[R]) -> None:
        """Keep part `index`."""
        self.building.write_part(index, rows)

    def take(self, index: int) -> list[R] | None:
        """Return part `index`; `None` if it was not made, or is damaged."""
        assert self.building.record is not None
        return part_of(self.building.path, index, self.building.record)


def folder_of(stage: Path) -> Path:
    """Return where the shelf of the stage in folder `stage` is."""
    return stage.with_name(f".{stage.name}.ahead")


def clear(stage: Path) -> None:
    """Remove the shelf of a stage that is finished."""
    remove(folder_of(stage))


def part_of(folder: Path, index: int, record: type[R]) -> list[R] | None:
    """Return the rows of part `index` in `folder`, finished or not; `None` if it is not there as it was written."""
    path = folder / part_name(index)
    noted = read_parts(folder).get(path.name)
    if noted is None or not path.is_file() or file_digest(path) != noted:
        return None
    return list(read_rows(path, record))


def as_they_come(folder: Path, key: Key, record: type[R], complete: Callable[[], bool]) -> Iterator[list[R]]:
    """Yield the parts of the artifact of `key` in `folder` in their order, each once it is there.

    Ends when `complete()` is true and there is no further part. A folder of another key is not looked into.
    """
    index = 0
    while True:
        over = complete()  # asked first, so that what was finished before is not missed
        part = part_of(folder, index, record) if _is_of(folder, key) else None
        if part is not None:
            yield part
            index += 1
        elif over:
            return
        else:
            time.sleep(POLL)


def _is_of(folder: Path, key: Key) -> bool:
    try:
        return (folder / KEY).is_file() and Key(**read_key(folder)).digest == key.digest
    except (CorruptArtifact, FileNotFoundError):
        return False
