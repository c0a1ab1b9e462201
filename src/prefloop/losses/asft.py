"""Aligned supervised fine-tuning: raise the odds of the chosen and lower those of the rejected, each on its own."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from prefloop.losses._terms import log_odds, not_negative, positive
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class ASFT:
    """ASFT: Wang et al. 2024, arXiv 2409.10571, as stated in arXiv 2502.01237, section 2.4; and its tempered form.

        loss = −κ·log p_w + λ·[ −log σ(β·o(y_w)) − log σ(−β·o(y_l)) ]
        o(y) = log(p/(1 − p)),  p = exp(log π(y|x)/|y|)              κ = sft_weight, λ = lam, β = beta

    With κ = β = 1 this is ASFT, −(1 + λ)·log p_w − λ·log(1 − p_l). The tempered form of 2502.01237, trained after
    supervised learning, is κ = 0, λ = 1 and β below 1. No reference is used. The reported rewards are β·o. It is
    unrelated to Anchored SFT (2509.23753).

    Departs from the paper: its text was not at hand; that p is normalized by length comes from table 4 of
    2502.01237. λ has no known value. The gradients were derived here.

    Raises:
        ConfigError: beta is not positive, or lam or sft_weight is negative, or both are 0.

    """

    lam: float = 0.1
    """λ, weight of the alignment term, ≥ 0. The paper's is not known; 0.1 is ORPO's and the least that 2502.01237
    tried (0.1, 0.2, 0.5, 1)."""

    beta: float = 1.0
    """Temperature of the odds, > 0. Default 1: the original. Best in 2502.01237: 0.1 to 0.3, with sft_weight 0."""

    sft_weight: float = 1.0
    """κ, weight of the plain likelihood term, ≥ 0. Default 1: the original. 0: the alignment term alone."""

    needs_reference: ClassVar[bool] = False
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("asft", beta=self.beta)
        not_negative("asft", lam=self.lam, sft_weight=self.sft_weight)
        positive("asft", **{"lam + sft_weight": self.lam + self.sft_weight})

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair."""
        chosen, rejected = self.beta * log_odds(logps.policy_chosen), self.beta * log_odds(logps.policy_rejected)
        align = -logsigmoid(chosen) - logsigmoid(-rejected)
        loss = -self.sft_weight * logps.policy_chosen.mean + self.lam * align
        return LossOutput(loss, chosen.detach(), rejected.detach())
