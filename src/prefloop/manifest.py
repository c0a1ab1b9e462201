"""What a manifest and a key file must hold before anything in them is believed."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prefloop.errors import CorruptArtifact

LARGEST = 2**63
"""No artifact has so many rows, and none took so many seconds."""
LONGEST = 200
"""Characters of a file's name inside an artifact."""
OF_KEY: Mapping[str, tuple[type, ...]] = {"stage": (str,), "settings": (dict,), "inputs": (dict,), "format": (int,)}
"""Fields of a key, and what they hold."""
_OF_MANIFEST: Mapping[str, tuple[type, ...]] = {
    **{"key": (str,), "digest": (str,), "rows": (int,), "files": (dict,), "facts": (dict,)},
    "seconds": (float, int, type(None)),
}
OLD_FIELDS = frozenset({*OF_KEY, *_OF_MANIFEST, "prefloop"})
"""Fields of a manifest before there was `check`."""
_RENAME = "rename its folder and rerun to make it again"


def checked_manifest(path: Path, value: Any) -> dict[str, Any]:
    """Return what the manifest at `path` holds, once every field is what it should be.

    Raises:
        CorruptArtifact: a field is missing or something else, or a file name leads out of the folder.

    """
    manifest = checked_fields(path, value, {**OF_KEY, **_OF_MANIFEST})
    for name in ("rows", "seconds"):
        if not 0 <= (manifest[name] or 0) < LARGEST:
            raise CorruptArtifact(f"{path}: {name} must be a count, got {str(manifest[name])[:40]}; {_RENAME}")
    for name, entry in manifest["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name or len(name) > LONGEST:
            raise CorruptArtifact(f"{path}: files: {name[:99]!r} is no name inside the folder; {_RENAME}")
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or type(entry.get("sha256")) is not str:
            raise CorruptArtifact(f"{path}: files: {name[:100]!r} has no bytes and sha256; {_RENAME}")
    return manifest


def checked_fields(path: Path, value: Any, fields: Mapping[str, tuple[type, ...]] = OF_KEY) -> dict[str, Any]:
    """Return a JSON object that has all of `fields`, each of the right type.

    Raises:
        CorruptArtifact: it is no object, or names the field.

    """
    if not isinstance(value, dict):
        raise CorruptArtifact(f"{path}: must hold an object, got {type(value).__name__}; {_RENAME}")
    for name, kinds in fields.items():
        if name not in value or type(value[name]) not in kinds:
            found = repr(value[name])[:60] if name in value else "nothing"
            raise CorruptArtifact(f"{path}: {name} must be {kinds[0].__name__}, got {found}; {_RENAME}")
    return value


def refuse_links(paths: Iterable[Path], folder: Path) -> None:
    """Refuse files that are links to somewhere else: their bytes are not the run's.

    Raises:
        CorruptArtifact: names the first.

    """
    for path in paths:
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise CorruptArtifact(f"{path}: a link out of its folder; put the file itself there, or rerun with --redo")
