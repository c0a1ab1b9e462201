"""The reward model's optimizer loop: Bradley-Terry on pairs, with optional margins and centring."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.errors import ConfigError
from prefloop.models.reward_head import pad_id, rewards
from prefloop.protocols import Progress
from prefloop.rows import StepLog, TokenizedPair
from prefloop.tensors import CompletionLogps, LossOutput, PairLogps
from prefloop.train.job import Job
from prefloop.train.sharding import counts, divisor
from prefloop.train.update import Player, Totals, autocast, make_optimizer, take_steps


@dataclass(frozen=True)
class RewardModel:
    """Bradley-Terry reward model, as arXiv 2406.09279 trains it; the objective is equation 1 of arXiv 2203.02155.

        loss = −log σ(r_w − r_l − m) + c·(r_w + r_l)²        m = margin·(score_w − score_l)

    r is the logit of a sequence classifier on prompt and completion. m is the margin of arXiv 2307.09288, equation 2,
    there a number for each grade of preference, here proportional to the data's scores. The second term holds the
    rewards near 0, which the first leaves open (arXiv 2312.09244); TRL calls c `center_rewards_coefficient`.

    For runs with `trains: reward_model`. In the training curve rewards and margins are the classifier's, accuracy is
    the share of pairs in the right order, and `chosen_logp`, `rejected_logp` are log σ(r_w − r_l) and log σ(r_l − r_w):
    the log-probability that the model gives to the label and to its opposite.

    Departs from the paper: rows are padded, and both sides of a pair are computed whole.

    Raises:
        ConfigError: a field is out of range; or, when called with margins, a pair has no scores.

    """

    margin: float = 0.0
    """Rewards are to differ by at least this times the difference of the scores, ≥ 0. Default 0: no margin, as in arXiv
    2406.09279."""
    center: float = 0.0
    """c, ≥ 0. Default 0: no centring. 0.01 is what TRL's documentation proposes."""

    needs_reference: ClassVar[bool] = False
    trains: ClassVar[str] = "reward_model"

    def __post_init__(self) -> None:
        for name, value in (("margin", self.margin), ("center", self.center)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"trainer.{name}: must be a number ≥ 0, got {value!r}")

    def __call__(self, job: Job, progress: Progress, stop: Callable[[], bool]) -> list[StepLog]:
        """Train the classifier `job.model` in place; go on from the newest state in its folder.

        Raises:
            ConfigError: margins are asked for and a pair has no scores.
            TrainingDiverged: loss or a gradient is not finite.
            Interrupted: `stop()` became true; the state was written first.

        """
        named = {name: p for name, p in job.model.named_parameters() if p.requires_grad}
        return take_steps(
            job,
            [Player(named, make_optimizer(named, job.settings))],
            lambda step, microbatches: self._accumulate(job, microbatches),
            progress,
            stop,
            probe=lambda microbatches: self._accumulate(job, microbatches),
        )

    def _accumulate(self, job: Job, microbatches: Sequence[Sequence[int]]) -> Totals:
        """Add up the gradient of the mean over the step's pairs."""
        totals = Totals()
        for index, microbatch in enumerate(microbatches):
            pairs = [job.pairs[i] for i in microbatch]
            sides = [(*p.context, *p.chosen) for p in pairs] + [(*p.context, *p.rejected) for p in pairs]
            device = next(job.model.parameters()).device
            with autocast(device, job.settings.precision):
                chosen, rejected = rewards(job.model, sides, pad_id(job.model)).chunk(2)
            margins = torch.tensor([self._margin(pair) for pair in pairs], device=device)
            weight = torch.tensor([pair.weight for pair in pairs], device=device)
            loss = bradley_terry(chosen, rejected, margins, self.center)
            ((loss * weight).sum() / divisor(microbatches, index)).backward()
            output = LossOutput(loss.detach(), chosen.detach(), rejected.detach())
            logps = _as_logps(chosen.detach(), rejected.detach(), weight)
            totals.add(output, logps, counts(microbatches, index))
        return totals

    def _margin(self, pair: TokenizedPair) -> float:
        if not self.margin:
            return 0.0
        if pair.chosen_score is None or pair.rejected_score is None:
            raise ConfigError(
                f"trainer.margin: {self.margin}, but pair {pair.pair_id} has no scores; set trainer.margin=0, or a "
                "pair_builder that goes by scores"
            )
        return self.margin * (pair.chosen_score - pair.rejected_score)


def bradley_terry(
    chosen: Float[Tensor, " row"],
    rejected: Float[Tensor, " row"],
    margins: Float[Tensor, " row"] | None = None,
    center: float = 0.0,
) -> Float[Tensor, " row"]:
    """Return −log σ(r_w − r_l − m) + c·(r_w + r_l)² of each pair."""
    difference = chosen - rejected if margins is None else chosen - rejected - margins
    return -logsigmoid(difference) + center * (chosen + rejected).square()


def _as_logps(chosen: Tensor, rejected: Tensor, weight: Tensor) -> PairLogps:
    """Return the log-probabilities that the rewards give to either order, as one token each."""
    mask = torch.ones_like(chosen, dtype=torch.bool)[:, None]
    right, wrong = logsigmoid(chosen - rejected), logsigmoid(rejected - chosen)
    sides = [CompletionLogps(values[:, None], mask) for values in (right, wrong)]
    return PairLogps(sides[0], sides[1], None, None, torch.ones_like(weight), weight)
