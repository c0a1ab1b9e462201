"""What people clicked, in an SQLite file of the run: every click is on disk before it is answered.

Clicks are only ever added: an undo is a line of its own that names what it takes back. What holds is what is left.
"""

import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefloop.errors import DataError
from prefloop.label.pairs import Item

FILE = "labels.sqlite"
"""Name of the file in the run folder."""
VERSION = 1
"""Layout of the file."""
CHOSEN, REJECTED, TIE, BOTH_BAD, SKIP = "chosen", "rejected", "tie", "both_bad", "skip"
VERDICTS = (CHOSEN, REJECTED, TIE, BOTH_BAD, SKIP)
"""What is stored: the side of the pair, never the side of the screen."""
PAGE = "page"
"""Origin of a click; other ones name the file that was imported."""
_WAIT = 20.0
"""Seconds that a click waits while another process writes."""
_TABLES = """
create table pairs (
  round integer not null,
  key text not null,
  pair_id text not null,
  prompt_id text not null,
  prefix text not null,
  chosen text not null,
  rejected text not null,
  builder text not null,
  judged text not null,
  primary key (round, key)
);
create table events (
  id integer primary key autoincrement,
  event text not null,
  round integer not null,
  annotator text not null,
  key text not null,
  verdict text,
  undoes integer references events (id),
  origin text not null,
  at text not null,
  unique (annotator, event)
);
create index events_of on events (round, annotator);
create table sessions (
  digest text primary key,
  annotator text,
  seen real not null
);
create view standing as
  select round, annotator, key, verdict, origin, at, max(id) as id from events
  where verdict is not null and id not in (select undoes from events where undoes is not null)
  group by round, annotator, key;
"""


@dataclass(frozen=True, slots=True)
class Given:
    """A verdict that holds. `number` grows with time; `at` is UTC, ISO 8601."""

    annotator: str
    key: str
    verdict: str
    origin: str
    at: str
    number: int


@dataclass(frozen=True, slots=True)
class Click:
    """One click to store. `event` is the clicking page's own name for it: the same one twice is stored once."""

    event: str
    annotator: str
    item: Item
    verdict: str
    origin: str = PAGE


@dataclass(frozen=True, slots=True)
class StoredPair:
    """A pair that somebody judged, with the sides as they were when the first verdict on it came."""

    key: str
    pair_id: str
    prompt_id: str
    prefix: str
    chosen: str
    rejected: str
    builder: str
    judged: str


