"""The optimizer loop: shuffled pairs, microbatches of a token budget, one mean over the pairs of the global step."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from prefloop.errors import ConfigError, Interrupted, TrainingDiverged
from prefloop.models.adapters import whole
from prefloop.protocols import Progress, reads_squares, views_of
from prefloop.rows import NamedValue, StepLog
from prefloop.team import Team
from prefloop.tensors import LossOutput, PairLogps
from prefloop.train import safety
from prefloop.train.batches import pair_logps
from prefloop.train.job import Job
from prefloop.train.plan import Plan
from prefloop.train.resume import Carried as Carried
from prefloop.train.resume import Player as Player
from prefloop.train.resume import resume, save
from prefloop.train.settings import TrainSettings
from prefloop.train.sharding import any_rank, counts, divisor, share_of, sum_gradients
from prefloop.train.store import index_of

START_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Largest allowed |log π − log π_ref| per token at step 0, nats, where policy and reference are the same model."""

EXTRA = "extra."
"""Prefix of what a loss logs beside the common columns."""

GRADIENTS = ("chosen_gradient", "rejected_gradient")
"""Columns that are read off gradients of the step's mean, which are divided by its size already."""


@dataclass(frozen=True)
class Update:
    """Plain minimisation of the loss with AdamW: what every method uses that says nothing else. Has no settings."""

    needs_reference: ClassVar[bool] = False

    def __call__(self, job: Job, progress: Progress, stop: Callable[[], bool]) -> list[StepLog]:
        """See `train`."""
        return train(job, progress, stop)


@dataclass
class Totals:
    """Sums over the pairs of one step, kept on the device until they are logged."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    present: dict[str, Tensor] = field(default_factory=dict)
    """Rows that have a chosen side, and rows that have a rejected one."""
    bad: list[Tensor] = field(default_factory=list)
    """For each microbatch, which rows have a loss that is not finite."""

    def add(self, output: LossOutput, logps: PairLogps, counts: bool = True) -> None:
        """Add the pairs of a microbatch; zeros where it does not count (see `sharding.Share`)."""
        self.bad.append(~(output.loss * logps.weight).detach().isfinite())
        margin = output.chosen_reward - output.rejected_reward
        values = {
            "loss": output.loss * logps.weight,
            "chosen_reward": output.chosen_reward,
            "rejected_reward": output.rejected_reward,
            "margin": margin,
            # A tie counts half: identical pairs read 0.5, not 0.
            "accuracy": (margin > 0).float() + 0.5 * (margin == 0).float(),
            "saturation": torch.sigmoid(-margin),
            "chosen_logp": logps.policy_chosen.total,
            "rejected_logp": logps.policy_rejected.total,
        }
        extra = {f"{EXTRA}{name}": value for name, value in output.extra.items()}
        for name, value in (values | extra | _steepness(logps)).items():
            total = value.detach().sum()
            _increase(self.sums, name, total if counts else torch.zeros_like(total))
        for side, scored in (("chosen", logps.policy_chosen), ("rejected", logps.policy_rejected)):
            rows = scored.mask.any(-1).sum()
            _increase(self.present, side, rows if counts else torch.zeros_like(rows))

    def over(self, team: Team) -> "Totals":
        """Return the sums over all ranks, which call this together."""
        if team.size == 1:
            return self
        # Every rank has the same names in the same order.
        values = torch.stack([value.double() for value in (*self.sums.values(), *self.present.values())])
        summed = team.sum(values).unbind()
        count = len(self.sums)
        return Totals(
            dict(zip(self.sums, summed[:count], strict=True)), dict(zip(self.present, summed[count:], strict=True))
        )

    def mean(self, name: str, size: int) -> float:
        """Return the mean over the step's `size` pairs; of a side's reward or log-prob, over those that have it."""
        if name in GRADIENTS:
            return float(self.sums[name])
        side, _, of = name.partition("_")
        rows = float(self.present[side]) if of in ("reward", "logp") and side in self.present else size
        return float(self.sums[name]) / max(1, rows)


def _increase(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def watch(logps: PairLogps) -> None:
    """Have the backward pass keep the gradient by both sides' log-probs, which `Totals.add` reads after it."""
    for side in (logps.policy_chosen, logps.policy_rejected):
        if side.token_logps.requires_grad:
            side.token_logps.retain_grad()


def _steepness(logps: PairLogps) -> dict[str, Tensor]:
    """Return |∂L/∂log π(y)| of both sides of each pair, where `watch` was called; 0 where the loss does not depend."""
    sides = (logps.policy_chosen, logps.policy_rejected)
    if not any(side.token_logps.retains_grad for side in sides):
        return {}
    found = {}
    for name, side in zip(GRADIENTS, sides, strict=True):
        gradient = side.token_logps.grad
        # A loss of the sum has one derivative, that of every token; padding has none.
        size = torch.zeros_like(side.length) if gradient is None else (gradient.abs() * side.mask).sum(-1)
        found[name] = size / side.length.clamp(min=1)
    return found


