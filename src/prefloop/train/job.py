"""What a trainer is and what it is given: which model, on which pairs, with which loss, by which settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from prefloop.protocols import Loss, Progress
from prefloop.rows import PolicyRef, StepLog, TokenizedPair
from prefloop.team import ALONE, Team
from prefloop.train.settings import TrainSettings

if TYPE_CHECKING:
    from torch import nn


def unheard(row: StepLog) -> None:
    """Tell nobody of a step."""


@dataclass(frozen=True)
class Job:
    """One round's training.

    `reference` is the loss's frozen model, whose log-probs the pairs hold already; a trainer that needs the model
    itself loads it. `starts_at_reference` says that policy and reference are the same model at step 0. The training
    state goes to `state_folder`. `team` are the processes that train together.
    """

    model: nn.Module
    pairs: Sequence[TokenizedPair]
    loss: Loss
    settings: TrainSettings
    layout: str
    seed: int
    state_folder: Path
    reference: PolicyRef | None
    starts_at_reference: bool
    team: Team = ALONE
    on_step: Callable[[StepLog], None] = unheard
    """Told of every step that the training curve holds, as soon as it is known."""
    counts: dict[str, int] = field(default_factory=dict)
    """What a trainer counts beside the curve, such as updates that it skipped: noted in the facts of 5-policy."""


class Trainer(Protocol):
    """A way to take optimizer steps: see `train/`. `needs_reference` says that the loss must have a reference."""

    needs_reference: ClassVar[bool]

    def __call__(self, job: Job, progress: Progress, stop: Callable[[], bool]) -> list[StepLog]:
        """Train `job.model` in place and return the training curve; go on from the newest state in its folder.

        Raises:
            TrainingDiverged: loss or gradient is not finite.
            Interrupted: `stop()` became true; the state was written first.

        """
        ...
