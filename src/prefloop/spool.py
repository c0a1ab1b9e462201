"""Records that may be more than fit into memory: the last ones as they are, those before in a temporary file.

The file has no name: it ends with the process, however that dies. It lies where `tempfile.gettempdir()` says, which the
environment variable TMPDIR decides.
"""

import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, overload

from prefloop.columns import decoder, to_plain

T = TypeVar("T")
R = TypeVar("R")

ROWS = 4096
"""Records that are kept in memory before they are written: a smaller set is never on disk."""
CHARACTERS = 2**25
"""Characters of records that are kept in memory, whatever their number."""
AT_ONCE = 512
"""Records that are read together when all are gone through."""


class Spool(Sequence[T]):
    """Records in the order in which they were appended, 8 bytes of index for each. Appending ends with the first read.

    `encode` and `decode` say how a record lies in the file.
    """

    def __init__(self, encode: Callable[[T], bytes], decode: Callable[[bytes], T]) -> None:
        """Begin without records."""
        self._encode, self._decode = encode, decode
        self._ends = array("Q", [0])
        self._tail: list[T] = []
        self._characters = 0
        self._file: int | None = None

    @classmethod
    def of(cls, record: type[R]) -> "Spool[R]":
        """Return an empty spool for the instances of a record class (see `columns`)."""
        decode = decoder(record)
        return Spool(
            lambda item: json.dumps(to_plain(item)).encode(),
            lambda line: decode(json.loads(line)),
        )

    def append(self, item: T, characters: int = 0) -> None:
        """Add a record; `characters` is about how long its texts are."""
        self._tail.append(item)
        self._characters += characters
        if len(self._tail) >= ROWS or self._characters >= CHARACTERS:
            self._write()

    def _write(self) -> None:
        lines = [self._encode(item) for item in self._tail]
        end = self._ends[-1]
        try:
            if self._file is None:
                with tempfile.TemporaryFile(buffering=0) as file:
                    self._file = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._file)
            with memoryview(b"".join(lines)) as data:
                done = 0
                while done < len(data):
                    done += os.pwrite(self._file, data[done:], end + done)
        except OSError as error:
            error.filename = f"{tempfile.gettempdir()} (TMPDIR)"
            raise
        for line in lines:
            end += len(line)
            self._ends.append(end)
        self._tail.clear()
        self._characters = 0

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._ends) - 1 + len(self._tail)

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        """Return a record, read from the file if it is there."""
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = place + len(self) if place < 0 else place
        if not 0 <= place < len(self):
            raise IndexError(place)
        written = len(self._ends) - 1
        return self._tail[place - written] if place >= written else next(self._read(place, place + 1))

    def __iter__(self) -> Iterator[T]:
        """Yield all records, in order."""
        written = len(self._ends) - 1
        for first in range(0, written, AT_ONCE):
            yield from self._read(first, min(first + AT_ONCE, written))
        yield from self._tail

    def _read(self, first: int, end: int) -> Iterator[T]:
        assert self._file is not None
        start = self._ends[first]
        data = os.pread(self._file, self._ends[end] - start, start)
        for place in range(first, end):
            yield self._decode(data[self._ends[place] - start : self._ends[place + 1] - start])
