"""RLOO and GRPO: policy gradient whose baseline is the mean score of a prompt's other completions; no value model."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prefloop.errors import ConfigError
from prefloop.losses.rollout_kl import RolloutKL
from prefloop.protocols import Progress
from prefloop.rows import StepLog
from prefloop.tensors import LossOutput
from prefloop.train.job import Job
from prefloop.train.rollouts import (
    Rollout,
    Scored,
    is_clipped,
    kl_term,
    logged,
    of_rows,
    read_rollouts,
    score,
    surrogate,
    watched,
)
from prefloop.train.sharding import counts, divisor, rows_of
from prefloop.train.update import Player, Totals, make_optimizer, take_steps

SMALL = 1e-4
"""Added to a standard deviation before dividing by it, as TRL does."""


@dataclass(frozen=True)
class GroupAdvantage:
    """Group baselines: RLOO, Ahmadian et al. 2024, arXiv 2402.14740, and GRPO, Shao et al. 2024, arXiv 2402.03300.

        R_i = score_i, less β·Σ_t k_t where `loss.place=reward`
        leave_one_out:  A_i = R_i − mean of the others' R        mean:  A_i = R_i − mean of all R
        scale:          A_i divided by the group's standard deviation (n − 1 in its denominator) + 1e-4
        token:     ρ_t = π(y_t)/π_old(y_t),  loss −min(ρ_t·A_i, clip(ρ_t, 1 ± ε)·A_i) of each token
        sequence:  ρ_i = Π_t ρ_t,            loss −min(ρ_i·A_i, clip(ρ_i, 1 ± ε)·A_i) of each completion
        with `loss.place=loss`, β·k_t of the live policy is added to each token's loss

    π_old are the sampler's stored log-probs. RLOO is leave_one_out, not scaled, sequence, KL in the reward; GRPO is
    mean, scaled, token, KL in the loss with k3. `train.epochs` are passes over the round's rollouts (GRPO's μ). A group
    is what one prompt's completions in the round are; a group of one, or of equal R, has A = 0.

    Logged beside the common columns: `score`, `baseline` (the score less A before scaling), `ratio`, `clipped`,
    `kl_old` and `kl_reference`, as for `trainer.kind=ppo`. `chosen_reward` and `margin` are A before scaling.

    Departs from the papers: RLOO's has no ratio and no clip (one gradient for each sample); at the first step of a
    round ρ = 1 and the gradient is the paper's, after it ρ corrects for the policy's having moved, as TRL's RLOO does.
    GRPO's paper does not say which standard deviation; n − 1 and 1e-4 are TRL's.

    Raises:
        ConfigError: a field is out of range; or, when called, the loss is not `rollout_kl`, the pairs are no rollouts,
            or no prompt has two of them.

    """

    baseline: Literal["leave_one_out", "mean"] = "mean"
    """What is taken off a completion's reward. leave_one_out: RLOO. mean: GRPO."""
    scale: bool = True
    """Divide by the group's standard deviation, as GRPO does. False: RLOO, and Dr. GRPO (arXiv 2503.20783)."""
    ratio: Literal["token", "sequence"] = "token"
    """What the probability ratio is of. token: GRPO. sequence: RLOO."""
    clip: float | None = 0.2
    """ε, how far from 1 the ratio may go before its gradient stops, > 0. Default 0.2, as in TRL. None: no clip."""
    average: Literal["completion", "token"] = "completion"
    """ratio=token only. completion: mean over a completion's tokens, then over completions, as in GRPO's paper. token:
    mean over all tokens of the step, so that long completions weigh more (DAPO, arXiv 2503.14476)."""

    needs_reference: ClassVar[bool] = True
    loss_kind: ClassVar[str] = "rollout_kl"

    def __post_init__(self) -> None:
        choices = {
            "baseline": ("leave_one_out", "mean"),
            "ratio": ("token", "sequence"),
            "average": ("completion", "token"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"trainer.{name}: must be {' or '.join(known)}, got {getattr(self, name)!r}")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ConfigError(f"trainer.clip: must be a number > 0 or null, got {self.clip!r}")
        if self.ratio == "sequence" and self.average != "completion":
            raise ConfigError("trainer.average: has no effect with trainer.ratio=sequence; leave it out")

    def __call__(self, job: Job, progress: Progress, stop: Callable[[], bool]) -> list[StepLog]:
        """Train `job.model` in place; go on from the newest state in its folder.

        Raises:
            ConfigError: the loss is not `rollout_kl`, the pairs are no rollouts, or no prompt has two.
            TrainingDiverged: loss or a gradient is not finite.
            Interrupted: `stop()` became true; the state was written first.

        """
        rollouts = read_rollouts(job, "group_advantage")
        assert isinstance(job.loss, RolloutKL)  # read_rollouts has refused others
        rewards = [float(rollout.rewards(job.loss).sum()) for rollout in rollouts]
        plain, advantages = self.advantages(rollouts, rewards)
        named = {name: p for name, p in job.model.named_parameters() if p.requires_grad}
        play = Play(self, job, rollouts, advantages, plain)
        player = Player(named, make_optimizer(named, job.settings))
        return take_steps(job, [player], play.accumulate, progress, stop, probe=partial(play.accumulate, 0))

    def advantages(self, rollouts: Sequence[Rollout], rewards: Sequence[float]) -> tuple[list[float], list[float]]:
        """Return A of every rollout before and after scaling. A rollout of weight k stands for k of its group.

        Raises:
            ConfigError: no prompt has two rollouts.

        """
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, rollout in enumerate(rollouts):
            groups[rollout.context].append(index)
        plain, scaled = [0.0] * len(rollouts), [0.0] * len(rollouts)
        largest = 0
        for members in groups.values():
            counts = [rollouts[i].weight for i in members]
            size = sum(counts)
            largest = max(largest, int(size))
            if size < 2:
                continue
            mean = sum(c * rewards[i] for c, i in zip(counts, members, strict=True)) / size
            spread = sum(c * (rewards[i] - mean) ** 2 for c, i in zip(counts, members, strict=True)) / (size - 1)
            # R − mean of the others is (R − mean of all)·n/(n − 1).
            factor = size / (size - 1) if self.baseline == "leave_one_out" else 1.0
            for i in members:
                plain[i] = (rewards[i] - mean) * factor
                scaled[i] = plain[i] / (math.sqrt(spread) + SMALL) if self.scale else plain[i]
        if largest < 2:
            raise ConfigError(
                "trainer.kind: group_advantage compares a prompt's completions, and no prompt has two of them; raise "
                "sampler.completions to 4 or more"
            )
        return plain, scaled


@dataclass(frozen=True)
class Play:
    """Group baselines on one round's rollouts. `plain` are the advantages before scaling."""

    rule: GroupAdvantage
    job: Job
    rollouts: Sequence[Rollout]
    advantages: Sequence[float]
    plain: Sequence[float]

    def accumulate(self, step: int, microbatches: Sequence[Sequence[int]]) -> Totals:
        """Add up the policy's gradient of one step."""
        rows = rows_of(microbatches)
        count = sum(self.rollouts[i].weight for i in rows)
        tokens = sum(self.rollouts[i].weight * len(self.rollouts[i].old) for i in rows)
        totals = Totals()
        for index, microbatch in enumerate(microbatches):
            scored = score(self.job, microbatch, self.rollouts)
            loss, ratio, clipped = self.losses(scored, [self.advantages[i] for i in microbatch])
            if self.rule.average == "completion":
                rows_loss = of_rows(loss, scored.mask, len(rows) / count) / scored.logps.policy_chosen.length
            else:
                rows_loss = of_rows(loss, scored.mask, len(rows) / tokens)
            ((rows_loss * scored.logps.weight).sum() / divisor(microbatches, index)).backward()
            extra = watched(scored, ratio, clipped, len(rows) / tokens)
            output = self._logged(scored, rows_loss, microbatch, extra)
            totals.add(output, scored.logps, counts(microbatches, index))
        return totals

    def losses(self, scored: Scored, advantages: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
        """Return of each token its loss, the ratio, and whether it is clipped. A completion's loss is its mean."""
        loss = self.job.loss
        assert isinstance(loss, RolloutKL)  # read_rollouts has refused others
        advantage = torch.tensor(advantages, dtype=torch.float32, device=scored.live.device)[:, None]
        moved = torch.where(scored.mask, scored.live - scored.old, 0.0)
        ratio = torch.exp(moved if self.rule.ratio == "token" else moved.sum(-1, keepdim=True))
        # One value for a completion, if the ratio is of the whole; its mean over tokens is that value.
        found = surrogate(ratio, advantage, self.rule.clip).expand_as(scored.live) + kl_term(loss, scored, ratio)
        return found, ratio, is_clipped(ratio, advantage, self.rule.clip)

    def _logged(self, scored: Scored, loss: Tensor, microbatch: Sequence[int], extra: dict[str, Tensor]) -> LossOutput:
        scores = [self.rollouts[i].score for i in microbatch]
        return logged(scored, loss, scores, [s - self.plain[i] for s, i in zip(scores, microbatch, strict=True)], extra)
