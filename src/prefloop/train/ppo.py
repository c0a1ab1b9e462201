"""PPO's optimizer loop on stored rollouts: generalized advantages, clipped policy and value losses."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from prefloop.errors import ConfigError
from prefloop.losses.rollout_kl import RolloutKL
from prefloop.models.logps import TokenGroup, forget_gathered
from prefloop.models.value_head import ValueModel
from prefloop.protocols import Progress
from prefloop.rows import StepLog
from prefloop.tensors import LossOutput
from prefloop.train.job import Job
from prefloop.train.opening import open_value
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
from prefloop.train.update import Player, Totals, autocast, make_optimizer, take_steps

NAME = "value."
"""What the value model's parameters are called in the training state."""
SMALL = 1e-8
"""Added to a variance before its root."""


@dataclass(frozen=True)
class PPO:
    """Proximal policy optimization: Schulman et al. 2017, arXiv 1707.06347, as arXiv 2406.09279 uses it on completions.

        r_t = −β·k_t,  and the judge's score on top at the last token        k_t: `loss.estimator`, sampling policy
        δ_t = r_t + γ·V_{t+1} − V_t        A_t = δ_t + γ·λ·A_{t+1}        R_t = A_t + V_t        V after the end: 0
        ρ_t = π(y_t)/π_old(y_t)            π_old: the sampler's stored log-probs
        L_policy = mean −min(ρ·A, clip(ρ, 1 ± ε)·A)
        L_value  = mean ½·max((V − R)², (V_old + clip(V − V_old, ±ε_V) − R)²)
        L = L_policy + c·L_value

    Means are over the tokens of a step. A is computed once, before the first step, with the value model as it is then;
    `train.epochs` are PPO's passes over the round's rollouts and `train.pairs_per_step` its minibatch. ε = `clip`,
    ε_V = `value_clip`, c = `value_weight`.

    The value model is a network of its own: the policy's decoder, trained along, and a linear head of zeros. A round
    keeps it beside its policy (`value.safetensors`), and the round that starts from that policy goes on with it.

    Logged beside the common columns, as means over tokens: `ratio`, `clipped` (share without a policy gradient),
    `kl_old` (mean (log ρ)²/2), `kl_reference` (mean log π − log π_ref, nats), `value_loss`, `explained` (1 less
    the mean (R − V)² over the variance of R); and over rollouts: `score` and `baseline`, the value of the prompt.
    `loss` is L_policy, with the KL where `loss.place=loss`. `chosen_reward` and `margin` are score less baseline,
    `accuracy` the share of rollouts above it.

    Departs from arXiv 2406.09279: its code computes π_old, values and advantages anew with the weights of each
    minibatch, so that ρ = 1 always and no clip acts (a reading of that code); here they are those of the sampler, which
    is PPO's text. Advantages are whitened over the round, there over a minibatch. Its value model starts from the
    reward model, ours from the policy. Its samples are drawn at temperature 0.7, ours at 1, as the ratio needs.
    A completion that was cut at the length limit counts as ended.

    Raises:
        ConfigError: a field is out of range; or, when called, the loss is not `rollout_kl`, or the pairs are no
            rollouts.

    """

    clip: float | None = 0.2
    """ε, how far from 1 the ratio may go before its gradient stops, > 0. Default: the papers'. None: no clip."""
    value_clip: float | None = 0.2
    """ε_V, how far a value may go from where it was, in score units, > 0. Default: arXiv 2406.09279. None: no clip."""
    value_weight: float = 0.1
    """c, weight of the value loss, > 0. Default: arXiv 2406.09279. With a network and an AdamW of its own it matters
    through `train.max_grad_norm` only."""
    value_learning_rate: float | None = None
    """Peak learning rate of the value model, > 0; it follows the policy's schedule. None: the policy's."""
    gamma: float = 1.0
    """γ, discount of later rewards, in (0, 1]. Default: arXiv 2406.09279."""
    lam: float = 0.95
    """λ of the generalized advantage estimate (arXiv 1506.02438), in [0, 1]. Default: arXiv 2406.09279. 1: return minus
    value; 0: one step ahead."""
    whiten_advantages: bool = True
    """Shift and scale the advantages of a round to mean 0 and variance 1 over its tokens."""
    whiten_rewards: bool = False
    """Scale the rewards of a round to variance 1 over its tokens; their mean stays."""

    needs_reference: ClassVar[bool] = True
    loss_kind: ClassVar[str] = "rollout_kl"

    def __post_init__(self) -> None:
        sizes = {
            "clip": self.clip,
            "value_clip": self.value_clip,
            "value_weight": self.value_weight,
            "value_learning_rate": self.value_learning_rate,
        }
        for name, value in sizes.items():
            optional = name != "value_weight"
            if not (value is None and optional) and not (value is not None and 0 < value < math.inf):
                raise ConfigError(f"trainer.{name}: must be a number > 0{' or null' * optional}, got {value!r}")
        if not 0 < self.gamma <= 1:
            raise ConfigError(f"trainer.gamma: must be in (0, 1], got {self.gamma!r}")
        if not 0 <= self.lam <= 1:
            raise ConfigError(f"trainer.lam: must be in [0, 1], got {self.lam!r}")

    def __call__(self, job: Job, progress: Progress, stop: Callable[[], bool]) -> list[StepLog]:
        """Train `job.model` in place and write the value model beside it; go on from the newest state.

        Raises:
            ConfigError: the loss is not `rollout_kl`, or the pairs are no rollouts.
            TrainingDiverged: loss or a gradient is not finite.
            Interrupted: `stop()` became true; the state was written first.

        """
        rollouts = read_rollouts(job, "ppo")
        value = open_value(job.model, job.settings, job.team)
        play = Play(self, job, rollouts, value, self.advantages(job, rollouts, value))
        probe = partial(play.accumulate, 0)
        curve = take_steps(job, self.players(job, value), play.accumulate, progress, stop, probe=probe)
        value.save(job.state_folder.parent, write=job.team.main)
        return curve

    def players(self, job: Job, value: ValueModel) -> list[Player]:
        """Return the policy and the value model, each with an optimizer of its own."""
        policy = {name: p for name, p in job.model.named_parameters() if p.requires_grad}
        values = {NAME + name: p for name, p in value.trained()}
        scale = (self.value_learning_rate or job.settings.learning_rate) / job.settings.learning_rate
        optimizers = [make_optimizer(named, job.settings) for named in (policy, values)]
        return [Player(policy, optimizers[0]), Player(values, optimizers[1], scale)]

    def advantages(self, job: Job, rollouts: Sequence[Rollout], value: ValueModel) -> list["Estimate"]:
        """Return A, R and V of every rollout, with the value model as it stands before the first step."""
        assert isinstance(job.loss, RolloutKL)  # read_rollouts has refused others
        rewards = [rollout.rewards(job.loss) for rollout in rollouts]
        weights = [rollout.weight for rollout in rollouts]
        if self.whiten_rewards:
            rewards = whitened(rewards, weights, keep_mean=True)
        values = _values_before(job, value)
        found = [gae(r, v, self.gamma, self.lam) for r, v in zip(rewards, values, strict=True)]
        returns = [a + v for a, v in zip(found, values, strict=True)]
        if self.whiten_advantages:
            found = whitened(found, weights)
        return [Estimate(*parts) for parts in zip(found, returns, values, strict=True)]


