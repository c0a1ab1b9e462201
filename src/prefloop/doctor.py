"""`prefloop doctor RUN`: what of a run is whole, damaged or stale, and what a rerun would redo. Writes nothing."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefloop.artifact import ASIDE as SET_ASIDE
from prefloop.artifact import (
    KEY,
    MANIFEST,
    PARTS,
    TEMPORARY,
    Artifact,
    Key,
    read_json,
    read_key,
    read_manifest,
    read_parts,
)
from prefloop.disk import file_digest, read_sealed, seal_holds
from prefloop.errors import CorruptArtifact
from prefloop.evaluate.report import REPORT, REPORT_SEAL
from prefloop.ledger import RECIPE, RECIPE_SEAL, SUMMARY
from prefloop.rows import digest_of
from prefloop.train.states import STATES, check_state, states

State = Literal["whole", "damaged", "stale", "unfinished", "set aside"]

ASIDE = "damaged"
"""Folder of a run to which damaged results are moved."""
_ABOVE: dict[str, dict[str, tuple[str, ...]]] = {
    "2-judged": {"samples": ("1-samples",)},
    "2b-corrected": {"judged": ("2-judged",)},
    "2c-logps": {"judged": ("2b-corrected", "2-judged")},
    "3-pairs": {"judged": ("2b-corrected", "2-judged"), "logps": ("2c-logps",)},
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
    found = [_summary(root), _sealed(root / RECIPE, RECIPE_SEAL), *_report(root)]
    folders = sorted({path.parent for name in (KEY, MANIFEST, "part-*.parquet") for path in root.rglob(name)})
    digests: dict[Path, str] = {}
    for folder in folders:
        name = str(folder.relative_to(root))
        parts = folder.relative_to(root).parts
        if parts[0] == ASIDE or any(SET_ASIDE.search(part) for part in parts):
            found.append(Diagnosis(name, "set aside", ("nothing reads it; delete it when you no longer need it",)))
            continue
        found.append(_artifact(folder, name, digests))
        if found[-1].state == "unfinished":
            found += _damaged_parts(folder, name)
            found += _damaged_states(folder / STATES, root)
    found = [_lost_manifest(one, found) for one in found]
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
    if not (folder / KEY).is_file():
        return Diagnosis(name, "damaged", (f"{KEY} and {MANIFEST}: missing", *leftovers))
    try:
        read_key(folder)
    except CorruptArtifact as error:
        return Diagnosis(name, "damaged", (str(error), *leftovers))
    except OSError as error:
        return Diagnosis(name, "damaged", (f"{KEY}: {error.strerror}", *leftovers))
    weights = len(list(folder.glob("model*.safetensors")))
    lost = f"no {MANIFEST}: a rerun keeps {parts} parts and makes the rest"
    more = f"; {weights} files of weights are made again" if weights else ""
    return Diagnosis(name, "unfinished", (lost + more, *leftovers))


_ORDER = re.compile(r"(prompts|start|round-\d+)(/.*)?$")


def _rank(one: Diagnosis) -> tuple[int, str] | None:
    """Return where in a run's order a folder comes; `None` for other files and folders."""
    found = _ORDER.match(one.path)
    return (("prompts", "start", "round").index(found[1].partition("-")[0]), one.path) if found else None


def _lost_manifest(one: Diagnosis, found: list[Diagnosis]) -> Diagnosis:
    """Return `one`, or that its manifest is lost: it is unfinished, and yet the run went on from it."""
    rank = _rank(one)
    if one.state != "unfinished" or rank is None or not any((r := _rank(d)) and r > rank for d in found):
        return one
    why = f"{MANIFEST}: missing, though the run went on; the parts are there and it is written anew by a rerun"
    return Diagnosis(one.path, "damaged", (why,))


