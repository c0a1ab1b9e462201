"""Kahneman-Tversky optimization: completions that are known to be good or bad, without a rival."""

from dataclasses import dataclass
from typing import ClassVar

from prefloop.losses._sides import sum_of_sides
from prefloop.losses._terms import not_negative, positive, refuse
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class KTO:
    """KTO: Ethayarajh et al. 2024, arXiv 2402.01306, equations 7 and 8; TRL 1.16's `kto`.

        desirable y:    loss = λ_D·(1 − σ(β·(a − z₀)))                     β = beta, λ_D = lambda_d
        undesirable y:  loss = λ_U·(1 − σ(β·(z₀ − b)))                     λ_U = lambda_u
        a, b = log π(y|x)/π_ref(y|x);  z₀ = max(0, mean over the batch of log π(y'|x)/π_ref(y'|x))

    y' is a completion of another prompt, the view `mismatched`. z₀ estimates how far the policy is from the reference
    and has no gradient. It couples the rows of a batch, so it must see all rows of a step at once. A row that has both
    sides has the sum of both terms. `extra` holds z₀; the reported rewards are β·a and β·b, 0 for an absent side.

    Where the data have n_D desirable and n_U undesirable completions, the paper chooses λ_D·n_D/(λ_U·n_U) in
    [1, 4/3], with one of the two weights at 1.

    Departs from the paper: z₀ is taken over a whole optimizer step; TRL takes it over what one device computes at once.

    Raises:
        ConfigError: beta is not positive, a weight is negative, or both are 0.

    """

    beta: float = 0.1
    """Pull to the reference, per nat, > 0. Default 0.1: the authors' code and TRL."""

    lambda_d: float = 1.0
    """λ_D, weight of desirable completions, ≥ 0. Default 1: the authors' code and TRL."""

    lambda_u: float = 1.0
    """λ_U, weight of undesirable completions, ≥ 0. Default 1: the authors' code and TRL."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "unpaired"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("mismatched",)

    def __post_init__(self) -> None:
        positive("kto", beta=self.beta)
        not_negative("kto", lambda_d=self.lambda_d, lambda_u=self.lambda_u)
        if self.lambda_d == self.lambda_u == 0:
            refuse("kto", "lambda_d", "> 0 where lambda_u is 0", self.lambda_d)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each row. Raises ValueError without reference log-probabilities."""
        chosen, rejected = logps.log_ratios()
        z0 = logps.views["mismatched"].log_ratio().mean().clamp(min=0).detach()
        desirable = self.lambda_d * (self.beta * (z0 - chosen)).sigmoid()
        undesirable = self.lambda_u * (self.beta * (rejected - z0)).sigmoid()
        return LossOutput(
            sum_of_sides(logps, desirable, undesirable),
            self.beta * chosen.detach(),
            self.beta * rejected.detach(),
            {"z0": z0.expand_as(chosen)},
        )
