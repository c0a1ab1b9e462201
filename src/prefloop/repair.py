"""Before a run goes on: damaged results are moved aside under a clear name, so that they are made again."""

import os
from pathlib import Path

from prefloop.artifact import MANIFEST, flush_folder, restore_beside
from prefloop.doctor import ASIDE, examine, harmless


def move_damaged(root: Path) -> list[str]:
    """Move every damaged result of the run in `root` to its folder `damaged` and say which; nothing is deleted.

    The caller holds the run's lock.
    """
    found = [d for d in examine(root) if d.state == "damaged"]
    for one in found:
        if harmless(one) and (root / one.path / MANIFEST).is_file():
            restore_beside(root / one.path)
    bad = [d for d in found if (root / d.path).exists() and not harmless(d)]
    moved = [(one, _moved(root, one.path)) for one in bad]
    return [f"{one.path} is damaged ({one.problems[0]}): moved to {to}, and is made again" for one, to in moved]


def _moved(root: Path, name: str) -> str:
    number = 1
    while (target := root / ASIDE / f"{name.replace('/', '.')}-{number}").exists():
        number += 1
    target.parent.mkdir(exist_ok=True)
    os.rename(root / name, target)
    flush_folder(target.parent)
    flush_folder((root / name).parent)
    return str(target.relative_to(root))
