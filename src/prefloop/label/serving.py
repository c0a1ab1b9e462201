"""`prefloop label`: bind the page to an address, print it, serve until Ctrl-C; or move verdicts as files."""

import importlib
import importlib.util
import ipaddress
import os
import secrets
import socket
import webbrowser
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefloop.errors import ConfigError
from prefloop.label.desk import Desk
from prefloop.label.exchange import export_verdicts, import_verdicts
from prefloop.label.pairs import RoundPairs, load_round
from prefloop.label.sessions import Sessions, checked_name
from prefloop.label.store import open_store
from prefloop.rows import digest_of

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHORTEST_PASSWORD = 8
NO_PACKAGE = "prefloop label: the page needs {}: pip install 'prefloop[label]'"
PACKAGES = ("starlette", "uvicorn")


@dataclass(frozen=True)
class Address:
    """Where the page is served, and with which password; `None`: with a one-time token, on loopback only."""

    host: str = "127.0.0.1"
    port: int = 0
    password: str | None = None


def address(host: str, port: int, password_env: str | None) -> Address:
    """Return the checked address; the password is read from the environment variable that `password_env` names.

    Raises:
        ConfigError: another machine could reach the page without a password, the variable is not set or too short, or
            the port is none.

    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port: must be 0 (any free one) to 65535, got {port}")
    if password_env is None:
        if not _is_loopback(host):
            raise ConfigError(
                f"--host: {host} can be reached from other machines, so the page needs a password: put one into an "
                "environment variable and name that with --password-env"
            )
        return Address(host, port)
    password = os.environ.get(password_env, "")
    if len(password) < SHORTEST_PASSWORD:
        raise ConfigError(
            f"--password-env: the variable {password_env} must hold a password of at least {SHORTEST_PASSWORD} "
            "characters; it is not set or shorter"
        )
    return Address(host, port, password)


def serve(
    root: Path,
    number: int | None,
    where: Address,
    say: Callable[[str], None],
    *,
    annotator: str | None = None,
    browse: bool = False,
) -> None:
    """Serve the page of a run's round until the process is asked to stop. `say` is given each line for the person.

    Raises:
        ConfigError: a package is missing, or the address cannot be bound.
        DataError: the run has no pairs, or the file of verdicts cannot be used.

    """
    server_module, uvicorn = _library("prefloop.label.server"), _library("uvicorn")
    pairs = load_round(root, number)
    door = server_module.Door(
        cookie=f"prefloop_{digest_of(str(root.resolve()))}",
        token=secrets.token_urlsafe(32) if where.password is None else None,
        password=where.password,
        annotator=None if annotator is None else checked_name(annotator),
    )
    with open_store(root) as store, _bound(where, usual_port(root)) as listening:
        sessions = Sessions(store, where.password or "")
        app = server_module.make_app(Desk(pairs, store), sessions, door, _hosts(where.host))
        link = _link(where, listening.getsockname()[1], door.token)
        say(f"{len(pairs.items)} pairs of round {pairs.round} of {root}; verdicts go to {root / 'labels.sqlite'}")
        say(f"open {link}")
        say(_hint(where))
        if browse:
            webbrowser.open(link)
        _run(uvicorn, app, listening)


def export_file(root: Path, number: int | None, to: Path, annotator: str | None) -> list[str]:
    """Write the verdicts on a round's pairs to `to` and return lines that say what was done and how to go on."""
    pairs = load_round(root, number)
    with open_store(root) as store:
        done = export_verdicts(store, pairs, to, None if annotator is None else checked_name(annotator))
    total = sum(done.lines.values())
    lines = [
        f"{to}: {total} verdicts on round {pairs.round}: {done.lines['keep']} pairs kept, {done.lines['flip']} "
        f"exchanged, {done.lines['drop']} dropped"
    ]
    if done.split:
        lines.append(f"left out: {done.split} pairs on which people are split; the run's label stands there")
    if done.stale:
        lines.append(f"left out: {done.stale} verdicts on completions that were made again since")
    lines.append(f"to use them: run again with --redo {_use(pairs, to)}")
    return lines


def _use(pairs: RoundPairs, file: Path) -> str:
    """Return the settings with which a run takes a file of verdicts in."""
    rule = {
        "ranked": "pair_builder.kind=corrected ",
        "corrected": "",
        "model_matrix": "",
    }.get(pairs.rule, f"pair_builder.kind=corrected pair_builder.of={pairs.rule} ")
    # Every other round has pairs of its own, which the file does not know.
    files = ", ".join([*(["null"] * pairs.round), str(file), "null"])
    return f"{rule}'per_round={{pair_builder.corrections: [{files}]}}'"


def import_file(root: Path, number: int | None, named: Path, annotator: str | None) -> list[str]:
    """Store the verdicts of a file and return a line that says so."""
    pairs = load_round(root, number)
    with open_store(root) as store:
        new, before = import_verdicts(store, pairs, named, annotator)
    return [f"{named}: {new} verdicts on round {pairs.round} stored, {before} were there already"]


def _library(name: str) -> Any:
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(NO_PACKAGE.format(" and ".join(missing)))
    return importlib.import_module(name)


def _run(uvicorn: Any, app: Any, listening: socket.socket) -> None:
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,  # it would show the token
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2,
    )
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        return  # the usual end


def usual_port(root: Path) -> int:
    """Return the port that a run's page has if it is free: a page that is still open goes on after a restart."""
    return 49152 + int(digest_of(str(root.resolve()))[:8], 16) % 16384


def _bound(where: Address, usual: int = 0) -> socket.socket:
    """Return a listening socket; for port 0 that of `usual` if it is free."""
    if where.port == 0 and usual:
        with suppress(ConfigError):
            return _bound(replace(where, port=usual))
    try:
        family = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((where.host, where.port), family=family)
    except OSError as error:
        raise ConfigError(
            f"--host, --port: {where.host}:{where.port} cannot be used ({error.strerror or error}); choose another one"
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _hosts(host: str) -> Collection[str] | None:
    return {*LOOPBACK, host} if _is_loopback(host) else None


def _link(where: Address, port: int, token: str | None) -> str:
    host = socket.gethostname() if where.host in ("0.0.0.0", "::") else where.host
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}/" + (f"?token={token}" if token else "")


def _hint(where: Address) -> str:
    if where.password is None:
        return "the address opens once, in one browser; Ctrl-C ends the page, every click is stored at once"
    return (
        "everybody with the password may come in; it travels unencrypted, so use a network that you trust. Ctrl-C ends "
        "the page, every click is stored at once"
    )
