"""Training state on disk: weights, optimizer moments and position, whole or not at all; no pickle.

    .state/step-00000100/
      weights.safetensors     trainable parameters, and other tensors that the trainer carries along
      moments.safetensors     AdamW's first and second moments, by parameter name
      weights-00001.safetensors, moments-00001.safetensors …   rows of further ranks, where weights are shared
      steps.parquet           the training curve so far
      state.json              step, the trainer's notes, and the digests of the other files; written with the
                              folder, in one rename

A file of shared weights says in its header which rows it has, so that any number of ranks can read what any other
number has written. The two newest states are kept. A damaged one is set aside under a clear name and the one before it
is used. (The file format of `torch.distributed.checkpoint` keeps its index as a pickle, which is never loaded here.)
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from prefloop.artifact import file_digest, flush_tree, replacing, set_aside, write_json
from prefloop.columns import read_rows, write_rows
from prefloop.disk import native_writes, sealed
from prefloop.errors import CorruptArtifact
from prefloop.models.shares import held_rows, local
from prefloop.rows import StepLog
from prefloop.team import ALONE, Team
from prefloop.train.sharding import writes_rows
from prefloop.train.states import CURVE, MOMENTS, STATE, WEIGHTS, check_state, state_name, states

KEPT = 2
_ROWS = "rows"
"""Header of a file of shared weights: by name its first and last row (exclusive), and the rows of the whole."""


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


def save_state(folder: Path, state: TrainingState, team: Team = ALONE) -> None:
    """Write `state` to `folder/step-N` and remove all but the two newest states. All ranks of a team call this.

    The main rank writes what is whole, and every rank the rows that it holds.
    """
    path = folder / state_name(state.step)
    if not team.main:
        if any(isinstance(value, DTensor) for value in state.weights.values()):
            temporary = Path(team.tell())
            team.gathered(_save_rows(temporary, state, team))
        return
    with replacing(path) as temporary:
        temporary.mkdir(parents=True)
        write_rows(temporary / CURVE, StepLog, state.steps)
        digests = {CURVE: file_digest(temporary / CURVE)}
        if any(isinstance(value, DTensor) for value in state.weights.values()):
            team.tell(str(temporary))
            for found in team.gathered(_save_rows(temporary, state, team)):
                digests |= found
        else:
            digests |= _save_rows(temporary, state, team)
        said = {"step": state.step, "notes": dict(state.notes), "files": digests}
        write_json(temporary / STATE, sealed(said))
    for old in states(folder)[:-KEPT]:
        shutil.rmtree(old)


def _save_rows(folder: Path, state: TrainingState, team: Team) -> dict[str, str]:
    """Write what this rank has to write of the state, and return the digests of its files."""
    digests = {}
    for kind, tensors in ((WEIGHTS, state.weights), (MOMENTS, state.moments)):
        own = {name: t for name, t in tensors.items() if writes_rows(t, team)}
        rows = {name: [*held_rows(t), t.shape[0]] for name, t in own.items() if isinstance(t, DTensor)}
        if own or team.main:
            name = kind if team.main else kind.replace(".", f"-{team.rank:05d}.")
            header = {_ROWS: json.dumps(rows, sort_keys=True)} if rows else None
            with native_writes(folder / name):
                save_file({n: local(t).contiguous() for n, t in own.items()}, folder / name, header)
            flush_tree(folder / name)
            digests[name] = file_digest(folder / name)
    return digests


def newest_state(folder: Path, say: Callable[[str], None] = lambda _: None) -> int | None:
    """Return the step of the newest whole state, or `None` if there is none.

    Damaged ones are set aside and `say` hears of it.
    """
    for path in reversed(states(folder)):
        try:
            return int(check_state(path)["step"])
        except CorruptArtifact as error:
            moved = set_aside(path, "damaged")
            say(f"training state damaged ({error}): set aside as {moved.name}; training goes on from an earlier one")
    return None


def read_state(
    folder: Path, step: int, device: torch.device, rows: Mapping[str, tuple[int, int]] | None = None
) -> TrainingState:
    """Return the state of `step`, which `newest_state` has found whole.

    `rows` says of which parameters only some rows are wanted, first and last (exclusive), with their moments.

    Raises:
        CorruptArtifact: a file cannot be read, or rows are in none of them.

    """
    path = folder / state_name(step)
    state = check_state(path)
    weights = _read_rows(path, WEIGHTS, rows or {}, device)
    moments = _read_rows(path, MOMENTS, rows or {}, device)
    steps = tuple(read_rows(path / CURVE, StepLog))
    return TrainingState(state["step"], weights, moments, steps, state.get("notes", {}))


def _read_rows(path: Path, kind: str, wanted: Mapping[str, tuple[int, int]], device: torch.device) -> dict[str, Tensor]:
    """Return all tensors of a kind of file, those of every rank, of those in `wanted` the rows that are asked for."""
    found: dict[str, Tensor] = {}
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    asked: dict[str, int] = {}
    for file in sorted(path.glob(kind.replace(".", "*."))):
        with safe_open(file, framework="pt") as opened:
            held = json.loads((opened.metadata() or {}).get(_ROWS, "{}"))
            names = opened.keys()
            for name in names:
                parameter = name if kind == WEIGHTS else name.rpartition(".")[0]
                view = opened.get_slice(name)
                if not view.get_shape() or (name not in held and parameter not in wanted):
                    found[name] = opened.get_tensor(name)
                    continue
                count = view.get_shape()[0]
                first, last, total = held.get(name, (0, count, count))
                low, high = wanted.get(parameter, (0, total))
                begin, end = (min(max(bound, first), last) for bound in (low, high))
                pieces.setdefault(name, []).append((begin, view[begin - first : end - first]))
                asked[name] = high - low
    for name, parts in pieces.items():
        found[name] = torch.cat([rows for _, rows in sorted(parts, key=lambda part: part[0])])
        if len(found[name]) != asked[name]:
            raise CorruptArtifact(f"{path}: rows of {name} are missing; remove the .state folder to train again")
    return {name: tensor.to(_place(name, device)) for name, tensor in found.items()}


def _place(name: str, device: torch.device) -> torch.device:
    # AdamW counts its steps on the CPU.
    return torch.device("cpu") if name.endswith(".step") else device


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
        optimizer.state[parameter] = {kind: _like(parameter, value) for kind, value in found.items()}


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return the rows of a moment as the parameter's: shared over ranks where it is."""
    if not isinstance(parameter, DTensor) or value.ndim == 0:
        return value
    return DTensor.from_local(
        value,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
