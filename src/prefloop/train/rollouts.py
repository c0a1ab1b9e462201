"""What policy-gradient trainers share: a microbatch of rollouts as tensors, the clipped surrogate, what is logged."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prefloop.errors import ConfigError
from prefloop.losses.rollout_kl import RolloutKL
from prefloop.rows import TokenizedPair
from prefloop.tensors import LossOutput, PairLogps
from prefloop.train.batches import pair_logps
from prefloop.train.job import Job
from prefloop.train.update import autocast


@dataclass(frozen=True)
class Rollout:
    """What a trainer keeps of each rollout in memory. Tensors have one entry for each token, on the CPU.

    `old` and `reference` are log-probs in nats, `score` the judge's.
    """

    context: tuple[int, ...]
    old: Float[Tensor, " token"]
    reference: Float[Tensor, " token"]
    score: float
    weight: float

    def rewards(self, loss: RolloutKL) -> Float[Tensor, " token"]:
        """Return each token's reward: the score at the last one, less β·KL where that goes into the reward."""
        found = torch.zeros_like(self.old)
        if loss.place == "reward":
            found -= loss.beta * loss.per_token(self.old, self.reference)
        found[-1] += self.score
        return found


def read_rollouts(job: Job, kind: str) -> list[Rollout]:
    """Return every rollout of a round, in the order of its pairs.

    Raises:
        ConfigError: the loss is not `rollout_kl`, or a pair lacks a score, sampler or reference log-probs.

    """
    if not isinstance(job.loss, RolloutKL):
        raise ConfigError(f"trainer.kind: {kind} brings its own objective; set loss.kind=rollout_kl, its KL term")
    return [_rollout(pair, kind) for pair in job.pairs]


def _rollout(pair: TokenizedPair, kind: str) -> Rollout:
    if pair.rejected or pair.chosen_score is None:
        raise ConfigError(f"trainer.kind: {kind} learns from single scored completions; set pair_builder.kind=rollouts")
    for name, values in (("sampler", pair.sampled_chosen), ("reference", pair.reference_chosen)):
        if values is None or len(values) != len(pair.chosen):
            raise ConfigError(
                f"trainer.kind: {kind} needs the {name}'s log-prob of every token, and pair {pair.pair_id} has "
                f"{len(values or ())} for {len(pair.chosen)}; set pair_builder.kind=rollouts and sampler.kind=hf"
            )
    return Rollout(
        context=pair.context,
        old=torch.tensor(pair.sampled_chosen, dtype=torch.float32),
        reference=torch.tensor(pair.reference_chosen, dtype=torch.float32),
        score=pair.chosen_score,
        weight=pair.weight,
    )


@dataclass(frozen=True)
class Scored:
    """A microbatch under the live policy: its log-probs (differentiable), the sampler's and the reference's, nats."""

    rows: Sequence[TokenizedPair]
    logps: PairLogps
    live: Float[Tensor, "row token"]
    old: Float[Tensor, "row token"]
    reference: Float[Tensor, "row token"]
    mask: Bool[Tensor, "row token"]

    def padded(self, rows: Sequence[Float[Tensor, " token"]]) -> Float[Tensor, "row token"]:
        """Return one value for each token of each row on the device, right-padded with 0."""
        return pad_sequence(list(rows), batch_first=True).to(self.live.device)


def score(job: Job, microbatch: Sequence[int], rollouts: Sequence[Rollout]) -> Scored:
    """Return the microbatch under `job.model`."""
    rows = [job.pairs[i] for i in microbatch]
    with autocast(next(job.model.parameters()).device, job.settings.precision):
        logps = pair_logps(job.model, rows, job.layout)
    live = logps.policy_chosen
    stored = [
        pad_sequence([getattr(rollouts[i], name) for i in microbatch], batch_first=True).to(live.token_logps.device)
        for name in ("old", "reference")
    ]
    return Scored(rows, logps, live.token_logps, stored[0], stored[1], live.mask)


def surrogate(
    ratio: Float[Tensor, "*place"], advantages: Float[Tensor, "*place"], clip: float | None
) -> Float[Tensor, "*place"]:
    """Return PPO's clipped loss, −min(ρ·A, clip(ρ, 1 − ε, 1 + ε)·A): arXiv 1707.06347, equation 7; ε = `clip`.

    None: −ρ·A, without a clip.
    """
    if clip is None:
        return -ratio * advantages
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def is_clipped(
    ratio: Float[Tensor, "*place"], advantages: Float[Tensor, "*place"], clip: float | None
) -> Bool[Tensor, "*place"]:
    """Return where the clipped loss has no gradient: the ratio has left the interval on the side that A asks for."""
    if clip is None:
        return torch.zeros_like(ratio, dtype=torch.bool)
    return ((ratio > 1 + clip) & (advantages > 0)) | ((ratio < 1 - clip) & (advantages < 0))


def kl_term(loss: RolloutKL, scored: Scored, ratio: Float[Tensor, "row place"]) -> Float[Tensor, "row token"] | float:
    """Return what the KL adds to each token's loss; 0 where it does not go into the loss."""
    if loss.place != "loss":
        return 0.0
    kl = loss.beta * loss.per_token(scored.live, scored.reference)
    return kl * ratio if loss.corrected else kl


def of_rows(values: Float[Tensor, "row token"], mask: Bool[Tensor, "row token"], scale: float) -> Tensor:
    """Return each row's sum over its tokens, times `scale`: values of all rows then add up to a mean over tokens."""
    return torch.where(mask, values, 0.0).sum(-1) * scale


def logged(
    scored: Scored, loss: Tensor, scores: Sequence[float], baselines: Sequence[float], extra: dict[str, Tensor]
) -> LossOutput:
    """Return what the training curve shows: as the chosen side's reward, score less baseline."""
    found, expected = (torch.tensor(v, dtype=torch.float32, device=scored.live.device) for v in (scores, baselines))
    shown = {"score": found, "baseline": expected, **{name: value.detach() for name, value in extra.items()}}
    return LossOutput(loss.detach(), found - expected, torch.zeros_like(found), shown)


def watched(scored: Scored, ratio: Tensor, clipped: Tensor, scale: float) -> dict[str, Tensor]:
    """Return what every policy-gradient trainer logs: `ratio`, `clipped`, `kl_old` and `kl_reference`, by token."""
    ratio, clipped = ratio.expand_as(scored.live), clipped.expand_as(scored.mask)
    found = {
        "ratio": ratio,
        "clipped": clipped.float(),
        "kl_old": (scored.live - scored.old).square() / 2,
        "kl_reference": scored.live - scored.reference,
    }
    return {name: of_rows(value, scored.mask, scale) * scored.logps.weight for name, value in found.items()}
