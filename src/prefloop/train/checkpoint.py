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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefloop.artifact import file_digest, replacing, set_aside, write_json
from prefloop.columns import read_rows, write_rows
from prefloop.disk import native_writes, sealed
from prefloop.errors import CorruptArtifact
from prefloop.rows import StepLog
from prefloop.train.states import CURVE, FILES, MOMENTS, STATE, WEIGHTS, check_state, state_name, states

KEPT = 2


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
    with replacing(folder / state_name(state.step)) as temporary:
        temporary.mkdir(parents=True)
        for name, tensors in ((WEIGHTS, state.weights), (MOMENTS, state.moments)):
            with native_writes(temporary / name):
                save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / name)
        write_rows(temporary / CURVE, StepLog, state.steps)
        digests = {name: file_digest(temporary / name) for name in FILES}
        said = {"step": state.step, "notes": dict(state.notes), "files": digests}
        write_json(temporary / STATE, sealed(said))
    for old in states(folder)[:-KEPT]:
        shutil.rmtree(old)


def load_state(folder: Path, device: torch.device, say: Callable[[str], None] = lambda _: None) -> TrainingState | None:
    """Return the newest whole state, or `None` if there is none. Damaged ones are set aside and `say` hears of it."""
    for path in reversed(states(folder)):
        try:
            return _read(path, device)
        except CorruptArtifact as error:
            moved = set_aside(path, "damaged")
            say(f"training state damaged ({error}): set aside as {moved.name}; training goes on from an earlier one")
    return None


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


def _read(path: Path, device: torch.device) -> TrainingState:
    said = check_state(path)
    moments = load_file(path / MOMENTS)
    on_device = {k: v if k.endswith(".step") else v.to(device) for k, v in moments.items()}
    weights = load_file(path / WEIGHTS, device=str(device))
    steps = tuple(read_rows(path / CURVE, StepLog))
    return TrainingState(said["step"], weights, on_device, steps, said["notes"])
