"""DPO that takes the taste for long completions out of the preferences."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from prefloop.losses._terms import not_negative, positive
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class RDPO:
    """R-DPO: Park et al. 2024, arXiv 2403.19159 (equation number not checked).

        loss = −log σ(β·Δ + α·(|y_w| − |y_l|))                                         β = beta, α = alpha
        Δ = log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x)

    Derived as DPO is, from max E[r(x, y) − α·|y|] − β·KL(π‖π_ref): its optimum has r = β·log π/π_ref + α·|y| up to
    a constant of the prompt. A pair that length already explains gets less gradient, so the policy becomes shorter.
    The reported rewards are β·log π/π_ref.

    Departs from the paper: none that we know; the text was not at hand. The sign is inferred: a table copied in a
    later paper prints −α·(|y_w| − |y_l|), under which α > 0 rewards length, against the method's purpose; another
    write-up prints this sign.

    Raises:
        ConfigError: beta is not positive, or alpha is negative.

    """

    beta: float = 0.1
    """Pull to the reference, per nat, > 0. Default 0.1. Search of arXiv 2405.14734: 0.01, 0.05, 0.1."""

    alpha: float = 0.05
    """Price of a token, ≥ 0. Default 0.05, the least of the search of arXiv 2405.14734: 0.05, 0.1, 0.5, 1. 0 is
    DPO."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("r_dpo", beta=self.beta)
        not_negative("r_dpo", alpha=self.alpha)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = logps.log_ratios()
        longer = logps.policy_chosen.length - logps.policy_rejected.length
        loss = -logsigmoid(self.beta * (chosen - rejected) + self.alpha * longer)
        return LossOutput(loss, self.beta * chosen.detach(), self.beta * rejected.detach())
