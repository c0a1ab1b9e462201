"""OFS-DPO's optimizer loop: two LoRA modules of different speed on one frozen base chase each other."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor

from prefloop.errors import ConfigError
from prefloop.models.adapters import DEFAULT, adapter_parameters, add_twin, keep_only
from prefloop.protocols import Loss, Progress, views_of
from prefloop.rows import StepLog
from prefloop.tensors import CompletionLogps, LossOutput, PairLogps
from prefloop.train.batches import pair_logps
from prefloop.train.job import Job
from prefloop.train.sharding import counts, divisor
from prefloop.train.update import (
    Carried,
    Player,
    Totals,
    autocast,
    check_starts_at_reference,
    make_optimizer,
    take_steps,
    watch,
)
from prefloop.train.versus import taken_as_given, versus

MODULES = (DEFAULT, "second")
"""The module with the policy's learning rate, and the one with `speed` times that."""
ROLE = "fast_module"
"""Note of the training state: which of `MODULES` has the fast role, 0 or 1."""
WINDOW = "window"
"""Tensor of the training state: each module's base loss, summed since the last role check."""


@dataclass(frozen=True)
class FastSlow:
    """Fast-slow chasing of OFS-DPO: Qi et al. 2024, arXiv 2406.05534, its equations 3 to 6 and algorithm 1.

        J_F = L(Δ_F) + α·ℓ( β(Δ_F − sg Δ_S) )
        J_S = L(Δ_S) − α·ℓ( β(sg Δ_F − Δ_S) )        ℓ(u) = −log σ(u),  L(Δ) = mean ℓ(βΔ)

    Δ_F and Δ_S are the margins of the fast and of the slow module against the common reference, sg stops gradients.
    The chase term is the loss itself with the slow module in the reference's place: −log σ(β[log F/S (y_w) − log F/S
    (y_l)]). Both modules get the same extra push, α·σ(β(Δ_S − Δ_F)), on top of DPO's: it is α/2 where the slow one has
    caught up, even where DPO's gradient has vanished. α = `chase`, k = `check_every`, ρ = `speed`.

    Every k steps the module with the lower mean L takes the fast role; learning rates and optimizer states stay with
    the modules. At the end the module with the fast role becomes the policy's adapter, and the other is thrown away.
    The loss is any pair loss with a reference; with DPO this is the paper's.

    Both modules see the same batch, one after the other. Peft can run a batch of rows with mixed adapters, but not in
    training mode and not where all rows lie end to end in one; nor would it save arithmetic, as hidden states differ
    from the first adapted layer on.

    Logged beside the common columns, which are the fast module's: `margin_fast`, `margin_slow`, `loss_fast`,
    `loss_slow` (L of each), `chase` (ℓ of the chase, clamped), `saturation_slow`, and `fast_module`, 0 where the
    module with the policy's learning rate has the fast role, 1 where the slower one has. `loss` is J_F.

    Departs from the paper, whose full text was not at hand; a third-party implementation that cites its equations is
    the source of the objectives and of the role check. Its clamp of logits to ±10 is applied to the chase alone: J_S
    has no lower bound without it, L needs none. ρ, α and k were not found; the paper's initialisation neither: here
    the second module starts as a copy of the first. Deploying the module with the fast role is inferred; the third
    party deploys the one with the larger learning rate. A module that is thrown away at the end of a round takes its
    lag along: the next round starts with two equal modules.

    Raises:
        ConfigError: a field is out of range; or, when called, there is no adapter or the loss has no reference.

    """

    speed: float = 0.1
    """ρ, learning rate of the second module as a multiple of the first one's, in (0, 1]. Not found; our choice."""
    chase: float = 0.1
    """α, weight of the chase, ≥ 0. Not found; our choice. 0: two DPO runs that know nothing of each other."""
    check_every: int = 50
    """k, optimizer steps between role checks, ≥ 1. Not found; our choice. Steps count from the start of a round."""
    clamp: float | None = 10.0
    """Largest |β(Δ_F − Δ_S)| that still has a gradient, > 0; a pair beyond it is held there. From a third-party
    implementation. None: no clamp, and J_S has no lower bound."""

    needs_reference: ClassVar[bool] = True
    needs_adapter: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.speed <= 1:
            raise ConfigError(f"trainer.speed: must be in (0, 1], got {self.speed!r}")
        if not 0 <= self.chase < math.inf:
            raise ConfigError(f"trainer.chase: must be a number ≥ 0, got {self.chase!r}")
        if self.check_every < 1:
            raise ConfigError(f"trainer.check_every: must be ≥ 1, got {self.check_every!r}")
        if self.clamp is not None and not self.clamp > 0:
            raise ConfigError(f"trainer.clamp: must be > 0, or null for no clamp, got {self.clamp!r}")

    def __call__(self, job: Job, progress: Progress, stop: Callable[[], bool]) -> list[StepLog]:
        """Train the adapter of `job.model` and a copy of it, and leave the better one as its only adapter.

        Raises:
            ConfigError: the model has no adapter, or the loss no reference.
            TrainingDiverged: loss or a gradient is not finite, or policy and reference differ at step 0 though they
                should be the same model.
            Interrupted: `stop()` became true; the state was written first.

        """
        if not isinstance(job.model, PeftModel):
            raise ConfigError(
                "train.lora: not set, but trainer.kind fast_slow trains two LoRA modules on a frozen base; set "
                "train.lora.rank, for example to 16"
            )
        if not job.loss.needs_reference:
            raise ConfigError(
                f"trainer.kind: fast_slow measures both modules against the reference, but {type(job.loss).__name__} "
                "has none; choose a loss with a reference, such as loss.kind=dpo"
            )
        add_twin(job.model, MODULES[1])
        race = _Race(self, job, job.model)
        curve = take_steps(job, self.players(job, job.model), race.accumulate, progress, stop, race.carried)
        keep_only(job.model, MODULES[race.fast])
        return curve

    def players(self, job: Job, model: PeftModel) -> list[Player]:
        """Return both modules, each with an optimizer of its own."""
        found = []
        for module, scale in zip(MODULES, (1.0, self.speed), strict=True):
            named = adapter_parameters(model, module)
            found.append(Player(named, make_optimizer(named, job.settings), scale))
        return found


