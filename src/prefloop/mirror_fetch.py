"""A run that was copied to an address comes back into an empty folder: what is whole there, by its digests."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prefloop.artifact import (
    KEY,
    MANIFEST,
    PARTS,
    Artifact,
    read_key,
    read_manifest,
    read_parts,
    restore_beside,
)
from prefloop.disk import file_digest, flush_folder, flush_tree, write_text
from prefloop.errors import ConfigError, CorruptArtifact
from prefloop.mirror_scan import DATABASES, STAGE, digest_of_bytes
from prefloop.remote import Place
from prefloop.train.states import STATE, STATES, check_state

MIRROR = "mirror.json"
"""File that says whose the files at an address are."""
COPIES = "databases.json"
"""File at the address that says which copy of each SQLite file counts, and its SHA-256."""
STAGING = ".fetching"
"""Folder of what is being fetched; it is removed at the end, and before a run goes on."""

Say = Callable[[str], None]


def fetch(place: Place, root: Path, say: Say) -> int:
    """Copy what is whole at `place` into the run folder `root`, and return how many artifacts that was.

    What is in `root` already stays as it is. Every folder appears under its name only once its bytes are those of its
    manifest; what is not so is left where it is, and `say` hears of it: the run makes it again.

    Raises:
        ConfigError: the address cannot be read.

    """
    names = place.files()
    staging = root / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    taken = 0
    for folder in sorted({name.rpartition("/")[0] for name in names if name.rpartition("/")[2] in (MANIFEST, KEY)}):
        if not STAGE.fullmatch(folder) or (root / folder).exists():
            continue
        target = staging / folder
        try:
            if f"{folder}/{MANIFEST}" in names:
                _finished(place, folder, target)
                taken += 1
            else:
                _begun(place, folder, target, names)
        except (CorruptArtifact, FileNotFoundError) as error:
            why = str(error).replace(str(target), f"{place.address}/{folder}")
            say(f"mirror: {folder} is not whole there and not taken ({why})")
            continue
        _move(target, root / folder)
    for name, digest in _copies(place).items():
        if (root / name).exists():
            continue
        _database(place, name, digest, root, say)
    shutil.rmtree(staging, ignore_errors=True)
    return taken


def _finished(place: Place, folder: str, target: Path) -> None:
    place.get([(f"{folder}/{MANIFEST}", target / MANIFEST)])
    manifest = read_manifest(target)
    _get(place, folder, target, manifest["files"])
    artifact: Artifact[Any] = Artifact(target, None, manifest)
    for name in manifest["files"]:
        artifact.check_file(name)
    restore_beside(target)


def _begun(place: Place, folder: str, target: Path, names: Mapping[str, int]) -> None:
    """Fetch key, whole parts and whole training states of an unfinished artifact."""
    _get(place, folder, target, [name for name in (KEY, PARTS) if f"{folder}/{name}" in names])
    read_key(target)
    noted = {part: digest for part, digest in read_parts(target).items() if f"{folder}/{part}" in names}
    _get(place, folder, target, noted)
    whole = {part: digest for part, digest in noted.items() if file_digest(target / part) == digest}
    for part in noted.keys() - whole.keys():
        (target / part).unlink()
    if whole:
        write_text(target / PARTS, "".join(f"{digest}  {part}\n" for part, digest in whole.items()))
    else:
        (target / PARTS).unlink(missing_ok=True)
    for seal in sorted(n for n in names if n.startswith(f"{folder}/{STATES}/step-") and n.endswith(f"/{STATE}")):
        state = seal.removesuffix(f"/{STATE}").removeprefix(f"{folder}/")
        own = [n.removeprefix(f"{folder}/") for n in names if n.startswith(f"{folder}/{state}/")]
        _get(place, folder, target, own)
        try:
            check_state(target / state)
        except CorruptArtifact:
            shutil.rmtree(target / state)


def _get(place: Place, folder: str, target: Path, names: Iterable[str]) -> None:
    """Fetch files of a folder that are there; which are not is seen when they are compared."""
    try:
        place.get([(f"{folder}/{name}", target / name) for name in names])
    except ConfigError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise CorruptArtifact(f"a file is missing: {error.__cause__}") from error


def _move(source: Path, target: Path) -> None:
    flush_tree(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)
    flush_folder(target.parent)


def _copies(place: Place) -> dict[str, str]:
    """Return the SHA-256 of the copy that counts of each SQLite file at the address."""
    found = parsed(place.read(COPIES))
    return {name: found[name] for name in DATABASES if isinstance(found.get(name), str)}


def _database(place: Place, name: str, digest: str, root: Path, say: Say) -> None:
    temporary = root / STAGING / name
    place.get([(copy_name(name, digest), temporary)])
    if file_digest(temporary) != digest:
        say(f"mirror: {name} is not whole there and not taken")
        return
    _move(temporary, root / name)


def copy_name(name: str, digest: str) -> str:
    """Return the name at the address of a copy of an SQLite file."""
    return f"{name}.{digest[:16]}"


def remote_digests(place: Place) -> dict[str, str]:
    """Return by name the SHA-256 of what is at the address, as its manifests, parts and states say; "" if none does."""
    names = place.files()
    known = dict.fromkeys(names, "")
    for name in names:
        folder, _, last = name.rpartition("/")
        if last not in (MANIFEST, PARTS, STATE, KEY):
            continue
        data = place.read(name) or b""
        known[name] = digest_of_bytes(data)
        for file, digest, size in _said(last, data):
            there = names.get(f"{folder}/{file}")
            if there is not None and size in (None, there):
                known[f"{folder}/{file}"] = digest
    return known


def _said(kind: str, data: bytes) -> Iterator[tuple[str, str, int | None]]:
    """Yield name, SHA-256 and, where it is noted, size of the files that a manifest and the like speak of."""
    if kind == PARTS:
        lines = (line.split() for line in data.decode(errors="replace").splitlines())
        yield from ((words[1], words[0], None) for words in lines if len(words) == 2)
        return
    files = parsed(data).get("files")
    for name, entry in files.items() if isinstance(files, dict) else ():
        if isinstance(entry, str):
            yield name, entry, None
        elif isinstance(entry, dict) and isinstance(entry.get("sha256"), str):
            yield name, entry["sha256"], entry.get("bytes")


def parsed(data: bytes | None) -> dict[str, Any]:
    """Return the JSON object that `data` holds; an empty one where it holds none."""
    try:
        value = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