class Store:
    """The clicks of one run. Threads and processes may share a file."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Work on an open connection: see `open_store`."""
        self._connection = connection
        self._lock = threading.RLock()

    def add(self, number: int, judged: str, clicks: Sequence[Click]) -> int:
        """Store clicks on pairs of round `number`, all or none, and return how many were new.

        They are on disk when this returns.
        """
        added = 0
        with self.writing() as write:
            for click in clicks:
                stored = _stored(click.item, judged)
                write(
                    "insert into pairs values (?, ?, ?, ?, ?, ?, ?, ?, ?) "
                    "on conflict (round, key) do update set judged = excluded.judged",
                    (number, *stored),
                )
                (chosen,) = write(
                    "select chosen from pairs where round = ? and key = ?", (number, click.item.key)
                ).fetchone()
                verdict = click.verdict if chosen == click.item.chosen else exchanged(click.verdict)
                added += write(
                    "insert or ignore into events (event, round, annotator, key, verdict, origin, at) "
                    "values (?, ?, ?, ?, ?, ?, ?)",
                    (click.event, number, click.annotator, click.item.key, verdict, click.origin, now()),
                ).rowcount
        return added

    def undo(self, number: int, annotator: str, event: str) -> str | None:
        """Take back the annotator's last click on a page and return the pair's key; `None`: there is nothing left.

        The same `event` twice takes back one click.
        """
        with self.writing() as write:
            before = write("select key from events where annotator = ? and event = ?", (annotator, event)).fetchone()
            if before is not None:
                return str(before[0])
            last = self._last(number, annotator)
            if last is None:
                return None
            write(
                "insert into events (event, round, annotator, key, undoes, origin, at) values (?, ?, ?, ?, ?, ?, ?)",
                (event, number, annotator, last[1], last[0], PAGE, now()),
            )
            return last[1]

    def can_undo(self, number: int, annotator: str) -> bool:
        """Whether there is a click to take back."""
        return self._last(number, annotator) is not None

    def given(self, number: int, annotator: str | None = None) -> list[Given]:
        """Return the verdicts that hold, of one annotator or of all, oldest first; skipped pairs too."""
        rows = self.read(
            "select annotator, key, verdict, origin, at, id from standing "
            "where round = ? and (? is null or annotator = ?) order by id",
            (number, annotator, annotator),
        )
        return [Given(*row) for row in rows]

    def pairs(self, number: int) -> dict[str, StoredPair]:
        """Return the pairs of a round that somebody judged, by key."""
        columns = "key, pair_id, prompt_id, prefix, chosen, rejected, builder, judged"
        rows = self.read(f"select {columns} from pairs where round = ?", (number,))
        return {row[0]: StoredPair(*row) for row in rows}

    def clicks_of(self, annotator: str) -> int:
        """Return how many verdicts of an annotator hold, over all rounds."""
        rows = self.read("select count(*) from standing where annotator = ? and verdict <> ?", (annotator, SKIP))
        return int(rows[0][0])

    def read(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """Return the rows of a query."""
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def writing(self) -> Iterator[Any]:
        """Give the function that executes a statement; all of them are stored together, or none."""
        with self._lock:
            # Immediate: a transaction that reads first and writes then cannot be refused half-way.
            self._connection.execute("begin immediate")
            try:
                yield self._connection.execute
            except BaseException:
                self._connection.execute("rollback")
                raise
            self._connection.execute("commit")

    def _last(self, number: int, annotator: str) -> tuple[int, str] | None:
        rows = self.read(
            "select id, key from events where round = ? and annotator = ? and verdict is not null and origin = ? "
            "and id not in (select undoes from events where undoes is not null) order by id desc limit 1",
            (number, annotator, PAGE),
        )
        return None if not rows else (int(rows[0][0]), str(rows[0][1]))


@contextmanager
def open_store(root: Path) -> Iterator[Store]:
    """Open the file of a run, or make it.

    Raises:
        DataError: it is not one of ours, is damaged, or cannot be written.

    """
    path = root / FILE
    refusal = f"{path}: cannot be used ({{}}); free some room, or move the file away to begin a new one"
    try:
        connection = sqlite3.connect(path, timeout=_WAIT, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise DataError(refusal.format(error)) from error
    with closing(connection):
        try:
            _prepare(connection, path)
        except sqlite3.Error as error:
            raise DataError(refusal.format(error)) from error
        yield Store(connection)


def exchanged(verdict: str) -> str:
    """Return the verdict as it reads with the pair's sides exchanged."""
    sides: Mapping[str, str] = {CHOSEN: REJECTED, REJECTED: CHOSEN}
    return sides.get(verdict, verdict)


def now() -> str:
    """Return the time, UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    _write_ahead(connection)
    # With the write-ahead log, `full` flushes it at every commit: a click survives a power cut too.
    connection.execute("pragma synchronous = full")
    connection.execute("pragma foreign_keys = on")
    connection.execute("begin immediate")
    version = connection.execute("pragma user_version").fetchone()[0]
    tables = connection.execute("select name from sqlite_master where type = 'table'").fetchall()
    if version not in (0, VERSION) or (version == 0 and tables):
        connection.execute("rollback")
        raise DataError(f"{path}: another kind of SQLite file, or of another version of prefloop; move it away")
    if version == 0:
        for statement in _TABLES.split(";\n"):
            connection.execute(statement)
        connection.execute(f"pragma user_version = {VERSION}")
    connection.execute("commit")


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switch the write-ahead log on. Two processes that do so at once do not wait for each other by themselves."""
    until = time.monotonic() + _WAIT
    while True:
        try:
            connection.execute("pragma journal_mode = wal")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.02)


def _stored(item: Item, judged: str) -> tuple[str, ...]:
    return (
        *(item.key, item.pair_ids[0], item.prompt_id, item.prefix, item.chosen, item.rejected, item.builder),
        judged,
    )