@dataclass(frozen=True)
class Objectives:
    """J_F and J_S of each pair, and what they are made of: the loss of either module, and the chase, constant."""

    fast: Tensor
    slow: Tensor
    base_fast: LossOutput
    base_slow: LossOutput
    chase: Tensor


def objectives(game: FastSlow, loss: Loss, fast: PairLogps, slow: PairLogps) -> Objectives:
    """Return the objective of the module with the fast role and that of the other, weights of pairs included.

    The two share no graph: each takes the other module as given.
    """
    base_fast, base_slow = loss(fast), loss(slow)
    ahead = chase(loss, fast, taken_as_given(slow), game.clamp)
    behind = chase(loss, taken_as_given(fast), slow, game.clamp)
    return Objectives(
        fast=(base_fast.loss + game.chase * ahead) * fast.weight,
        slow=(base_slow.loss - game.chase * behind) * slow.weight,
        base_fast=base_fast,
        base_slow=base_slow,
        chase=ahead.detach(),
    )


def chase(loss: Loss, fast: PairLogps, slow: PairLogps, clamp: float | None) -> Tensor:
    """Return the loss of each pair with the slow module as reference; beyond `clamp` constant, as at the clamp."""
    logps = versus(fast, slow)
    output = loss(logps)
    if clamp is None:
        return output.loss
    share = clamp / (output.chosen_reward - output.rejected_reward).abs()
    with torch.no_grad():
        held = loss(_drawn_in(logps, share.clamp(max=1)))
    return torch.where(share < 1, held.loss, output.loss)


