"""DPO with one beta for the chosen and another for the rejected completion."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from prefloop.losses._terms import not_negative, positive
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class FlexDPO:
    """Flex-DPO of 3D-Properties: Yan et al. 2024, arXiv 2406.07327.

        loss = −log σ(β⁺·a − β⁻·b)                                       β⁺ = beta_plus, β⁻ = beta_minus
        a = log π(y_w|x)/π_ref(y_w|x),  b the same of y_l

    β⁻ < β⁺ slows the fall of the rejected completion, but only while β⁻·|b| is below about 1.28; beyond that a
    smaller β⁻ speeds it up. The reported rewards are β⁺·a and β⁻·b.

    Departs from the paper: none. Its text calls the betas adaptive; it gives two constants and no rule. The gain over
    DPO that it reports on mathematics is about one standard error.

    Raises:
        ConfigError: beta_plus is not positive, or beta_minus is negative.

    """

    beta_plus: float = 0.1
    """β⁺, of the chosen completion, per nat, > 0. The paper: 0.1."""

    beta_minus: float = 0.08
    """β⁻, of the rejected completion, per nat, ≥ 0. The paper's best: 0.08. Equal to beta_plus: DPO."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("flex_dpo", beta_plus=self.beta_plus)
        not_negative("flex_dpo", beta_minus=self.beta_minus)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        log_ratio_chosen, log_ratio_rejected = logps.log_ratios()
        chosen, rejected = self.beta_plus * log_ratio_chosen, self.beta_minus * log_ratio_rejected
        return LossOutput(-logsigmoid(chosen - rejected), chosen.detach(), rejected.detach())
