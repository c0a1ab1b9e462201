"""Anchored preference optimization, zero, on completions without a rival."""

from dataclasses import dataclass
from typing import ClassVar

from prefloop.losses._sides import sum_of_sides
from prefloop.losses._terms import not_negative, positive, refuse
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class APOZeroUnpaired:
    """Unpaired APO-zero: D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7; TRL 1.16's `apo_zero_unpaired`.

        desirable y:    loss = λ_D·(1 − σ(β·a))                            β = beta, λ_D = lambda_d
        undesirable y:  loss = λ_U·σ(β·b)                                  λ_U = lambda_u
        a, b = log π(y|x)/π_ref(y|x)

    KTO with z₀ = 0. A row that has both sides has the sum of both terms: APO-zero. The reported rewards are β·a and
    β·b, 0 for an absent side.

    Departs from the paper: the paper's loss is on pairs; this is each of its two terms by itself, as in TRL, from
    whose KTO trainer the two weights are.

    Raises:
        ConfigError: beta is not positive, a weight is negative, or both are 0.

    """

    beta: float = 0.1
    """Pull to the reference, per nat, > 0. The paper: 0.1, with learning rate 2e-7."""

    lambda_d: float = 1.0
    """λ_D, weight of desirable completions, ≥ 0. Default 1 (TRL)."""

    lambda_u: float = 1.0
    """λ_U, weight of undesirable completions, ≥ 0. Default 1 (TRL)."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "unpaired"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("apo_zero_unpaired", beta=self.beta)
        not_negative("apo_zero_unpaired", lambda_d=self.lambda_d, lambda_u=self.lambda_u)
        if self.lambda_d == self.lambda_u == 0:
            refuse("apo_zero_unpaired", "lambda_d", "> 0 where lambda_u is 0", self.lambda_d)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each row. Raises ValueError without reference log-probabilities."""
        chosen, rejected = (self.beta * log_ratio for log_ratio in logps.log_ratios())
        loss = sum_of_sides(logps, self.lambda_d * (-chosen).sigmoid(), self.lambda_u * rejected.sigmoid())
        return LossOutput(loss, chosen.detach(), rejected.detach())
