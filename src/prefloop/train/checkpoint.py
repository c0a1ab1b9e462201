"""Training state on disk: weights, optimizer moments and position, whole or not at all; no pickle.

    .state/step-00000100/
      weights.safetensors     trainable parameters, and other tensors that the trainer carries along
      moments.safetensors     AdamW's first and second moments, by parameter name
      steps.parquet           the training curve so far
      state.json              step, the trainer's notes, and the digests of the other files; written with the
                              folder, in one rename

The two newest states are kept. A damaged one is set aside under a clear name and the one before it is used.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefloop.artifact import file_digest, read_json, replacing, set_aside, write_json
from prefloop.columns import read_rows, write_rows
from prefloop.errors import CorruptArtifact
from prefloop.rows import StepLog

KEPT = 2
_FILES = ("weights.safetensors", "moments.safetensors", "steps.parquet")


@dataclass(frozen=True)
class TrainingState:
    """Everything that training goes on from: `step` optimizer steps are done.

    `notes` are numbers that a trainer keeps beside weights, such as which module has which role.
    """

    step: int
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    steps: Sequence[StepLog]
    notes: Mapping[str, float] = field(default_factory=dict)


def save_state(folder: Path, state: TrainingState) -> None:
    """Write `state` to `folder/step-N` and remove all but the two newest states."""
    with replacing(_state(folder, state.step)) as temporary:
        temporary.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in state.weights.items()}, temporary / _FILES[0])
        save_file({k: v.contiguous() for k, v in state.moments.items()}, temporary / _FILES[1])
        write_rows(temporary / _FILES[2], StepLog, state.steps)
        digests = {name: file_digest(temporary / name) for name in _FILES}
        write_json(temporary / "state.json", {"step": state.step, "notes": dict(state.notes), "files": digests})
    for old in _states(folder)[:-KEPT]:
        shutil.rmtree(old)


def load_state(folder: Path, device: torch.device) -> TrainingState | None:
    """Return the newest whole state, or `None` if there is none. Damaged ones are set aside, not deleted."""
    for path in reversed(_states(folder)):
        try:
            return _read(path, device)
        except CorruptArtifact:
            set_aside(path, "damaged")
    return None


def read_state(folder: Path, step: int, device: torch.device) -> TrainingState:
    """Return the state of `step`, which another process has found whole.

    Raises:
        CorruptArtifact: it is not there, or damaged.

    """
    return _read(_state(folder, step), device)


def optimizer_moments(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """Return AdamW's state by parameter name: `NAME.exp_avg`, `NAME.exp_avg_sq`, `NAME.step`."""
    return {
        f"{names[parameter]}.{kind}": value
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
    }


def restore_moments(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], moments: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_moments` returned.

    Raises:
        CorruptArtifact: a parameter has no moments, so that training would silently restart for it.

    """
    for parameter, name in names.items():
        found = {k.rpartition(".")[2]: v for k, v in moments.items() if k.rpartition(".")[0] == name}
        if not found:
            raise CorruptArtifact(
                f"training state: no optimizer moments for {name}; remove the .state folder to train again"
            )
        optimizer.state[parameter] = found


def _state(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _states(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit())


def _read(path: Path, device: torch.device) -> TrainingState:
    if not (path / "state.json").is_file():
        raise CorruptArtifact(f"{path}: no state.json")
    state = read_json(path / "state.json")
    for name in _FILES:
        if not (path / name).is_file() or file_digest(path / name) != state["files"][name]:
            raise CorruptArtifact(f"{path / name}: missing or damaged")
    moments = load_file(path / _FILES[1])
    on_device = {k: v if k.endswith(".step") else v.to(device) for k, v in moments.items()}
    weights = load_file(path / _FILES[0], device=str(device))
    steps = tuple(read_rows(path / _FILES[2], StepLog))
    return TrainingState(state["step"], weights, on_device, steps, state.get("notes", {}))
