"""What a team makes as one: the checks before it begins, and a stage's output that several ranks make."""

import hashlib
import platform
import secrets
import socket
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from prefloop.artifact import Artifact, Building, Key, load_artifact, open_artifact
from prefloop.components import Parts
from prefloop.errors import ConfigError
from prefloop.recipe import Recipe
from prefloop.rows import digest_of
from prefloop.team import ALONE, Team, seconds
from prefloop.train.sharding import require_divisible

R = TypeVar("R")

SEEN = seconds("PREFLOOP_SEEN", 30.0)
"""Seconds that a network file system may take to show one rank what another has written."""


@dataclass
class SharedBuilding(Building[R]):
    """An unfinished output of a team: the main rank finishes it, and all get it then."""

    team: Team = ALONE

    def finish(self, facts: Any = None, seconds: float | None = None) -> Artifact[R]:
        """Finish on the main rank; wait for that on the others, whose arguments do not matter."""
        if not self.team.main:
            self.team.tell()
            return _seen(self.path, self.record, self.team)
        artifact = super().finish(facts, seconds)
        self.team.tell("finished")
        return artifact


def open_shared(
    team: Team, path: Path, key: Key, record: type[R] | None, replace: bool, together: bool
) -> Artifact[R] | Building[R]:
    """Open an artifact as `open_artifact` does, on all ranks at once.

    If it is unfinished, the main rank gets it to be made, and with `together` every rank; without, the others wait
    until it is finished.

    Raises:
        StaleArtifact: see `open_artifact`.
        ConfigError: a rank does not see what the main rank has written.

    """
    if team.main:
        opened = open_artifact(path, key, record, replace)
        team.tell(isinstance(opened, Artifact))
        return opened if isinstance(opened, Artifact) else SharedBuilding(path, key, record, together, team)
    if team.tell():
        return _seen(path, record, team)
    building = SharedBuilding(path, key, record, together, team)
    return building if together else building.finish()


def _seen(path: Path, record: type[R] | None, team: Team) -> Artifact[R]:
    end = time.monotonic() + SEEN
    while (found := load_artifact(path, record)) is None:
        if time.monotonic() > end:
            raise ConfigError(
                f"rank {team.rank} does not see {path}, which rank 0 has written: the run folder must be on a file "
                "system that all machines share"
            )
        time.sleep(0.1)
    return found


def require_same(team: Team, recipe: Recipe, root: Path) -> None:
    """Refuse ranks that would not do the same thing in the same folder. All ranks call this at once.

    Raises:
        ConfigError: on every rank: names the first rank that differs from rank 0, and in what.

    """
    if team.size == 1:
        return
    own = {
        "prefloop": f"{version('prefloop')}, code {_code_digest()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "recipe": digest_of(recipe.model_dump(mode="json")),
        "folder": str(root),
    }
    found = team.gathered([socket.gethostname(), own])
    for rank, (host, theirs) in enumerate(found):
        for what, value in found[0][1].items():
            if theirs[what] != value:
                raise ConfigError(
                    f"ranks differ in {what}: rank 0 on {found[0][0]} has {value}, rank {rank} on {host} has "
                    f"{theirs[what]}; start all ranks with the same installation and the same command"
                )
    _require_shared_folder(team, root)


def _require_shared_folder(team: Team, root: Path) -> None:
    """Refuse a run folder that is not the same one for all ranks: each must see a file that rank 0 writes.

    Raises:
        ConfigError: on every rank: names those that do not see it.

    """
    root.mkdir(parents=True, exist_ok=True)
    mark = team.tell(f".seen-{secrets.token_hex(8)}")
    if team.main:
        (root / mark).touch()
    team.gathered()
    end = time.monotonic() + SEEN
    while not (seen := (root / mark).exists()) and time.monotonic() < end:
        time.sleep(0.1)
    blind = [rank for rank, sees in enumerate(team.gathered(seen)) if not sees]
    if team.main:
        (root / mark).unlink()
    if blind:
        raise ConfigError(
            f"{root}: ranks {', '.join(map(str, blind))} do not see what rank 0 writes there; the run folder must be "
            "on a file system that all machines share"
        )


def check_team(recipe: Recipe, parts: Parts, team: Team) -> None:
    """Refuse what several ranks cannot do together.

    Raises:
        ConfigError: names the setting and what to change.

    """
    if team.size == 1:
        return
    require_divisible(recipe.train.pairs_per_step, team)
    if parts.loss.couples_rows:
        raise ConfigError(
            f"loss.kind: {recipe.loss.kind} compares all pairs of a step, so that a step cannot be split over "
            f"{team.size} ranks; start one process"
        )
    if recipe.train.device.startswith("cuda:"):
        raise ConfigError(
            f"train.device: {recipe.train.device} is one GPU, and there are {team.size} ranks; leave it out: each rank "
            "takes one"
        )


def _code_digest() -> str:
    folder = Path(__file__).parent
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]
