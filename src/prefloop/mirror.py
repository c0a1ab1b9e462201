"""A run's second home at an address: what is finished is copied there while the run goes on, and fetched if it is lost.

The address holds the same files as the run folder, and `mirror.json`, which says whose they are. A thread looks at the
run folder every few seconds and sends what is new (see `mirror_scan`):

- a finished artifact: its files, compared with its manifest, then the manifest; without it nothing of them counts;
- of an unfinished one its key and the parts that are whole, and the training states, each with its `state.json` last;
- `summary.json`, `recipe.yaml` and `report.html` when they change, and copies of the run's SQLite files.

What cannot be sent is tried again, and a run never fails for it. `mirror_fetch` goes the other way.
"""

import json
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefloop.artifact import KEY, MANIFEST, read_json, write_json
from prefloop.disk import file_digest, sealed
from prefloop.errors import ConfigError, CorruptArtifact
from prefloop.mirror_fetch import COPIES, MIRROR, STAGING, copy_name, fetch, parsed, remote_digests
from prefloop.mirror_scan import DATABASES, Batch, batches, changed_at, digest_of_bytes, snapshot, stamp
from prefloop.recipe import Recipe
from prefloop.remote import Place
from prefloop.train.states import STATES

LOOK = 2.0
"""Seconds between two looks at the run folder."""
DATABASE_EVERY = 60.0
"""Seconds, at least, between two copies of an SQLite file, which is sent whole."""
MOST_WAIT = 60.0
"""Seconds, at most, until what could not be sent is tried again."""
TRIES = 4
"""Attempts in a row until a person is told, and at the end of a run until it is left at that."""
MAY_DIFFER = frozenset({"name", "rounds", "loggers", "threads", "policy", "prompts"})
"""Settings with which a run may go on though they were others. Policy and prompts are known by digests, and may lie
elsewhere on another machine; where their content is another one, the run's stages are refused."""

Say = Callable[[str], None]


