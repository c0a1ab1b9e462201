"""`prefloop doctor RUN`: what of a run is whole, damaged or stale, and what a rerun would redo. Writes nothing."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefloop.artifact import KEY, MANIFEST, TEMPORARY, Artifact, Key, read_json, read_manifest
from prefloop.errors import CorruptArtifact
from prefloop.ledger import SUMMARY
from prefloop.rows import digest_of

State = Literal["whole", "damaged", "stale", "unfinished", "set aside"]

ASIDE = "damaged"
"""Folder of a run to which damaged results are moved."""
_ASIDE = re.compile(r"\.(replaced|damaged|earlier)-\d+$")
_ABOVE: dict[str, dict[str, tuple[str, ...]]] = {
    "2-judged": {"samples": ("1-samples",)},
    "2b-corrected": {"judged": ("2-judged",)},
    "3-pairs": {"judged": ("2b-corrected", "2-judged")},
    "5-policy": {"batches": ("4-batches",)},
    "3-start-logps": {"judged": ("2-judged",)},
    "4-decision": {"judged": ("2-judged",), "logps": ("3-start-logps",)},
}
"""For each stage the inputs that lie beside it, and in which folder; the first that exists counts."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is known of one folder or file of the run; `problems` name files, `path` is relative to the run."""

    path: str
    state: State
    problems: tuple[str, ...] = ()
    rows: int | None = None

    def lines(self) -> Iterator[str]:
        """Yield the diagnosis as text."""
        rows = "" if self.rows is None else f"  {self.rows} rows"
        yield f"{self.state:<11}{self.path}{rows}"
        yield from (f"             {problem}" for problem in self.problems)


def examine(root: Path) -> list[Diagnosis]:
    """Look at every file that the run's manifests name, byte by byte, and at summary and recipe."""
    found = [_summary(root), _recipe(root)]
    folders = sorted({path.parent for name in (KEY, MANIFEST) for path in root.rglob(name)})
    digests: dict[Path, str] = {}
    for folder in folders:
        name = str(folder.relative_to(root))
        parts = folder.relative_to(root).parts
        if parts[0] == ASIDE or any(_ASIDE.search(part) for part in parts):
            found.append(Diagnosis(name, "set aside", ("nothing reads it; delete it when you no longer need it",)))
            continue
        found.append(_artifact(folder, name, digests))
    missing = [d for d in _expected(root) if d not in folders]
    found += [Diagnosis(str(d.relative_to(root)), "damaged", ("the folder is missing",)) for d in missing]
    return found


def _artifact(folder: Path, name: str, digests: dict[Path, str]) -> Diagnosis:
    leftovers = tuple(f"{p.name}: half-written; a rerun removes it" for p in sorted(folder.glob(f"{TEMPORARY}*")))
    if not (folder / MANIFEST).exists():
        return _unfinished(folder, name, leftovers)
    try:
        artifact: Artifact[Any] = Artifact(folder, None, read_manifest(folder))
        problems = [*_manifest_problems(artifact), *_file_problems(artifact)]
    except CorruptArtifact as error:
        return Diagnosis(name, "damaged", (str(error),))
    except (KeyError, TypeError, AttributeError, OSError) as error:
        return Diagnosis(name, "damaged", (f"{MANIFEST}: cannot be read as a manifest ({error!r})",))
    digests[folder] = artifact.digest
    if problems:
        return Diagnosis(name, "damaged", tuple(problems), artifact.rows)
    stale = tuple(_stale(artifact, digests))
    return Diagnosis(name, "stale" if stale else "whole", (*stale, *leftovers), artifact.rows)


def _unfinished(folder: Path, name: str, leftovers: tuple[str, ...]) -> Diagnosis:
    parts = len(list(folder.glob("part-*.parquet")))
    try:
        read_json(folder / KEY)
    except CorruptArtifact as error:
        return Diagnosis(name, "damaged", (str(error), *leftovers))
    except OSError as error:
        return Diagnosis(name, "damaged", (f"{KEY}: {error.strerror}", *leftovers))
    weights = len(list(folder.glob("model*.safetensors")))
    lost = f"no {MANIFEST}: a rerun keeps {parts} parts and makes the rest"
    more = f"; {weights} files of weights are made again" if weights else ""
    return Diagnosis(name, "unfinished", (lost + more, *leftovers))


