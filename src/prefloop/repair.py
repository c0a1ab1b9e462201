"""Before a run goes on: damaged results are moved aside under a clear name, so that they are made again."""

import os
from pathlib import Path

from prefloop.artifact import flush_folder, locked
from prefloop.doctor import ASIDE, examine, harmless


def move_damaged(root: Path) -> list[str]:
    """Move every damaged result of the run in `root` to its folder `damaged` and say which; nothing is deleted.

    Raises:
        RunLocked: another process works on the run.

    """
    if not root.is_dir():
        return []
    with locked(root):
        bad = [d for d in examine(root) if d.state == "damaged" and (root / d.path).is_dir() and not harmless(d)]
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
