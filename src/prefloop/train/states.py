"""Where training states lie, and whether one is whole. Torch-free: `prefloop doctor` reads this too."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefloop.disk import file_digest, read_sealed
from prefloop.errors import CorruptArtifact

STATES = ".state"
"""Folder of the training states inside 5-policy."""
STATE = "state.json"
WEIGHTS, MOMENTS, CURVE = "weights.safetensors", "moments.safetensors", "steps.parquet"
FILES = (WEIGHTS, MOMENTS, CURVE)
"""What every state has; ranks that share the weights add files of their own."""


def states(folder: Path) -> list[Path]:
    """Return the states in `folder`, oldest first; those that were set aside are none."""
    return sorted(p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit())


def state_name(step: int) -> str:
    """Return the folder name of the state after `step` optimizer steps."""
    return f"step-{step:08d}"


def check_state(path: Path) -> Mapping[str, Any]:
    """Compare a state's files with its `state.json`, and return what that says.

    Raises:
        CorruptArtifact: names the first file that is missing or damaged.

    """
    if not (path / STATE).is_file():
        raise CorruptArtifact(f"{path / STATE}: missing")
    state = read_sealed(path / STATE)
    if path.name != state_name(state["step"]):
        raise CorruptArtifact(f"{path}: its {STATE} is that of step {state['step']}")
    for name in {*FILES, *state["files"]}:
        if not (path / name).is_file() or file_digest(path / name) != state["files"].get(name):
            raise CorruptArtifact(f"{path / name}: {'damaged' if (path / name).is_file() else 'missing'}")
    return state
