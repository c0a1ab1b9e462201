"""Anchored preference optimization, down: down with both, further with the rejected."""

from dataclasses import dataclass
from typing import ClassVar

from prefloop.losses._terms import positive
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class APODown:
    """APO-down: D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8.

        loss = σ(β·a) + 1 − σ(β·(a − b))                                               β = beta
        a = log π(y_w|x)/π_ref(y_w|x),  b the same of y_l

    For chosen completions that are worse than what the policy writes. At policy = reference the chosen completion's
    gradient is 0. The reported rewards are β·a and β·b.

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
        positive("apo_down", beta=self.beta)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = (self.beta * log_ratio for log_ratio in logps.log_ratios())
        return LossOutput(chosen.sigmoid() + (rejected - chosen).sigmoid(), chosen.detach(), rejected.detach())