@dataclass(frozen=True)
class Estimate:
    """Of one rollout, by token, on the CPU: advantage, return, and the value before training. Score units."""

    advantage: Float[Tensor, " token"]
    returns: Float[Tensor, " token"]
    value: Float[Tensor, " token"]


def gae(
    rewards: Float[Tensor, " token"], values: Float[Tensor, " token"], gamma: float, lam: float
) -> Float[Tensor, " token"]:
    """Return A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ·V_{t+1} − V_t, with V = 0 after the last token: arXiv 1506.02438.

    Example:
        >>> gae(torch.tensor([0.0, 1.0]), torch.zeros(2), gamma=1.0, lam=1.0)
        tensor([1., 1.])

    """
    ahead = torch.cat([values[1:], values.new_zeros(1)])
    deltas = (rewards + gamma * ahead - values).tolist()
    found: list[float] = []
    running = 0.0
    for delta in reversed(deltas):
        running = delta + gamma * lam * running
        found.append(running)
    return torch.tensor(found[::-1], dtype=rewards.dtype)


def whitened(
    rows: Sequence[Float[Tensor, " token"]], weights: Sequence[float], keep_mean: bool = False
) -> list[Float[Tensor, " token"]]:
    """Return values with mean 0 (unless kept) and variance 1 over all tokens; a row of weight k counts k times."""
    values = torch.cat([row.double() for row in rows])
    counts = torch.cat([torch.full((len(row),), w, dtype=torch.float64) for row, w in zip(rows, weights, strict=True)])
    mean = float((values * counts).sum() / counts.sum())
    variance = float(((values - mean).square() * counts).sum() / counts.sum())
    scale = 1 / math.sqrt(variance + SMALL)
    kept = mean if keep_mean else 0.0
    return [((row.double() - mean) * scale + kept).to(row.dtype) for row in rows]


