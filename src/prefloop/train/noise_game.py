"""DNPO's optimizer loop: the policy widens the margin, learned noise on the reference's rejected side narrows it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from prefloop.errors import ConfigError
from prefloop.models.head import head_of
from prefloop.models.logps import TokenGroup
from prefloop.models.noise_head import NoiseHead, predicting_states, share_states
from prefloop.protocols import Loss, Progress
from prefloop.rows import StepLog
from prefloop.tensors import CompletionLogps, LossOutput, PairLogps
from prefloop.train.batches import pair_logps
from prefloop.train.job import Job
from prefloop.train.opening import open_frozen
from prefloop.train.sharding import counts, divisor, sum_gradients
from prefloop.train.update import (
    Player,
    Totals,
    autocast,
    check_starts_at_reference,
    clip,
    make_optimizer,
    take_steps,
    train,
    watch,
)

NAME = "noise."
"""What the noise head's parameters are called in the training state."""


@dataclass(frozen=True)
class NoiseGame:
    """Noise preference optimization of DNPO: Yang et al. 2025, arXiv 2502.05400, objectives 8 to 10.

        m_i = λ·[log π(y⁺) − log π_t(y⁺)] − λ·[log π(y⁻) − log p^noise(y⁻)]        ℓ(m) = −log σ(m)
        L_model(θ)  =   mean ℓ(m_i)  with the noise taken as given
        L_noise(θσ) = − mean ℓ(m_i)  with the policy taken as given  +  α · mean σ²

    p^noise is the reference with σ(h) ⊙ ε added to its logits, ε ~ N(0, 1), on rejected completions only: see
    `models/noise_head.py`. Zero-mean noise lowers the log-prob of what the reference holds likely (log-sum-exp is
    convex), so the margin falls and gradients that had vanished come back. λ is the loss's beta; any pair loss with
    a reference takes the place of ℓ. α = `penalty`, ε_max = `bound`, n_σ = `noise_steps`, n_θ = `policy_steps`.
    Chosen completions and the policy carry no noise, and the noise head is thrown away after the round.

    Logged beside the common columns, which are those without noise: `saturation_before` and `saturation_after`, the
    mean σ(−margin) without and with noise; `noise_size`, the root mean square of σ over a pair's rejected tokens and
    the vocabulary; `noise_shift`, log p^noise(y⁻) − log π_t(y⁻) in nats. `loss` is L_model, with noise.

    Departs from the paper, whose full text was not at hand; four reviews that quote it agree on the noise's place
    and form. A reading of ours: its one-pass objective subtracts a primed from an unprimed term, and the prime is
    not defined; taken as a stop-gradient it gives the two losses above (without it both terms cancel, and only the
    penalty is left). Which hidden state h feeds the noise is inferred: the reference's. σ² < ε_max holds at all
    times, by a tanh; the paper states the bound and minimises with the penalty. σ² is averaged over the tokens and
    the vocabulary of a pair, then over pairs. Both players are AdamW with one schedule; the paper's is not known.

    Raises:
        ConfigError: a field is out of range; or, when called, the loss has no reference.

    """

    schedule: Literal["joint", "alternating"] = "joint"
    """joint: both losses in one backward pass with the same ε, as the paper's text says, to save time. alternating:
    as in its figure 3; n_σ steps of the noise with fresh ε, then n_θ steps of the policy."""
    noise: bool = True
    """Whether there is noise. False: plain minimisation of the loss, as in the paper's warm-up round of SPIN."""
    noise_learning_rate: float = 1e-4
    """Peak learning rate of the noise head, ≥ 0; it follows the policy's schedule. Not found; our choice, for models
    of billions of parameters. 0 keeps the noise as it starts."""
    penalty: float = 1.0
    """α, pull of σ² to 0, ≥ 0. Not found; our choice. Infinite: no noise."""
    bound: float | None = 1.0
    """ε_max, what σ² stays below, in squared logits, ≥ 0. Not found; our choice. 0: no noise. None: no bound, so that
    only the penalty holds the noise back; the ascent may then run away."""
    initial: float = 0.1
    """σ at the start, everywhere. Not found; our choice: at 0 the expected gradient of σ is 0, and only the draw's
    chance sets it going."""
    rank: int | None = None
    """Rank of the noise head's matrix, ≥ 1. None: a full one, as large as the LM head, as in the paper."""
    noise_steps: int = 1
    """alternating only: n_σ, steps of the noise before the policy moves, ≥ 1, all on the pairs of the coming policy
    step. Not found; our choice."""
    policy_steps: int = 1
    """alternating only: n_θ, steps of the policy between turns of the noise, ≥ 1. Not found; our choice."""

    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.schedule not in ("joint", "alternating"):
            raise ConfigError(f"trainer.schedule: must be joint or alternating, got {self.schedule!r}")
        for name, size in (("noise_learning_rate", self.noise_learning_rate), ("initial", self.initial)):
            if not 0 <= size < math.inf:
                raise ConfigError(f"trainer.{name}: must be a number ≥ 0, got {size!r}")
        for name, limit in (("penalty", self.penalty), ("bound", self.bound)):
            if limit is not None and not limit >= 0:
                raise ConfigError(f"trainer.{name}: must be ≥ 0 (.inf is allowed), got {limit!r}")
        counts = {"rank": self.rank, "noise_steps": self.noise_steps, "policy_steps": self.policy_steps}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ConfigError(f"trainer.{name}: must be ≥ 1, got {count!r}")
        if self.schedule == "joint" and (self.noise_steps, self.policy_steps) != (1, 1):
            raise ConfigError(
                "trainer.noise_steps, trainer.policy_steps: joint takes a step of both players at once; leave them "
                "out, or set trainer.schedule=alternating"
            )

    @property
    def silent(self) -> bool:
        """Whether σ is 0 at all times, so that this is plain minimisation of the loss."""
        return not self.noise or self.bound == 0 or self.penalty == math.inf

    def __call__(self, job: Job, progress: Progress, stop: Callable[[], bool]) -> list[StepLog]:
        """Train `job.model` in place against the noise; go on from the newest state, noise head included.

        Raises:
            ConfigError: the loss has no reference.
            TrainingDiverged: loss or a gradient is not finite, or policy and reference differ at step 0 though they
                should be the same model.
            Interrupted: `stop()` became true; the state was written first.

        """
        if job.reference is None or not job.loss.needs_reference:
            raise ConfigError(
                f"trainer.kind: noise_game puts noise on the reference, but {type(job.loss).__name__} has none; choose "
                "a loss with a reference, such as loss.kind=dpo"
            )
        if self.silent:
            return train(job, progress, stop)
        opened = open_frozen(job.reference.path, job.settings, job.team)
        reference = opened.lm.model
        if opened.shared:
            share_states(reference)
        head = self.head_for(reference, job.seed)
        policy, noise = self.players(job, head)
        game = _Round(self, job, reference, head, noise)
        return take_steps(job, [policy, noise], game.accumulate, progress, stop)

    def head_for(self, reference: PreTrainedModel, seed: int) -> NoiseHead:
        """Return a fresh noise head for `reference`, on its device."""
        lm_head, _ = head_of(reference)
        vocabulary, width = lm_head.weight.shape
        bound = None if self.bound == math.inf else self.bound
        head = NoiseHead(width, vocabulary, rank=self.rank, bound=bound, initial=self.initial, seed=seed)
        return head.to(reference.device)

    def players(self, job: Job, head: NoiseHead) -> tuple[Player, Player]:
        """Return the policy, and the noise, which gets no weight decay: its penalty is in the objective."""
        policy = {name: p for name, p in job.model.named_parameters() if p.requires_grad}
        noise = {NAME + name: p for name, p in head.named_parameters()}
        undecayed = job.settings.model_copy(update={"weight_decay": 0.0})
        scale = self.noise_learning_rate / job.settings.learning_rate
        return (
            Player(policy, make_optimizer(policy, job.settings)),
            Player(noise, make_optimizer(noise, undecayed), scale),
        )