class Mirror:
    """What is at the address, and the thread that brings it up to date. Without an address all calls do nothing."""

    def __init__(self, root: Path, place: Place | None, session: str, say: Say) -> None:
        """Send nothing yet."""
        self._root, self._place, self._session, self._say = root, place, session, say
        self._sent: dict[str, str] = {}
        self._done: dict[str, tuple[int, ...]] = {}
        self._databases: dict[str, tuple[tuple[int, ...], float]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failed = 0
        self._lost = False

    def begin(self) -> None:
        """Begin to copy, in a thread."""
        if self._place is not None:
            self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
            self._thread.start()

    def end(self, tries: int = TRIES) -> str | None:
        """Stop the thread, copy what is left, and return what is to be said of it where that failed."""
        if self._place is None:
            return None
        self._halt()
        why = ""
        for number in range(tries):
            try:
                if self._bring_up_to_date(databases=True):
                    return None
                return f"mirror: {self._place.address} is another process's now, and was left as that has it"
            except (ConfigError, OSError) as error:
                why = str(error)
                time.sleep(min(LOOK * 2**number, MOST_WAIT) if number < tries - 1 else 0.0)
        return f"mirror: the copy at {self._place.address} is not complete: {why}. The same command completes it"

    def _halt(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        wait = LOOK
        while not self._stop.wait(wait):
            try:
                if not self._bring_up_to_date():
                    return
                if self._failed >= TRIES:
                    self._say("mirror: can be written again")
                self._failed, wait = 0, LOOK
            except (ConfigError, OSError) as error:
                self._failed += 1
                wait = min(2 * wait, MOST_WAIT)
                if self._failed == TRIES:
                    self._say(f"mirror: {error}. It is tried again; the run goes on without")

    def _bring_up_to_date(self, databases: bool = False) -> bool:
        """Send what is new; return whether the address is still this process's."""
        if not self._sent:
            assert self._place is not None
            self._sent = remote_digests(self._place)
        for batch in batches(self._root, self._done):
            found = stamp(self._root / batch.folder / MANIFEST)
            if self._new(batch) and not self._send(batch):
                return False
            if batch.whole and not self._new(batch):
                self._done[batch.folder] = found
        return all(self._send_database(name, databases) for name in DATABASES)

    def _new(self, batch: Batch) -> bool:
        seals = {name: digest_of_bytes(data) for name, data in batch.seal.items()}
        return any(self._sent.get(name) != digest for name, digest in {**batch.files, **seals}.items())

    def _send(self, batch: Batch) -> bool:
        """Send a batch, its seal last; return whether the address is still this process's."""
        place = self._still_mine()
        if place is None:
            return False
        missing = {name: digest for name, digest in batch.files.items() if self._sent.get(name) != digest}
        if any(self._sent.get(name) for name in missing):  # made anew: what it replaces must not count any more
            self._remove(name for name in batch.seal if name in self._sent)
        whole = [name for name, digest in missing.items() if self._is_whole(name, digest)]
        if len(whole) < len(missing):
            return True  # it changes now, or is damaged: the run will say so
        self._sent |= dict.fromkeys(whole, "")  # what a copy that fails leaves is known, and goes with the rest
        try:
            place.put([(name, self._root / name) for name in whole])
        except ConfigError:
            if all((self._root / name).is_file() for name in whole):
                raise
            return True  # a training state that has just been replaced by newer ones
        self._sent |= missing
        for name, data in batch.seal.items():
            if self._sent.get(name) != digest_of_bytes(data):
                place.write(name, data)
                self._sent[name] = digest_of_bytes(data)
        if batch.whole:
            known = {*batch.files, *batch.seal}
            self._remove(n for n in list(self._sent) if n.startswith(f"{batch.folder}/") and n not in known)
        elif f"/{STATES}/" in batch.folder:
            self._remove(n for n in list(self._sent) if f"/{STATES}/" in n and not (self._root / n).exists())
        return True

    def _is_whole(self, name: str, digest: str) -> bool:
        try:
            return file_digest(self._root / name) == digest
        except OSError:
            return False

    def _remove(self, names: Any) -> None:
        assert self._place is not None
        gone = list(names)
        self._place.remove(gone)
        for name in gone:
            del self._sent[name]

    def _send_database(self, name: str, now: bool) -> bool:
        path = self._root / name
        known, at = self._databases.get(name, ((), float("-inf")))
        state = changed_at(path)
        if state == known or not state or (not now and time.monotonic() < at + DATABASE_EVERY):
            return True
        place = self._still_mine()
        if place is None:
            return False
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy"
            digest = snapshot(path, copy)
            before = parsed(place.read(COPIES))
            if before.get(name) != digest:
                place.put([(copy_name(name, digest), copy)])
                place.write(COPIES, json.dumps({**before, name: digest}).encode())
                if isinstance(before.get(name), str):
                    place.remove([copy_name(name, before[name])])
        self._databases[name] = (state, time.monotonic())
        return True

    def _still_mine(self) -> Place | None:
        """Return the place, unless another process has taken over: two would spoil each other's copies."""
        assert self._place is not None
        if not self._lost and parsed(self._place.read(MIRROR)).get("session") != self._session:
            self._lost = True
            self._say(f"mirror: another process copies to {self._place.address} now; this one does not any more")
        return None if self._lost else self._place


@contextmanager
def mirrored(address: str | None, root: Path, recipe: Recipe, redo: bool, say: Say) -> Iterator[Mirror]:
    """Connect the run in `root` with its copy at `address`: fetch that where the folder is empty. Hold the run's lock.

    `begin` starts the copying; at the end of the block what is left is sent.

    Raises:
        ConfigError: the address cannot be used, or holds another run.

    """
    mirror = Mirror(root, None, "", say) if address is None else _connected(address, root, recipe, redo, say)
    try:
        yield mirror
    except KeyboardInterrupt:
        mirror.end(tries=0)
        raise
    except BaseException:
        if said := mirror.end(tries=1):
            say(said)
        raise
    if said := mirror.end():
        say(said)


def _connected(address: str, root: Path, recipe: Recipe, redo: bool, say: Say) -> Mirror:
    place = Place(address)
    there, here = _whose(place), _own(root)
    shutil.rmtree(root / STAGING, ignore_errors=True)
    empty = not any(next(root.rglob(name), None) for name in (KEY, MANIFEST))
    settings = recipe.model_dump(mode="json")
    if there is None:
        if place.files():
            raise ConfigError(f"--mirror: {address} holds other files; choose an address that is empty")
        name = here.get("id") or secrets.token_hex(8)
    elif empty or (here.get("id") == there["id"] and here.get("fetching")):
        name = there["id"]
        if not redo:
            _require_same(address, there["recipe"], json.loads(json.dumps(settings)))
        say(f"mirror: fetching the run at {address}")
        write_json(root / MIRROR, {"id": name, "address": address, "fetching": True})  # until it is all there
        taken = fetch(place, root, say)
        say(f"mirror: {taken} finished stages fetched")
    elif here.get("id") != there["id"]:
        raise ConfigError(
            f"--mirror: {address} holds another run than {root}; choose another address, or an empty --out to fetch it"
        )
    else:
        name = there["id"]
    # First here: a run that is stopped between the two finds its own name again.
    write_json(root / MIRROR, {"id": name, "address": address})
    session = secrets.token_hex(8)
    said = {"id": name, "session": session, "recipe": settings, "prefloop": version("prefloop")}
    place.write(MIRROR, (json.dumps(sealed(said), indent=1, sort_keys=True) + "\n").encode())
    return Mirror(root, place, session, say)


def _whose(place: Place) -> dict[str, Any] | None:
    """Return what the address says of whose it is; `None` if it says nothing."""
    data = place.read(MIRROR)
    if data is None:
        return None
    found = parsed(data)
    if sealed(found) != found or not {"id", "recipe"} <= found.keys():
        raise ConfigError(f"--mirror: {place.address}/{MIRROR} was cut off or changed; choose another address")
    return found


def _own(root: Path) -> dict[str, Any]:
    try:
        found = read_json(root / MIRROR)
    except (FileNotFoundError, CorruptArtifact):
        return {}
    return found if isinstance(found, dict) else {}


def _require_same(address: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    differ = sorted(name for name in {*theirs, *ours} - MAY_DIFFER if theirs.get(name) != ours.get(name))
    if differ:
        changes = "; ".join(f"{name}: {theirs.get(name)!r} → {ours.get(name)!r}"[:200] for name in differ[:3])
        raise ConfigError(
            f"--mirror: {address} holds a run of other settings ({changes}). Set them back, choose another address, or "
            "pass --redo to fetch it and make again what differs"
        )
