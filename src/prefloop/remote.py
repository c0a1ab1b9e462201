"""Files at an address such as `s3://bucket/prompts.jsonl`, by fsspec: fetched to be read, sent once they are whole."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from prefloop.errors import ConfigError


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
        try:
            system.get(remote, str(local), recursive=system.isdir(remote))
        except OSError as error:
            raise ConfigError(f"{address}: cannot be read ({error}); check the address and your access") from error
        yield local


def send(local: Path, address: str) -> None:
    """Copy a file or folder to `address`, where there must be nothing yet.

    Raises:
        ConfigError: there is something already, it may not be written, or the protocol's package is not installed.

    """
    system, remote = _system(address)
    try:
        if system.exists(remote):
            raise ConfigError(f"{address}: exists already; choose an address that does not")
        files = [path for path in sorted(local.rglob("*")) if path.is_file()] if local.is_dir() else [local]
        targets = [f"{remote.rstrip('/')}/{p.relative_to(local)}" if local.is_dir() else remote for p in files]
        system.put([str(path) for path in files], targets)
    except OSError as error:
        raise ConfigError(f"{address}: cannot be written ({error}); check the address and your access") from error


def _system(address: str) -> tuple[Any, str]:
    try:
        system, remote = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{address}: {error}; a protocol needs its fsspec package, such as s3fs for s3://") from error
    return system, remote