def model_loss(loss: Loss, logps: PairLogps, noisy: CompletionLogps) -> LossOutput:
    """Return the policy's loss: the noisy reference is taken as given."""
    return loss(replace(logps, reference_rejected=_constant(noisy)))


def noise_loss(loss: Loss, logps: PairLogps, noisy: CompletionLogps) -> Float[Tensor, " row"]:
    """Return the noise's loss without its penalty: minus the policy's, and the policy is taken as given."""
    frozen = replace(
        logps,
        policy_chosen=_constant(logps.policy_chosen),
        policy_rejected=_constant(logps.policy_rejected),
        reference_rejected=noisy,
    )
    return -loss(frozen).loss


@dataclass(frozen=True)
class NoisySide:
    """The reference's rejected side with noise, and for each row its mean σ² and the change of its log-prob, nats."""

    logps: CompletionLogps
    variance: Float[Tensor, " row"]
    shift: Float[Tensor, " row"]


@dataclass(frozen=True)
class _Round:
    """The game of one round."""

    game: NoiseGame
    job: Job
    reference: PreTrainedModel
    head: NoiseHead
    noise: Player

    def accumulate(self, step: int, microbatches: Sequence[Sequence[int]]) -> Totals:
        """Add up the gradients of the players that move in this step; before, alternating, move the noise."""
        joint = self.game.schedule == "joint"
        draw = 0 if joint else self.game.noise_steps
        if not joint and step % self.game.policy_steps == 0:
            for earlier in range(draw):
                self._move_noise(step, earlier, microbatches)
        totals = Totals()
        for index, microbatch in enumerate(microbatches):
            logps = self._score(microbatch)
            if step == 0 and index == 0 and self.job.starts_at_reference:
                check_starts_at_reference(logps, self.job.settings.precision, logps.weight.device)
            watch(logps)
            with torch.set_grad_enabled(joint):
                noisy = self._noisy_side(microbatch, logps, (step, draw))
            output = model_loss(self.job.loss, logps, noisy.logps)
            total = (output.loss * logps.weight).sum()
            if joint:
                total = total + self._noise_total(logps, noisy)
            (total / divisor(microbatches, index)).backward()
            totals.add(self._logged(output, logps, noisy), logps, counts(microbatches, index))
        return totals

    def _move_noise(self, step: int, draw: int, microbatches: Sequence[Sequence[int]]) -> None:
        """Take one step of the noise while the policy stands still."""
        for index, microbatch in enumerate(microbatches):
            with torch.no_grad():
                logps = self._score(microbatch)
            noisy = self._noisy_side(microbatch, logps, (step, draw))
            (self._noise_total(logps, noisy) / divisor(microbatches, index)).backward()
        sum_gradients(self.job.team, self.noise.named.values())
        clip(self.noise.named.values(), self.job.settings.max_grad_norm)
        self.noise.optimizer.step()
        self.noise.optimizer.zero_grad(set_to_none=True)

    def _score(self, microbatch: Sequence[int]) -> PairLogps:
        rows = [self.job.pairs[i] for i in microbatch]
        with autocast(next(self.job.model.parameters()).device, self.job.settings.precision):
            return pair_logps(self.job.model, rows, layout=self.job.layout)

    def _noisy_side(self, microbatch: Sequence[int], logps: PairLogps, draw: tuple[int, int]) -> NoisySide:
        """Put noise on the stored log-probs: without noise they stay what they are, to the bit."""
        stored = logps.reference_rejected
        assert stored is not None  # pair_logps has asked for them
        rows = [self.job.pairs[i] for i in microbatch]
        states = predicting_states(self.reference, [TokenGroup(p.context, (p.rejected,)) for p in rows])
        streams = [np.random.SeedSequence((self.job.seed, *draw, i)) for i in microbatch]
        seeds = [
            seed for p, s in zip(rows, streams, strict=True) for seed in s.generate_state(len(p.rejected)).tolist()
        ]
        found = self.head(states, seeds)
        lengths = [len(p.rejected) for p in rows]
        shift = torch.zeros_like(stored.token_logps)
        shift = shift.masked_scatter(stored.mask, found.shift)
        variance = pad_sequence(list(found.variance.split(lengths)), batch_first=True).sum(-1) / stored.length
        return NoisySide(CompletionLogps(stored.token_logps + shift, stored.mask), variance, shift.sum(-1))

    def _noise_total(self, logps: PairLogps, noisy: NoisySide) -> Tensor:
        loss = noise_loss(self.job.loss, logps, noisy.logps)
        return (loss * logps.weight + self.game.penalty * noisy.variance).sum()

    @torch.no_grad()
    def _logged(self, output: LossOutput, logps: PairLogps, noisy: NoisySide) -> LossOutput:
        """Return what the curve shows: the loss with noise, the rewards without."""
        clean = self.job.loss(logps)
        extra = {
            "saturation_before": torch.sigmoid(clean.rejected_reward - clean.chosen_reward),
            "saturation_after": torch.sigmoid(output.rejected_reward - output.chosen_reward),
            "noise_size": noisy.variance.sqrt(),
            "noise_shift": noisy.shift,
        }
        return LossOutput(output.loss, clean.chosen_reward, clean.rejected_reward, {**output.extra, **extra})


def _constant(logps: CompletionLogps) -> CompletionLogps:
    return CompletionLogps(logps.token_logps.detach(), logps.mask)
