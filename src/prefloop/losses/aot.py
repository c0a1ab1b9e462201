"""Alignment via optimal transport, on pairs: margins compared as distributions over the batch."""

from dataclasses import dataclass
from typing import ClassVar

from prefloop.losses._terms import matched_by_rank, noise_rate, positive, reference_of, smoothed
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class AOT:
    """AOT for pairs: Melnyk et al. 2024, arXiv 2406.05882, section 3; TRL's `aot`.

        u_i = m_(i) − m_ref,(i),   m = log π(y_w|x) − log π(y_l|x),   (i): i-th smallest in the batch
        loss = mean of −(1 − ε)·log σ(β·u_i) − ε·log σ(−β·u_i)           β = beta, ε = label_smoothing

    The policy's margins are asked to dominate the reference's as a distribution, not pair by pair. It couples the
    rows of a batch, so it must see all pairs of a step at once. Each row gets the term of its own policy margin's
    rank, so the loss of a pair follows the pair when rows move. A batch of one pair with ε = 0 is DPO. The reported
    rewards are β·log π/π_ref.

    Departs from the paper: none that we know; label smoothing is from TRL.

    Raises:
        ConfigError: beta is not positive, or label_smoothing is not in [0, 0.5).

    """

    beta: float = 0.01
    """Pull to the reference, per nat, > 0. Default 0.01: the paper's, as TRL's documentation gives it."""

    label_smoothing: float = 0.0
    """ε, in [0, 0.5). Default 0."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("aot", beta=self.beta)
        noise_rate("aot", self.label_smoothing)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = logps.log_ratios()
        reference_chosen, reference_rejected = reference_of(logps)
        margin = logps.policy_chosen.total - logps.policy_rejected.total
        reference_margin = reference_chosen.total - reference_rejected.total
        loss = smoothed(self.beta * (margin - matched_by_rank(margin, reference_margin)), self.label_smoothing)
        return LossOutput(loss, self.beta * chosen.detach(), self.beta * rejected.detach())
