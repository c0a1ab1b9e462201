"""Anchored preference optimization, zero: up with the chosen, down with the rejected."""

from dataclasses import dataclass
from typing import ClassVar

from prefloop.losses._terms import positive
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class APOZero:
    """APO-zero: D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7.

        loss = 1 − σ(β·a) + σ(β·b)                                                     β = beta
        a = log π(y_w|x)/π_ref(y_w|x),  b the same of y_l

    For chosen completions that are better than what the policy writes. Bounded in [0, 2], so that an outlier's
    gradient vanishes. The reported rewards are β·a and β·b.

    Departs from the paper: none.

    Raises:
        ConfigError: beta is not positive.

    """

    beta: float = 0.1
    """Pull to the reference, per nat, > 0. The paper: 0.1, with learning rate 2e-7."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("apo_zero", beta=self.beta)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = (self.beta * log_ratio for log_ratio in logps.log_ratios())
        return LossOutput((-chosen).sigmoid() + rejected.sigmoid(), chosen.detach(), rejected.detach())