def _damaged_parts(folder: Path, name: str) -> Iterator[Diagnosis]:
    """Yield the parts of an unfinished artifact that are not what was written."""
    noted = read_parts(folder)
    for path in sorted(folder.glob("part-*.parquet")):
        if noted.get(path.name) != file_digest(path):
            why = f"not what {PARTS} notes" if path.name in noted else f"{PARTS} is missing or damaged: not noted there"
            yield Diagnosis(f"{name}/{path.name}", "damaged", (f"{path.name}: {why}",))
    gone = [part for part in noted if not (folder / part).is_file()]
    if gone and max(noted) != gone[-1]:  # the last one may have been noted just before a kill
        yield Diagnosis(f"{name}/{gone[0]}", "damaged", (f"{', '.join(gone)}: missing, and made again by a rerun",))


def _damaged_states(folder: Path, root: Path) -> Iterator[Diagnosis]:
    for path in states(folder):
        try:
            check_state(path)
        except CorruptArtifact as error:
            name = str(path.relative_to(root))
            yield Diagnosis(name, "damaged", (f"{error}; training goes on from an earlier state: nothing is lost",))


def _manifest_problems(artifact: Artifact[Any]) -> Iterator[str]:
    """Yield where the manifest contradicts itself: a changed key, file list or digest."""
    manifest = artifact.manifest
    key = Key(manifest["stage"], manifest["settings"], manifest["inputs"], manifest["format"])
    files = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    if key.digest != manifest["key"] or digest_of(key.digest, files) != manifest["digest"]:
        yield f"{MANIFEST}: its digest does not fit its content; it was changed after it was written"
    if not isinstance(manifest["rows"], int) or not isinstance(manifest["facts"], Mapping):
        yield f"{MANIFEST}: rows or facts are not what they should be"
    try:
        if read_key(artifact.path) != json.loads(json.dumps(key.as_dict())):
            yield f"{KEY}: differs from {MANIFEST}, which holds the same, so nothing is lost"
    except CorruptArtifact:
        yield f"{KEY}: damaged; {MANIFEST} holds the same, so nothing is lost"
    except FileNotFoundError:
        yield f"{KEY}: missing; {MANIFEST} holds the same, so nothing is lost"
    noted = read_parts(artifact.path)
    if noted != {n: d for n, d in files.items() if n.startswith("part-")} and noted_once(artifact):
        yield f"{PARTS}: missing or damaged; {MANIFEST} holds the same, so nothing is lost"


def noted_once(artifact: Artifact[Any]) -> bool:
    """Return whether the version that wrote an artifact noted its parts: older ones wrote no `check` either."""
    return "check" in artifact.manifest


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
        return Diagnosis(SUMMARY, "damaged", (f"{SUMMARY}: missing, and written anew by a rerun",))
    try:
        value = read_sealed(path)
    except CorruptArtifact:
        return Diagnosis(SUMMARY, "damaged", (f"{SUMMARY}: not what was written, and written anew by a rerun",))
    state: State = "whole" if value["state"] == "done" else "unfinished"
    return Diagnosis(SUMMARY, state, () if state == "whole" else (f"state: {value['state']}",))


def _sealed(path: Path, comment: str) -> Diagnosis:
    if not path.is_file():
        return Diagnosis(path.name, "damaged", (f"{path.name}: missing, and written anew by a rerun",))
    if not seal_holds(path, comment):
        return Diagnosis(path.name, "damaged", (f"{path.name}: not what was written, and written anew by a rerun",))
    return Diagnosis(path.name, "whole")


def _report(root: Path) -> Iterator[Diagnosis]:
    """Yield what is to be said of the page: a run that is not done has none yet, or an older one."""
    done = _summary(root).state == "whole"
    if done or (root / REPORT).is_file():
        yield _sealed(root / REPORT, REPORT_SEAL)


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
            yield f"{one.path}: a rerun does without it and writes it anew"
        elif one.problems == ("the folder is missing",):
            yield f"{one.path}: a rerun makes it again"
        else:
            yield f"{one.path}: a rerun moves it to the folder {ASIDE} and makes it again"
