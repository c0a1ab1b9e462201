"""Contrastive preference optimization: DPO against a uniform reference, and a likelihood term."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from prefloop.losses._terms import not_negative, positive
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class CPO:
    """CPO: Xu et al. 2024, arXiv 2401.08417; its preference term is equation 3.

        loss = −log σ(β·(log π(y_w|x) − log π(y_l|x))) − α·log π(y_w|x)/|y_w|          β = beta, α = alpha

    Log-probabilities are sums over the completion's tokens, |y_w| is its length. No reference is used. The reported
    rewards are β·log π.

    Departs from the paper: the likelihood term is a mean over the completion's tokens, then over pairs, so that
    every pair counts alike; TRL 1.16 takes the mean over all tokens of the batch. Whether the paper means a sum is
    not in our notes.

    Raises:
        ConfigError: beta is not positive, or alpha is negative.

    """

    beta: float = 0.1
    """Scale of the log-probability margin, per nat, > 0. Default 0.1 (TRL)."""

    alpha: float = 1.0
    """Weight of the likelihood term, ≥ 0. Default 1 (TRL's cpo_alpha). 0: the preference term alone."""

    needs_reference: ClassVar[bool] = False
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("cpo", beta=self.beta)
        not_negative("cpo", alpha=self.alpha)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair."""
        chosen, rejected = logps.policy_chosen.total, logps.policy_rejected.total
        loss = -logsigmoid(self.beta * (chosen - rejected)) - self.alpha * logps.policy_chosen.mean
        return LossOutput(loss, self.beta * chosen.detach(), self.beta * rejected.detach())
