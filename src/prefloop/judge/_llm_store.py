"""Where a judge keeps what it was answered: each reply as it arrives, under a digest of all that it depends on.

What is stored is the reply as it came; its verdict is read anew every time. A reply without a verdict is stored too,
because it was paid for.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from prefloop.errors import DataError
from prefloop.judge._llm_replies import Style

VERSION = 1
"""Layout of the file and meaning of its keys."""
_TABLE = """
create table if not exists replies (
  key text primary key,
  judge text not null,
  mode text not null,
  template text not null,
  prompt_id text not null,
  shown text not null,
  repeat integer not null,
  verdict text,
  why text not null,
  style text not null,
  reply text not null,
  finish_reason text not null,
  token_ids text,
  logps text,
  prompt_tokens integer not null,
  completion_tokens integer not null,
  at text not null default current_timestamp
)
"""
_AT_ONCE = 500
"""Keys of one query; SQLite allows 999 in its oldest versions."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the judging model wrote.

    `finish_reason` is `stop` where it ended by itself. `token_ids` and `logps` (nats, temperature 1) are known where
    it was generated in this process. The token counts are the server's, or estimates where it gives none.
    """

    text: str
    style: Style
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    token_ids: tuple[int, ...] | None = None
    logps: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What a reply was to: for people and statistics that read the file.

    `shown` are the ids of the completions, or places of the judgements, in the order in which the judge saw them.
    `verdict` is JSON with one value for each label: grades; A, B or tie; places. `None`: no verdict, and `why`.
    """

    judge: str
    mode: str
    template: str
    prompt_id: str
    shown: tuple[str, ...]
    repeat: int
    verdict: str | None
    why: str


class VerdictStore(Protocol):
    """Keeps replies by key."""

    def find(self, keys: Sequence[str]) -> dict[str, Reply]:
        """Return the replies that are there."""
        ...

    def add(self, key: str, reply: Reply, facts: Facts) -> None:
        """Keep a reply; it is safe when this returns."""
        ...

    def used(self, judge: str) -> tuple[int, int]:
        """Return how many replies of `judge` are kept, and their tokens with those of the questions."""
        ...


def content_key(content: Mapping[str, object]) -> str:
    """Return the SHA-256 of `content` as canonical JSON."""
    text = json.dumps([VERSION, content], ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass
class InMemory:
    """Keeps replies for as long as the judge lives."""

    replies: dict[str, tuple[Reply, Facts]] = field(default_factory=dict)

    def find(self, keys: Sequence[str]) -> dict[str, Reply]:
        """Return the replies that are there."""
        return {key: self.replies[key][0] for key in keys if key in self.replies}

    def add(self, key: str, reply: Reply, facts: Facts) -> None:
        """Keep a reply."""
        self.replies.setdefault(key, (reply, facts))

    def used(self, judge: str) -> tuple[int, int]:
        """Return how many replies of `judge` are kept, and their tokens with those of the questions."""
        mine = [reply for reply, facts in self.replies.values() if facts.judge == judge]
        return len(mine), sum(reply.prompt_tokens + reply.completion_tokens for reply in mine)


@dataclass
class InFile:
    """Keeps replies in an SQLite file with a write-ahead log: a kill at any moment loses none that was added.

    Several processes may use one file. A reply that is there already stays.
    """

    connection: sqlite3.Connection

    def find(self, keys: Sequence[str]) -> dict[str, Reply]:
        """Return the replies that are there."""
        found: dict[str, Reply] = {}
        for start in range(0, len(keys), _AT_ONCE):
            some = keys[start : start + _AT_ONCE]
            rows = self.connection.execute(
                "select key, reply, style, finish_reason, prompt_tokens, completion_tokens, token_ids, logps "
                f"from replies where key in ({','.join('?' * len(some))})",
                some,
            )
            for key, text, style, finish, asked, answered, token_ids, logps in rows:
                found[key] = Reply(text, style, finish, asked, answered, _tuple(token_ids), _tuple(logps))
        return found

    def add(self, key: str, reply: Reply, facts: Facts) -> None:
        """Keep a reply."""
        row = (
            *(key, facts.judge, facts.mode, facts.template, facts.prompt_id, json.dumps(facts.shown), facts.repeat),
            *(facts.verdict, facts.why, reply.style, reply.text, reply.finish_reason),
            *(_json(reply.token_ids), _json(reply.logps), reply.prompt_tokens, reply.completion_tokens),
        )
        with self.connection:
            self.connection.execute(
                "insert or ignore into replies (key, judge, mode, template, prompt_id, shown, repeat, verdict, why, "
                "style, reply, finish_reason, token_ids, logps, prompt_tokens, completion_tokens) "
                f"values ({','.join('?' * len(row))})",
                row,
            )

    def used(self, judge: str) -> tuple[int, int]:
        """Return how many replies of `judge` are kept, and their tokens with those of the questions."""
        calls, tokens = self.connection.execute(
            "select count(*), coalesce(sum(prompt_tokens + completion_tokens), 0) from replies where judge = ?",
            (judge,),
        ).fetchone()
        return int(calls), int(tokens)


@contextmanager
def open_file(path: Path) -> Iterator[InFile]:
    """Open or make a file of replies.

    Raises:
        DataError: the file is not one of ours, is damaged, or cannot be written.

    """
    refusal = f"judge.store: {path} cannot be used ({{}}); name another file, or move this one away"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=60.0)
    except (sqlite3.Error, OSError) as error:
        raise DataError(refusal.format(error)) from error
    with closing(connection):
        try:
            _prepare(connection, path)
            yield InFile(connection)
        except sqlite3.Error as error:
            raise DataError(refusal.format(error)) from error


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    version = connection.execute("pragma user_version").fetchone()[0]
    tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
    if version not in (0, VERSION) or (version == 0 and tables):
        raise DataError(f"judge.store: {path} is another kind of SQLite file; name another file")
    connection.execute("pragma journal_mode = wal")
    connection.execute("pragma synchronous = normal")
    with connection:
        connection.execute(_TABLE)
        connection.execute(f"pragma user_version = {VERSION}")


def _json(values: Sequence[float] | None) -> str | None:
    return None if values is None else json.dumps(list(values))


def _tuple(text: str | None) -> tuple[int, ...] | None:
    return None if text is None else tuple(json.loads(text))


@dataclass(frozen=True, slots=True)
class Filed:
    """A stored verdict that compared texts. `values` are those of its form: a letter or `tie`, or the places."""

    judge: str
    mode: str
    template: str
    prompt_id: str
    shown: tuple[str, ...]
    repeat: int
    values: tuple[object, ...]


def comparisons_in(path: Path) -> list[Filed]:
    """Return the verdicts of comparisons and rankings in a file of replies, oldest first, without changing it.

    Raises:
        DataError: the file cannot be read.

    """
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            rows = connection.execute(
                "select judge, mode, template, prompt_id, shown, repeat, verdict from replies "
                "where mode in ('compare', 'rank') and verdict is not null order by at, key"
            ).fetchall()
    except sqlite3.Error as error:
        raise DataError(f"{path}: cannot be read as a store of verdicts ({error})") from error
    return [
        Filed(judge, mode, template, prompt, tuple(json.loads(shown)), repeat, tuple(json.loads(verdict)))
        for judge, mode, template, prompt, shown, repeat, verdict in rows
    ]
