"""TR-DPO's optimizer loop: the reference follows the policy, every few steps, inside a round."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from prefloop.errors import ConfigError
from prefloop.models.adapters import merged_weights
from prefloop.models.logps import forget_gathered
from prefloop.models.shares import held_rows, local
from prefloop.protocols import Progress, views_of
from prefloop.rows import StepLog
from prefloop.tensors import LossOutput, PairLogps
from prefloop.train.batches import pair_logps
from prefloop.train.job import Job
from prefloop.train.opening import open_frozen
from prefloop.train.sharding import counts, divisor
from prefloop.train.update import (
    Carried,
    Player,
    Totals,
    autocast,
    check_starts_at_reference,
    make_optimizer,
    take_steps,
    train,
    watch,
)
from prefloop.train.versus import versus

NAME = "reference."
"""What the reference's parameters are called in the training state."""


@dataclass(frozen=True)
class MovingReference:
    """Trust-region update of the reference, TR-DPO: Gorbatovski et al. 2024, arXiv 2404.09656.

        after every τ optimizer steps:   θ_ref ← (1 − a)·θ_ref + a·θ        τ = `every`, a = `share`

    Between updates the loss is the recipe's, against the reference as it stands: any pair loss with a reference (the
    paper has DPO, IPO and KTO). a = 1 is a hard refresh, the paper's other variant: the next step's loss is ln 2 with
    DPO. a = 0, or no τ, is plain minimisation of the loss.

    Until the first update the log-probs that the pairs hold are used. After it they belong to a model that is gone:
    they are not read again, and the reference is run once more for each microbatch, without gradients.

    Weights are mixed in float32. With LoRA the policy's are the merged ones, so that the reference is a whole model,
    also where it starts as the model under the adapter. It lives for a round: the next one starts from the recipe's
    `reference` again.

    Logged beside the common columns: `reference_updates`, the number of updates so far. `margin` and rewards are
    against the reference of the moment, and fall at an update.

    Departs from the paper: its abstract, second-hand text and TRL's callback (`SyncRefModelCallback`, which has the
    same formula) were at hand, not its tables. The defaults are TRL's.

    Raises:
        ConfigError: a field is out of range; or, when called, the loss has no reference.

    """

    every: int | None = 512
    """τ, optimizer steps between updates, ≥ 1, counted from the start of a round. TRL's default. None: never."""
    share: float = 0.6
    """a, the policy's share of the new reference, in [0, 1]. TRL's default. 1: the policy itself; 0: no update."""

    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ConfigError(f"trainer.every: must be ≥ 1, or null for never, got {self.every!r}")
        if not 0 <= self.share <= 1:
            raise ConfigError(f"trainer.share: must be in [0, 1], got {self.share!r}")

    def __call__(self, job: Job, progress: Progress, stop: Callable[[], bool]) -> list[StepLog]:
        """Train `job.model` in place; go on from the newest state, the moved reference included.

        Raises:
            ConfigError: the loss has no reference.
            TrainingDiverged: loss or gradient is not finite, or policy and reference differ at step 0 though they
                should be the same model.
            Interrupted: `stop()` became true; the state was written first.

        """
        if job.reference is None or not job.loss.needs_reference:
            raise ConfigError(
                f"trainer.kind: moving_reference moves the reference, but {type(job.loss).__name__} has none; choose a "
                "loss with a reference, such as loss.kind=dpo"
            )
        if self.every is None or self.share == 0:
            return train(job, progress, stop)
        # Its own copy, in float32: small shares of small updates vanish in 16 bits.
        opened = open_frozen(job.reference.path, job.settings, job.team, precision="fp32", lower=True, cache=False)
        following = Following(job, opened.lm.model.requires_grad_(False), self.every, self.share)
        policy = {name: p for name, p in job.model.named_parameters() if p.requires_grad}
        player = Player(policy, make_optimizer(policy, job.settings))
        return take_steps(job, [player], following.accumulate, progress, stop, following.carried)


@dataclass
class Following:
    """A round's training with the reference that follows it."""

    job: Job
    reference: PreTrainedModel
    every: int
    share: float
    carried: Carried = field(init=False)

    def __post_init__(self) -> None:
        self.carried = Carried({NAME + name: p for name, p in self.reference.named_parameters()})

    def accumulate(self, step: int, microbatches: Sequence[Sequence[int]]) -> Totals:
        """Bring the reference up to date where it is time, then add up the gradient of the step."""
        if step > 0 and step % self.every == 0:
            follow(self.reference, self.job.model, self.share)
        updates = step // self.every
        totals = Totals()
        for index, microbatch in enumerate(microbatches):
            logps = self._stored(microbatch) if updates == 0 else self._live(microbatch)
            if step == 0 and index == 0 and self.job.starts_at_reference:
                check_starts_at_reference(logps, self.job.settings.precision, logps.weight.device)
            watch(logps)
            output = self.job.loss(logps)
            ((output.loss * logps.weight).sum() / divisor(microbatches, index)).backward()
            totals.add(_counted(output, updates), logps, counts(microbatches, index))
        return totals

    def _stored(self, microbatch: Sequence[int]) -> PairLogps:
        return self._score(self.job.model, microbatch, needs_reference=True)

    def _live(self, microbatch: Sequence[int]) -> PairLogps:
        policy = self._score(self.job.model, microbatch, needs_reference=False)
        assert policy.reference_chosen is None  # what is stored belongs to the reference before its first update
        with torch.no_grad():
            reference = self._score(self.reference, microbatch, needs_reference=False)
        return versus(policy, reference)

    def _score(self, model: nn.Module, microbatch: Sequence[int], needs_reference: bool) -> PairLogps:
        rows, views = [self.job.pairs[i] for i in microbatch], views_of(self.job.loss)
        with autocast(self.reference.device, self.job.settings.precision):
            return pair_logps(model, rows, layout=self.job.layout, needs_reference=needs_reference, views=views)


def follow(reference: PreTrainedModel, policy: nn.Module, share: float) -> None:
    """Move every parameter of `reference` towards the policy's, its adapter merged: θ_ref ← (1 − a)·θ_ref + a·θ."""
    forget_gathered(reference)  # the shares are what moves
    parameters = dict(reference.named_parameters())
    with torch.no_grad():
        for name, weight in merged_weights(policy):
            own = parameters[name]
            rows = weight[slice(*held_rows(own))] if isinstance(own, DTensor) else weight
            # lerp is exact where both are equal, and at share 1.
            local(own).lerp_(rows.to(own.dtype), share)


def _counted(output: LossOutput, updates: int) -> LossOutput:
    count = torch.full_like(output.chosen_reward, updates)
    return replace(output, extra={**output.extra, "reference_updates": count})