def _manifest_problems(artifact: Artifact[Any]) -> Iterator[str]:
    """Yield where the manifest contradicts itself: a changed key, file list or digest."""
    manifest = artifact.manifest
    key = Key(manifest["stage"], manifest["settings"], manifest["inputs"], manifest["format"])
    files = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    if key.digest != manifest["key"] or digest_of(key.digest, files) != manifest["digest"]:
        yield f"{MANIFEST}: its digest does not fit its content; it was changed after it was written"
    if not isinstance(manifest["rows"], int) or not isinstance(manifest["facts"], Mapping):
        yield f"{MANIFEST}: rows or facts are not what they should be"
    key_file = artifact.path / KEY
    if not key_file.is_file():
        yield f"{KEY}: missing; {MANIFEST} holds the same, so nothing is lost"
    elif _read(key_file) != json.loads(json.dumps(key.as_dict())):
        yield f"{KEY}: differs from {MANIFEST}, which holds the same, so nothing is lost"


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except CorruptArtifact:
        return None


def _file_problems(artifact: Artifact[Any]) -> Iterator[str]:
    for name in sorted(artifact.manifest["files"]):
        try:
            artifact.check_file(name)
        except CorruptArtifact:
            there = (artifact.path / name).is_file()
            yield f"{name}: {'its bytes are not those of ' + MANIFEST if there else 'missing'}"


def _stale(artifact: Artifact[Any], digests: Mapping[Path, str]) -> Iterator[str]:
    for given, above in _ABOVE.get(artifact.path.name, {}).items():
        there = [artifact.path.parent / name for name in above if artifact.path.parent / name in digests]
        if there and artifact.manifest["inputs"].get(given) not in (None, digests[there[0]]):
            yield f"made from other {given} than {there[0].name} holds now"


def _summary(root: Path) -> Diagnosis:
    path = root / SUMMARY
    if not path.is_file():
        return Diagnosis(SUMMARY, "damaged", ("missing, and written anew by a rerun",))
    value = _read(path)
    if not isinstance(value, dict) or not {"state", "rounds", "policy_best"} <= value.keys():
        return Diagnosis(SUMMARY, "damaged", ("not a summary, and written anew by a rerun",))
    state: State = "whole" if value["state"] == "done" else "unfinished"
    return Diagnosis(SUMMARY, state, () if state == "whole" else (f"state: {value['state']}",))


def _recipe(root: Path) -> Diagnosis:
    path = root / "recipe.yaml"
    if not path.is_file() or b"\0" in path.read_bytes() or not path.read_bytes().strip():
        return Diagnosis("recipe.yaml", "damaged", ("missing or empty, and written anew by a rerun",))
    return Diagnosis("recipe.yaml", "whole")


def _expected(root: Path) -> Iterator[Path]:
    """Yield the folders that a finished round of the summary has."""
    value = _read(root / SUMMARY) if (root / SUMMARY).is_file() else None
    rounds = value.get("rounds") if isinstance(value, dict) else None
    if not isinstance(rounds, list) or not rounds:
        return
    yield from (root / name for name in ("prompts", "start/1-samples", "start/2-judged"))
    stages = ("0-prompts", "1-samples", "2-judged", "3-pairs", "4-batches", "5-policy")
    reports = ("6-report/1-samples", "6-report/2-judged", "6-report/3-start-logps", "6-report/4-decision")
    for number in range(len(rounds)):
        yield from (root / f"round-{number:03d}" / name for name in (*stages, *reports))


def harmless(one: Diagnosis) -> bool:
    """Return whether a rerun needs nothing of what is damaged."""
    return all("nothing is lost" in problem or "written anew" in problem for problem in one.problems)


def prognosis(found: list[Diagnosis]) -> Iterator[str]:
    """Yield what a rerun of the same command would do."""
    bad = [d for d in found if d.state in ("damaged", "stale", "unfinished") and d.path != SUMMARY]
    if not bad:
        yield "a rerun would make nothing anew"
        return
    for one in bad:
        if one.state == "unfinished":
            yield f"{one.path}: a rerun makes what is missing, and everything that was made from it if that changes"
        elif one.state == "stale":
            yield f"{one.path}: a rerun refuses it, and with --redo moves it aside and makes it again"
        elif harmless(one):
            yield f"{one.path}: a rerun does without it or writes it anew"
        elif one.problems == ("the folder is missing",):
            yield f"{one.path}: a rerun makes it again"
        else:
            yield f"{one.path}: a rerun moves it to the folder {ASIDE} and makes it again"