def train(job: Job, progress: Progress, stop: Callable[[], bool]) -> list[StepLog]:
    """Train `job.model` in place and return the training curve. Goes on from the newest state in its folder.

    Raises:
        TrainingDiverged: loss, gradient or weights are not finite (more often than `train.skip_nonfinite` allows),
            or policy and reference differ at step 0 though they should be the same model.
        CorruptArtifact: the training state lacks a part that `train.waive_state` does not name.
        Interrupted: `stop()` became true; the state was written first.

    """
    named = {name: p for name, p in job.model.named_parameters() if p.requires_grad}

    def accumulate(step: int, microbatches: Sequence[Sequence[int]]) -> Totals:
        return _accumulate(job, microbatches, check_start=step == 0 and job.starts_at_reference)

    return take_steps(job, [Player(named, make_optimizer(named, job.settings))], accumulate, progress, stop)


def take_steps(  # noqa: PLR0913  the last two by name, where a trainer has them
    job: Job,
    players: Sequence[Player],
    accumulate: Callable[[int, Sequence[Sequence[int]]], Totals],
    progress: Progress,
    stop: Callable[[], bool],
    carried: Carried | None = None,
    probe: Callable[[Sequence[Sequence[int]]], object] | None = None,
) -> list[StepLog]:
    """Go through the plan of steps: gradients by `accumulate(step, microbatches)`, then a step of every player.

    The first player is the policy, whose gradient norm is logged. A player without gradients does not move. Names of
    parameters, and of what is `carried`, differ. `probe` computes gradients for the memory probe and changes nothing
    else; by default those of the loss alone. Raises as `train` does.
    """
    carried = carried or Carried()
    settings, team = job.settings, job.team
    plan = plan_of(job)
    require_whole_steps(job, plan)
    named = {name: p for player in players for name, p in player.named.items()}
    curve: list[StepLog] = []
    first = resume(job, players, carried, curve, progress.say)
    on_cpu = next(iter(named.values())).device.type == "cpu"
    # On a GPU a look at the numbers waits for the device: there only where they are logged, or may be skipped.
    look_always = on_cpu or settings.skip_nonfinite > 0
    if not on_cpu:
        probe_memory(job, plan, probe)
        _step(players, False)
    progress.start("train", len(plan), "steps", done=first)
    for step in range(first, len(plan)):
        rate = learning_rate(step, len(plan), settings)
        _set_rate(players, rate)
        share = share_of(plan, step, team)
        totals = accumulate(step, share)
        for player in players:
            sum_gradients(team, player.named.values())
        norms = [clip(player.named.values(), settings.max_grad_norm) for player in players]
        done = step + 1
        stopping = any_rank(team, stop())
        saving = done < len(plan) and (stopping or done % settings.checkpoint_every == 0)
        log = done == len(plan) or done % settings.log_every == 0
        good = True
        if log or saving or look_always:
            row = _log(totals.over(team), norms[0], done, settings.epochs * done / len(plan), rate, len(share.rows))
            good = safety.finite(row, norms)
            if not good:
                what = safety.describe(row, named, norms, _bad_pairs(job, share, totals))
                safety.skip(job, carried.notes, what, progress)
            _keep(job, curve, row, log and good)
        _step(players, good)
        progress.advance(1, f"loss {curve[-1].loss:.4f}" if curve else "")
        if saving:
            save(job, done, players, carried, curve)
        if stopping and done < len(plan):
            raise Interrupted(f"training: stopped after step {done} of {len(plan)}; its state is on disk")
    progress.finish()
    safety.look_at_the_end(job, named, carried.notes, curve, len(plan))
    return curve


def _keep(job: Job, curve: list[StepLog], row: StepLog, log: bool) -> None:
    if log:
        curve.append(row)
        job.on_step(row)


def _set_rate(players: Sequence[Player], rate: float) -> None:
    for player in players:
        for group in player.optimizer.param_groups:
            group["lr"] = rate * player.scale


def _step(players: Sequence[Player], move: bool) -> None:
    for player in players:
        if move:
            player.optimizer.step()
        player.optimizer.zero_grad(set_to_none=True)


def _bad_pairs(job: Job, microbatches: Sequence[Sequence[int]], totals: Totals) -> list[str]:
    """Return the ids of the pairs whose loss is not finite, where a trainer counts rows in the order of the plan."""
    rows = [i for microbatch in microbatches for i in microbatch]
    bad = torch.cat(totals.bad).tolist() if totals.bad else []
    return [job.pairs[i].pair_id for i, wrong in zip(rows, bad, strict=True) if wrong] if len(rows) == len(bad) else []


def plan_of(job: Job) -> Plan:
    """Return which pairs make which step."""
    settings, index = job.settings, index_of(job.pairs)
    if not settings.keep_prompts_together:
        index = index.apart()
    return Plan(index, settings.pairs_per_step, settings.epochs, job.seed, settings.tokens_per_microbatch)


