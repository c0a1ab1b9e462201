"""Files that are whole or absent, whatever kills the process; one process in a folder; what to say of a bad disk."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefloop.errors import ConfigError, CorruptArtifact, MachineFailed, RunLocked
from prefloop.rows import digest_of

TEMPORARY = ".writing-"
CHECK = "check"
"""Field of a JSON file that holds a digest of all others."""


def set_aside(path: Path, reason: str) -> Path:
    """Rename `path` to the first free `NAME.REASON-N` and return the new name."""
    number = 1
    while (target := path.with_name(f"{path.name}.{reason}-{number}")).exists():
        number += 1
    path.rename(target)
    flush_folder(target.parent)
    return target


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; on a clean exit flush it and rename it to `path`.

    Works for a file and for a folder. After an exception the temporary is removed and `path` is untouched.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    remove(temporary)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        flush_tree(temporary)
        os.replace(temporary, path)
        flush_folder(path.parent)
    finally:
        remove(temporary)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def note_line(path: Path, line: str) -> None:
    """Add a line to a text file and flush it to disk; a line that a kill cut off before does not spoil it."""
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
        torn = size > 0 and file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return `value` with the field `check`, by which a change of any other field is noticed."""
    plain = {name: field for name, field in value.items() if name != CHECK}
    return {**value, CHECK: digest_of(json.loads(json.dumps(plain)))}


def read_sealed(path: Path, without: frozenset[str] | None = None) -> dict[str, Any]:
    """Read a JSON object that `sealed` made. `without`: fields of an older file, which has no `check`.

    Raises:
        CorruptArtifact: the file is not JSON, or was changed after it was written.

    """
    value = read_json(path)
    if isinstance(value, dict) and (value.keys() == without or value.get(CHECK) == sealed(value)[CHECK]):
        return value
    raise CorruptArtifact(
        f"{path}: its fields do not fit its field {CHECK!r}: it was changed after it was written; `prefloop doctor` "
        "says what else is damaged, and `prefloop run` sets it aside and makes it again"
    )


def seal_text(text: str, comment: str) -> str:
    """Return `text` with a last line that holds its digest; `comment` makes a comment of it, as in `# {}`."""
    text = text if text.endswith("\n") else f"{text}\n"
    return f"{text}{comment.format('sha256 of what is above: ' + digest_of(text))}\n"


def seal_holds(path: Path, comment: str) -> bool:
    """Return whether a file is as `seal_text` made it."""
    data = path.read_bytes()
    above = data[: data.rstrip(b"\n").rfind(b"\n") + 1]
    return seal_text(above.decode("utf-8", "replace"), comment).encode("utf-8", "replace") == data


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        CorruptArtifact: the file is not valid UTF-8 JSON.

    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise CorruptArtifact(
            f"{path}: not valid JSON ({error}); rename its folder and rerun to make it again"
        ) from error


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


_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the run folder's lock. The lock ends with the process, however that dies.

    Raises:
        RunLocked: another process holds it.
        ConfigError: the file system has no locks.

    """
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "a+", encoding="utf-8", errors="replace", opener=_no_link) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise RunLocked(
                f"{root}: in use by another process ({holder}); wait for it, or give this run another --out"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise ConfigError(
                f"{root}: this file system has no file locks ({os.strerror(error.errno)}), so that two processes could "
                "spoil each other's results; choose an --out on a local disk, or mount the network disk with locks"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()}\n")
        file.flush()
        yield


@contextmanager
def waiting_for(path: Path) -> Iterator[None]:
    """Hold the lock file `path` once nobody else holds it; where there are no locks, go on without."""
    with open(path, "a+", encoding="utf-8", errors="replace", opener=_no_link) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield


def _no_link(path: str, flags: int) -> int:
    """Open a file, but none that a link names: a lock is written to, and a link may lead to any file of the user's."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ConfigError(f"{path}: is a link, and no run of prefloop makes one; remove it") from error


_DISK = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or ask for a larger quota",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EROFS: "mount it for writing, or choose another --out",
    errno.EACCES: "change its permissions, or choose another --out",
    errno.EPERM: "change its permissions, or choose another --out",
    errno.EIO: "look after the disk (`dmesg` may say more)",
    errno.ESTALE: "mount the network disk again",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.ENFILE: "close other programs",
}
"""What can be wrong with a disk, and what to do."""
_OUT_OF_MEMORY = re.compile(r"allocate memory|out of memory|bad_alloc|can't start new thread", re.IGNORECASE)
_GOES_ON = "What is finished is kept, and the same command goes on"


@contextmanager
def machine_errors() -> Iterator[None]:
    """Turn a full, read-only or broken disk, and memory that ran out, into an error that says what to do.

    Raises:
        MachineFailed: instead of the `OSError`, `MemoryError` or torch's own words.

    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = error.filename or "the disk"
        raise MachineFailed(f"{where}: {os.strerror(error.errno)}; {_DISK[error.errno]}. {_GOES_ON}") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        raise MachineFailed(
            f"memory ran out ({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}); "
            f"lower train.tokens_per_microbatch or prompts_per_part, or close other programs. {_GOES_ON}"
        ) from error


@contextmanager
def native_writes(path: Path) -> Iterator[None]:
    """Turn what libraries in Rust say of a disk into the `OSError` that Python would raise; `path` is what is written.

    safetensors raises an exception of its own, tokenizers a bare `Exception`: only their words tell a full disk.
    """
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None or isinstance(error, OSError):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def remove(path: Path) -> None:
    """Remove a file or a folder; a link is removed, not what it names."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()
