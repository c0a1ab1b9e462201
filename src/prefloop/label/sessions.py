"""Who is at the page: sessions, and the names under which they judge. A name belongs to one session at a time."""

import hashlib
import hmac
import secrets
import time
import unicodedata
from dataclasses import dataclass

from prefloop.errors import ConfigError, PrefloopError
from prefloop.label.store import Store

IDLE = 12 * 3600.0
"""Seconds after its last request at which a session ends."""
LONGEST_NAME = 40
_NOTE_EVERY = 30.0
"""Seconds between two notes of when a session was last seen; each is a write."""


class NameInUse(PrefloopError):
    """A name has verdicts already, or another window works under it: the person has to say that it is theirs."""


@dataclass(frozen=True, slots=True)
class Session:
    """A signed-in browser; `annotator` is `None` until it has taken a name."""

    digest: str
    annotator: str | None


class Sessions:
    """The sessions of a run. The file keeps a digest of each secret, never the secret, so they outlive a restart.

    `password` is part of the digest: with another password every session has ended.
    """

    def __init__(self, store: Store, password: str = "") -> None:
        """Work on the run's store."""
        self._store = store
        self._password = password

    def begin(self, annotator: str | None = None, after: Session | None = None) -> str:
        """Begin a session and return its secret. It takes the name `annotator` if no other session has it.

        `after` is the session that the same browser had before; it ends, and leaves its name where none is asked for.
        """
        secret = secrets.token_urlsafe(32)
        with self._store.writing() as write:
            write("delete from sessions where seen < ?", (time.time() - IDLE,))
            if after is not None:
                write("delete from sessions where digest = ?", (after.digest,))
                annotator = annotator or after.annotator
            name = None if annotator is None else self._as_known(annotator)
            if name is not None and self._holder(name) is not None:
                name = None
            write("insert into sessions values (?, ?, ?)", (self._digest(secret), name, time.time()))
        return secret

    def find(self, secret: str | None) -> Session | None:
        """Return the session of a secret; `None`: there is none, or it has ended."""
        if not secret:
            return None
        digest, now = self._digest(secret), time.time()
        rows = self._store.read("select annotator, seen from sessions where digest = ?", (digest,))
        if not rows or rows[0][1] < now - IDLE:
            return None
        if rows[0][1] < now - _NOTE_EVERY:
            with self._store.writing() as write:
                write("update sessions set seen = ? where digest = ?", (now, digest))
        return Session(digest, rows[0][0])

    def claim(self, session: Session, name: str, *, confirmed: bool = False) -> str:
        """Give a session a name and return it, as it is spelt in the run already if it is there.

        Raises:
            ConfigError: that is no name.
            NameInUse: it has verdicts, or another session has it, and the person did not confirm that it is theirs.

        """
        name = self._as_known(checked_name(name))
        with self._store.writing() as write:
            seen = self._holder(name, session.digest)
            verdicts = self._store.clicks_of(name)
            if not confirmed and name != session.annotator and (seen is not None or verdicts):
                raise NameInUse(_in_use(name, verdicts, seen))
            write("update sessions set annotator = null where annotator = ?", (name,))
            write("update sessions set annotator = ? where digest = ?", (name, session.digest))
        return name

    def _holder(self, name: str, besides: str = "") -> float | None:
        """Return when another live session that has the name was last seen, seconds of the epoch."""
        rows = self._store.read(
            "select max(seen) from sessions where annotator = ? and digest <> ? and seen >= ?",
            (name, besides, time.time() - IDLE),
        )
        return None if rows[0][0] is None else float(rows[0][0])

    def _as_known(self, name: str) -> str:
        """Return the name as the run spells it: Ana and ana are one person."""
        known = self._store.read(
            "select annotator from events union select annotator from sessions where annotator is not null"
        )
        return next((row[0] for row in known if row[0].casefold() == name.casefold()), name)

    def _digest(self, secret: str) -> str:
        return hmac.new(self._password.encode(), secret.encode(), hashlib.sha256).hexdigest()


def checked_name(name: str) -> str:
    """Return an annotator's name without needless spaces.

    Raises:
        ConfigError: it is empty, too long, or has characters that cannot be seen.

    """
    found = " ".join(unicodedata.normalize("NFC", name).split())
    if not found or len(found) > LONGEST_NAME or not found.isprintable():
        raise ConfigError(f"annotator: a name has 1 to {LONGEST_NAME} visible characters, got {name[:60]!r}")
    return found


def _in_use(name: str, verdicts: int, seen: float | None) -> str:
    parts = [f"{name} has judged {verdicts} pair{'s' if verdicts != 1 else ''} of this run"] if verdicts else []
    if seen is not None:
        minutes = int((time.time() - seen) / 60)
        when = "just now" if minutes < 1 else f"{minutes} min ago"
        parts.append(f"{'' if verdicts else name + ' '}is in use in another window, last seen {when}")
    return f"{' and '.join(parts)}. Two people cannot share a name."
