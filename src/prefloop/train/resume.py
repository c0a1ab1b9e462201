"""Who moves in training, and how that is written down so that a stopped round goes on exactly."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prefloop.models.shares import local
from prefloop.rows import StepLog
from prefloop.train import safety
from prefloop.train.checkpoint import (
    TrainingState,
    newest_state,
    optimizer_moments,
    read_state,
    restore_moments,
    save_state,
)
from prefloop.train.job import Job
from prefloop.train.sharding import rows_held

UNMOVED = "unmoved."
"""Prefix of notes of the training state: parameters that have no optimizer moments yet."""
WAIVED = "waived_state_parts"
"""Fact of 5-policy: parts of a training state that training went on without."""


@dataclass(frozen=True)
class Player:
    """Parameters by name, the optimizer that moves them, and their learning rate as a multiple of the policy's."""

    named: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    scale: float = 1.0


@dataclass(frozen=True)
class Carried:
    """What a trainer carries from step to step beside its players: part of the training state.

    It is changed in place: by the trainer as it goes, and by `take_steps` when a state is read.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)


def save(job: Job, done: int, players: Sequence[Player], carried: Carried, curve: Sequence[StepLog]) -> None:
    """Write the training state after `done` steps."""
    weights = dict(carried.tensors)
    moments: dict[str, Tensor] = {}
    for player in players:
        names: dict[Tensor, str] = {p: name for name, p in player.named.items()}
        weights |= {name: p.detach() for name, p in player.named.items()}
        moments |= optimizer_moments(player.optimizer, names)
    # A parameter that no step has moved yet has no moments, and needs none.
    still = {f"{UNMOVED}{name}": 1.0 for player in players for name in player.named if f"{name}.step" not in moments}
    save_state(job.state_folder, TrainingState(done, weights, moments, curve, carried.notes | still), job.team)


def resume(
    job: Job, players: Sequence[Player], carried: Carried, curve: list[StepLog], say: Callable[[str], None]
) -> int:
    """Put back the newest state, if there is one, and return how many steps are done; `say` hears what is missing.

    Raises:
        CorruptArtifact: the state lacks a part that `train.waive_state` does not name.

    """
    named = {name: p for player in players for name, p in player.named.items()}
    # The main rank sets damaged states aside; then all read the one that it found.
    found = job.team.tell(newest_state(job.state_folder, say) if job.team.main else None)
    if found is None:
        return 0
    state = read_state(
        job.state_folder, found, next(iter(named.values())).device, rows_held({**named, **carried.tensors})
    )
    still = {n.removeprefix(UNMOVED) for n in state.notes if n.startswith(UNMOVED)}
    fresh = [n for n in named if n not in still and f"{n}.step" not in state.moments]
    missing = {
        "weights": [n for n in named if n not in state.weights],
        "moments": fresh,
        "carried": [n for n in carried.tensors if n not in state.weights],
    }
    for what in safety.require_parts(job, missing):
        say(f"training goes on without {what}, as train.waive_state allows")
        job.counts[WAIVED] = job.counts.get(WAIVED, 0) + 1
    with torch.no_grad():
        for name, tensor in {**carried.tensors, **named}.items():
            if name in state.weights:
                local(tensor).copy_(state.weights[name])
    carried.notes.update({n: value for n, value in state.notes.items() if not n.startswith(UNMOVED)})
    for player in players:
        kept: dict[Tensor, str] = {
            p: name for name, p in player.named.items() if name not in still and name not in fresh
        }
        restore_moments(player.optimizer, kept, state.moments)
    curve.extend(state.steps)
    return state.step