def value_loss(
    values: Float[Tensor, "*token"],
    before: Float[Tensor, "*token"],
    returns: Float[Tensor, "*token"],
    clip: float | None,
) -> Float[Tensor, "*token"]:
    """Return ½·max((V − R)², (V_old + clip(V − V_old, ±ε_V) − R)²); without `clip`, ½·(V − R)²."""
    plain = (values - returns).square()
    if clip is None:
        return plain / 2
    held = before + (values - before).clamp(-clip, clip)
    return torch.maximum(plain, (held - returns).square()) / 2


def _values_before(job: Job, value: ValueModel) -> list[Float[Tensor, " token"]]:
    """Return the values of every rollout, by token, on the CPU; batches hold the tokens of a microbatch."""
    found: list[Tensor] = []
    for batch in _batches(job):
        with torch.no_grad(), autocast(next(value.parameters()).device, job.settings.precision):
            values = value(groups_of(job, batch)).cpu()
        found += [row[: len(job.pairs[i].chosen)] for row, i in zip(values, batch, strict=True)]
    forget_gathered(value)
    return found


def _batches(job: Job) -> Iterator[list[int]]:
    batch: list[int] = []
    width = 0
    for index, pair in enumerate(job.pairs):
        size = len(pair.context) + len(pair.chosen)
        if batch and max(width, size) * (len(batch) + 1) > job.settings.tokens_per_microbatch:
            yield batch
            batch, width = [], 0
        batch.append(index)
        width = max(width, size)
    if batch:
        yield batch


def groups_of(job: Job, microbatch: Sequence[int]) -> list[TokenGroup]:
    """Return the rollouts of a microbatch as groups of one."""
    return [TokenGroup(pair.context, (pair.chosen,)) for pair in (job.pairs[i] for i in microbatch)]


@dataclass(frozen=True)
class Play:
    """PPO on one round's rollouts."""

    rule: PPO
    job: Job
    rollouts: Sequence[Rollout]
    value: ValueModel
    estimates: Sequence[Estimate]

    def accumulate(self, step: int, microbatches: Sequence[Sequence[int]]) -> Totals:
        """Add up the gradients of policy and value model of one step."""
        rows = rows_of(microbatches)
        tokens = sum(self.rollouts[i].weight * len(self.rollouts[i].old) for i in rows)
        spread = self._spread(rows)
        totals = Totals()
        for index, microbatch in enumerate(microbatches):
            scored = score(self.job, microbatch, self.rollouts)
            with autocast(scored.live.device, self.job.settings.precision):
                values = self.value(groups_of(self.job, microbatch))
            output, policy, values_loss = self._losses(scored, microbatch, values, len(rows) / tokens, spread)
            weight = scored.logps.weight
            total = ((policy + self.rule.value_weight * values_loss) * weight).sum()
            (total / divisor(microbatches, index)).backward()
            totals.add(output, scored.logps, counts(microbatches, index))
        return totals

    def _losses(
        self, scored: Scored, microbatch: Sequence[int], values: Tensor, scale: float, spread: float
    ) -> tuple[LossOutput, Tensor, Tensor]:
        """Return what is logged, and of each row its part of the policy's and of the value model's loss."""
        rule, loss = self.rule, self.job.loss
        assert isinstance(loss, RolloutKL)  # read_rollouts has refused others
        found = [self.estimates[i] for i in microbatch]
        advantage = scored.padded([e.advantage for e in found])
        returns = scored.padded([e.returns for e in found])
        before = scored.padded([e.value for e in found])
        ratio = torch.exp(torch.where(scored.mask, scored.live - scored.old, 0.0))
        policy = surrogate(ratio, advantage, rule.clip) + kl_term(loss, scored, ratio)
        policy_rows = of_rows(policy, scored.mask, scale)
        value_rows = of_rows(value_loss(values, before, returns, rule.value_clip), scored.mask, scale)
        weight = scored.logps.weight
        error = of_rows((returns - values).square(), scored.mask, scale) * weight
        extra = {
            **watched(scored, ratio, is_clipped(ratio, advantage, rule.clip), scale),
            "value_loss": value_rows * weight,
            "explained": 1 - error / spread,
        }
        scores = [self.rollouts[i].score for i in microbatch]
        baselines = [float(e.value[0]) for e in found]
        return logged(scored, policy_rows, scores, baselines, extra), policy_rows, value_rows

    def _spread(self, rows: Sequence[int]) -> float:
        """Return the variance of the returns over the tokens of a step."""
        returns = torch.cat([self.estimates[i].returns for i in rows])
        return max(float(returns.var(correction=0)), SMALL)
