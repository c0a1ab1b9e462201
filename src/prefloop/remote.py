"""Files at an address such as `s3://bucket/prompts.jsonl`, by fsspec: fetched to be read, sent once they are whole."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from prefloop.artifact import Artifact, load_artifact
from prefloop.disk import file_digest, read_sealed, replacing, sealed, waiting_for, write_json
from prefloop.errors import ConfigError, CorruptArtifact, PrefloopError
from prefloop.rows import digest_of

CACHE = "PREFLOOP_CACHE"
"""Environment variable that names the folder of what was fetched. Default: ~/.cache/prefloop."""
_NOTE = "fetched.json"


def is_address(path: str) -> bool:
    """Return whether `path` names a protocol, as in `s3://…`, and is no path of this machine."""
    return "://" in path


@contextmanager
def fetched(address: str) -> Iterator[Path]:
    """Give a copy of the file or folder at `address` on this machine; it is removed at the end.

    Raises:
        ConfigError: there is nothing, it may not be read, or the protocol's package is not installed.

    """
    system, remote = _system(address)
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / Path(remote.rstrip("/")).name
        with _asking(address, "read"):
            system.get(remote, str(local), recursive=system.isdir(remote))
        yield local


def fetched_folder(address: str) -> Path:
    """Return a copy of the folder at `address` in the cache of this machine, fetched if it is not there as it is now.

    The copy is whole: it has as many bytes as the address says of each file, and is used again only while its own have
    the digests that were noted when it was made, and the address the sizes and dates.

    Raises:
        ConfigError: there is no such folder, it may not be read, or the protocol's package is not installed.
        CorruptArtifact: it is a run's, and its files are not those of its manifest.

    """
    place = Place(address)
    state = place.state()
    if not state:
        raise ConfigError(f"{address}: no such folder, or an empty one; check the address and your access")
    home = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "prefloop").expanduser()
    folder = home / "folders" / digest_of(place.address)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with waiting_for(folder.with_suffix(".lock")):  # ranks of one machine ask at once
        note = {"address": place.address, "state": digest_of(sorted(state.items()))}
        if not _is_whole(folder, note):
            shutil.rmtree(folder, ignore_errors=True)
            _fetch_folder(place, folder, note)
    return folder / "files"


def _fetch_folder(place: "Place", folder: Path, note: Mapping[str, str]) -> None:
    sizes = place.files()
    with replacing(folder) as temporary:
        files = temporary / "files"
        place.get([(name, files / name) for name in sizes])
        for name, size in sizes.items():
            if (files / name).stat().st_size != size:
                raise ConfigError(f"{place.address}/{name}: was cut off or changed while it was fetched; try again")
        made: Artifact[Any] | None = load_artifact(files, None)
        if made is not None:  # the policy of a run knows its own digests
            for name in made.manifest["files"]:
                made.check_file(name)
        digests = {name: file_digest(files / name) for name in sizes}
        write_json(temporary / _NOTE, sealed({**note, "files": digests}))


def _is_whole(folder: Path, note: Mapping[str, str]) -> bool:
    try:
        found = read_sealed(folder / _NOTE)
    except (FileNotFoundError, CorruptArtifact):
        return False
    files = folder / "files"
    same = all(found.get(name) == value for name, value in note.items())
    return same and all((files / n).is_file() and file_digest(files / n) == d for n, d in found["files"].items())


def send(local: Path, address: str) -> None:
    """Copy a file or folder to `address`, where there must be nothing yet.

    Raises:
        ConfigError: there is something already, it may not be written, or the protocol's package is not installed.

    """
    system, remote = _system(address)
    with _asking(address, "written"):
        if system.exists(remote):
            raise ConfigError(f"{address}: exists already; choose an address that does not")
    files = [path for path in sorted(local.rglob("*")) if path.is_file()] if local.is_dir() else [local]
    if local.is_dir():
        Place(address).put([(path.relative_to(local).as_posix(), path) for path in files])
    else:
        parent, _, name = address.rstrip("/").rpartition("/")
        Place(parent).put([(name, local)])


class Place:
    """A folder at an address, in which files have names such as `round-000/3-pairs/manifest.json`.

    Every call raises ConfigError where the address cannot be read or written.
    """

    def __init__(self, address: str) -> None:
        """Find the protocol's file system; nothing is asked of it yet."""
        self.address = address.rstrip("/")
        self._system, remote = _system(address)
        self._root = remote.rstrip("/")

    def files(self) -> dict[str, int]:
        """Return the size of every file, bytes, by name."""
        return {name: int(found["size"]) for name, found in self._listed().items()}

    def state(self) -> dict[str, str]:
        """Return by name what tells a file from one that replaces it: size, and tag or date where there are any."""
        tags = ("size", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")
        return {
            name: json.dumps([str(found.get(tag)) for tag in tags]) for name, found in sorted(self._listed().items())
        }

    def _listed(self) -> dict[str, dict[str, Any]]:
        with _asking(self.address, "read"):
            self._system.invalidate_cache()
            found = self._system.find(self._root, detail=True)
        skip = len(self._root) + 1
        return {name[skip:]: entry for name, entry in found.items() if len(name) > skip}

    def read(self, name: str) -> bytes | None:
        """Return the bytes of a file; `None` if there is none of that name."""
        with _asking(f"{self.address}/{name}", "read"):
            try:
                data: bytes = self._system.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None
            return data

    def write(self, name: str, data: bytes) -> None:
        """Write a file, in one piece where the protocol can."""
        self._make([name], lambda paths: self._system.pipe_file(paths[0], data))

    def put(self, files: Sequence[tuple[str, Path]]) -> None:
        """Copy files of this machine to names there, several at a time where the protocol can."""
        local = [str(path) for _, path in files]
        self._make([name for name, _ in files], lambda paths: self._system.put(local, paths))

    def _make(self, names: Sequence[str], make: Callable[[list[str]], object]) -> None:
        paths = [f"{self._root}/{name}" for name in names]
        with _asking(self._named(names), "written"):
            try:
                make(paths)
            except FileNotFoundError:  # no object store, but a file system with folders
                for folder in sorted({path.rpartition("/")[0] for path in paths}):
                    self._system.makedirs(folder, exist_ok=True)
                make(paths)

    def get(self, files: Sequence[tuple[str, Path]]) -> None:
        """Copy files from there to paths of this machine, several at a time where the protocol can."""
        for folder in {local.parent for _, local in files}:
            folder.mkdir(parents=True, exist_ok=True)
        with _asking(self._named([name for name, _ in files]), "read"):
            self._system.get([f"{self._root}/{name}" for name, _ in files], [str(local) for _, local in files])

    def _named(self, names: Sequence[str]) -> str:
        return f"{self.address}/{names[0]}" if len(names) == 1 else self.address

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; those that are gone already do not matter."""
        for name in names:
            with _asking(f"{self.address}/{name}", "removed"):
                try:
                    self._system.rm_file(f"{self._root}/{name}")
                except FileNotFoundError:
                    continue


@contextmanager
def _asking(address: str, verb: str) -> Iterator[None]:
    """Turn what a protocol's package raises into an error that names the address."""
    try:
        yield
    except PrefloopError:
        raise
    except Exception as error:  # storage packages raise classes of their own, of no common base
        why = str(error) or type(error).__name__
        raise ConfigError(f"{address}: cannot be {verb} ({why}); check the address and your access") from error


def _system(address: str) -> tuple[Any, str]:
    try:
        system, remote = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{address}: {error}; a protocol needs its fsspec package, such as s3fs for s3://") from error
    return system, remote