def require_whole_steps(job: Job, plan: Sequence[Sequence[Sequence[int]]]) -> None:
    """Refuse to split a step whose rows depend on each other.

    Raises:
        ConfigError: the loss couples rows and a step has several microbatches.

    """
    if job.loss.couples_rows and job.team.size > 1:
        raise ConfigError(
            f"loss: {type(job.loss).__name__} compares all pairs of a step, so that a step cannot be split over "
            f"{job.team.size} ranks; start one process"
        )
    if job.loss.couples_rows and any(len(step) > 1 for step in plan):
        raise ConfigError(
            f"train.tokens_per_microbatch: {type(job.loss).__name__} compares all pairs of a step, which do not fit "
            f"into {job.settings.tokens_per_microbatch} tokens; raise it, or lower train.pairs_per_step"
        )


def probe_memory(job: Job, plan: Plan, compute: Callable[[Sequence[Sequence[int]]], object] | None = None) -> None:
    """Compute the largest microbatch once before the first step, so that memory ends now or not at all.

    Raises:
        ConfigError: it does not fit; the message names the settings that make it smaller.

    """
    largest = plan.longest()
    tokens = int(plan.pairs.lengths[largest].sum())
    try:
        if compute is None:
            _accumulate(job, [largest], check_start=False)
        else:
            compute([largest])
    except torch.OutOfMemoryError as error:
        remedy = f"lower train.tokens_per_microbatch (now {job.settings.tokens_per_microbatch})"
        if len(largest) == 1:
            remedy = f"one pair does not fit: lower train.max_tokens (now {job.settings.max_tokens})"
        raise ConfigError(
            f"training: the largest microbatch ({len(largest)} pairs, {tokens} tokens) does not fit into "
            f"memory; {remedy}, set train.gradient_checkpointing=true, or train a LoRA adapter (train.lora.rank=16)"
        ) from error
    job.model.zero_grad(set_to_none=True)


def make_optimizer(named: dict[str, nn.Parameter], settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101), fused; vectors (norms, biases) get no weight decay."""
    groups = [
        {"params": [p for p in named.values() if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        fused=True,
    )


def learning_rate(step: int, total: int, settings: TrainSettings) -> float:
    """Return the learning rate of optimizer step `step` (from 0) of `total`: linear warm-up, then the schedule."""
    warmup = math.ceil(settings.warmup * total)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    share = (step - warmup) / max(1, total - warmup)
    scale = 1 - share if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))
    return settings.learning_rate * scale


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the context in which the model runs: bf16 on a GPU unless fp32 is asked for; fp32 on a CPU."""
    use_bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=use_bf16)


def _accumulate(job: Job, microbatches: Sequence[Sequence[int]], check_start: bool) -> Totals:
    """Add up the gradient of the mean over the step's pairs, microbatch by microbatch."""
    device = next(job.model.parameters()).device
    totals = Totals()
    for index, microbatch in enumerate(microbatches):
        rows = [job.pairs[i] for i in microbatch]
        with autocast(device, job.settings.precision):
            views, squares = views_of(job.loss), reads_squares(job.loss)
            logps = pair_logps(job.model, rows, job.layout, job.loss.needs_reference, views, squares)
        if check_start and index == 0:
            check_starts_at_reference(logps, job.settings.precision, device)
        watch(logps)
        output = job.loss(logps)
        ((output.loss * logps.weight).sum() / divisor(microbatches, index)).backward()
        totals.add(output, logps, counts(microbatches, index))
    return totals


def check_starts_at_reference(logps: PairLogps, precision: str, device: torch.device) -> None:
    """Compare live log-probs of the policy with the stored ones of the reference, which should be the same model.

    Raises:
        TrainingDiverged: they differ by more than `START_TOLERANCE` a token.

    """
    if logps.reference_chosen is None or logps.reference_rejected is None:
        return
    use_bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    bound = START_TOLERANCE[torch.bfloat16 if use_bf16 else torch.float32]
    chosen = (logps.policy_chosen.mean - logps.reference_chosen.mean).abs().max()
    rejected = (logps.policy_rejected.mean - logps.reference_rejected.mean).abs().max()
    worst = float(torch.maximum(chosen, rejected).detach())
    if not worst <= bound:
        raise TrainingDiverged(
            f"step 0: policy and reference are the same model, but their log-probs differ by {worst:.3g} nats a token "
            f"(allowed {bound}): the stored reference log-probs do not belong to this model, or the layout is wrong; "
            "try train.layout=padded"
        )


def clip(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale gradients down to `max_norm` where they are larger; return the norm that they had."""
    moved = list(parameters)
    norm = whole(nn.utils.get_total_norm([p.grad for p in moved if p.grad is not None]))
    nn.utils.clip_grads_with_norm_(moved, math.inf if max_norm is None else max_norm, norm)
    return norm


def _log(totals: Totals, norm: Tensor, step: int, epoch: float, rate: float, size: int) -> StepLog:
    means = {name: totals.mean(name, size) for name in totals.sums}
    common = {name: value for name, value in means.items() if not name.startswith(EXTRA)}
    extra = tuple(NamedValue(n.removeprefix(EXTRA), v) for n, v in means.items() if n.startswith(EXTRA))
    return StepLog(step=step, epoch=epoch, grad_norm=float(norm), learning_rate=rate, **common, extra=extra)