def _drawn_in(logps: PairLogps, share: Tensor) -> PairLogps:
    """Return pairs whose log-ratios are `share` of what they were."""

    def side(policy: CompletionLogps, reference: CompletionLogps | None) -> CompletionLogps:
        assert reference is not None  # `versus` has set it
        distance = policy.token_logps - reference.token_logps
        return CompletionLogps(reference.token_logps + share[:, None] * distance, policy.mask)

    return replace(
        logps,
        policy_chosen=side(logps.policy_chosen, logps.reference_chosen),
        policy_rejected=side(logps.policy_rejected, logps.reference_rejected),
        views={name: replace(view, policy=side(view.policy, view.reference)) for name, view in logps.views.items()},
    )


@dataclass
class _Race:
    """The two modules of one round, and who leads."""

    game: FastSlow
    job: Job
    model: PeftModel
    carried: Carried = field(init=False)

    def __post_init__(self) -> None:
        window = torch.zeros(2, dtype=torch.float64, device=self.model.device)
        self.carried = Carried({WINDOW: window}, {ROLE: 0.0})

    @property
    def fast(self) -> int:
        """Which of `MODULES` has the fast role."""
        return int(self.carried.notes[ROLE])

    def accumulate(self, step: int, microbatches: Sequence[Sequence[int]]) -> Totals:
        """Add up the gradients of both modules; then, every k steps, see who has the fast role from now on."""
        totals, seen = Totals(), torch.zeros_like(self.carried.tensors[WINDOW])
        for index, microbatch in enumerate(microbatches):
            logps = [self._score(module, microbatch) for module in MODULES]
            if step == 0 and index == 0 and self.job.starts_at_reference:
                check_starts_at_reference(logps[0], self.job.settings.precision, logps[0].weight.device)
            fast, slow = logps[self.fast], logps[1 - self.fast]
            watch(fast)
            found = objectives(self.game, self.job.loss, fast, slow)
            # One at a time, with its module active: recomputed activations must come from that module again.
            for module, objective in ((1 - self.fast, found.slow), (self.fast, found.fast)):
                self.model.set_adapter(MODULES[module])
                (objective.sum() / divisor(microbatches, index)).backward()
            totals.add(self._logged(found), fast, counts(microbatches, index))
            if counts(microbatches, index):
                self._see(seen, found, fast.weight)
        self.carried.tensors[WINDOW] += self.job.team.sum(seen)
        if (step + 1) % self.game.check_every == 0:
            self._check_roles()
        return totals

    def _score(self, module: str, microbatch: Sequence[int]) -> PairLogps:
        rows = [self.job.pairs[i] for i in microbatch]
        self.model.set_adapter(module)
        with autocast(self.model.device, self.job.settings.precision):
            return pair_logps(self.model, rows, layout=self.job.layout, views=views_of(self.job.loss))

    def _see(self, seen: Tensor, found: Objectives, weight: Tensor) -> None:
        seen[self.fast] += (found.base_fast.loss.detach() * weight).sum()
        seen[1 - self.fast] += (found.base_slow.loss.detach() * weight).sum()

    def _check_roles(self) -> None:
        window = self.carried.tensors[WINDOW]
        sums = window.tolist()
        if sums[1 - self.fast] < sums[self.fast]:
            self.carried.notes[ROLE] = float(1 - self.fast)
        window.zero_()

    def _logged(self, found: Objectives) -> LossOutput:
        """Return what the curve shows. The weights of pairs are in it already only where `Totals` puts them."""
        fast, slow = found.base_fast, found.base_slow
        margin_slow = slow.chosen_reward - slow.rejected_reward
        extra = {
            "margin_fast": fast.chosen_reward - fast.rejected_reward,
            "margin_slow": margin_slow,
            "loss_fast": fast.loss,
            "loss_slow": slow.loss,
            "chase": found.chase,
            "saturation_slow": torch.sigmoid(-margin_slow),
            "fast_module": torch.full_like(margin_slow, self.fast),
        }
        objective = fast.loss + self.game.chase * found.chase
        return LossOutput(objective, fast.chosen_reward, fast.rejected_reward, {**fast.extra, **extra})
