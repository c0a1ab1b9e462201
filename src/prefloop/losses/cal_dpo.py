"""Calibrated DPO: the log-ratios are also fitted to absolute targets."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from prefloop.losses._terms import not_negative, positive
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class CalDPO:
    """Cal-DPO: Xiao et al. 2024, arXiv 2412.14516 (equation number not checked).

        loss = −log σ(a − b) + κ·[ (a − 1/(2β))² + (b + 1/(2β))² ]                     β = beta, κ = calibration
        a = log π(y_w|x)/π_ref(y_w|x),  b the same of y_l

    β stands only in the targets. The reported rewards are a and b, without β, which is what the sigmoid compares.

    Departs from the paper: none that we know; its text was not at hand. κ = 1 is the formula as a second source
    quotes it; the authors' code has κ = ½.

    Raises:
        ConfigError: beta is not positive, or calibration is negative.

    """

    beta: float = 0.002
    """Half the inverse of the target log-ratio, per nat, > 0. Default 0.002: the authors' configuration."""

    calibration: float = 1.0
    """κ, weight of the fit to the targets, ≥ 0. Default 1: the formula. ½: the authors' code. 0: DPO with β = 1."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("cal_dpo", beta=self.beta)
        not_negative("cal_dpo", calibration=self.calibration)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = logps.log_ratios()
        target = 1 / (2 * self.beta)
        fit = (chosen - target) ** 2 + (rejected + target) ** 2
        loss = -logsigmoid(chosen - rejected) + self.calibration * fit
        return LossOutput(loss, chosen.detach(), rejected.detach())
