"""DPO-positive: DPO with a penalty where the chosen completion falls below the reference."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid, relu

from prefloop.losses._terms import not_negative, positive
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class DPOP:
    """DPOP (Smaug): Pal et al. 2024, arXiv 2402.13228 (equation number not checked).

        loss = −log σ(β·(a − b − λ·max(0, −a)))                                        β = beta, λ = lam
        a = log π(y_w|x)/π_ref(y_w|x),  b the same of y_l

    The reported rewards are β·a and β·b.

    Departs from the paper: none that we know. The penalty stands inside the sigmoid and under β, as in the paper's
    version of July 2024, whose authors said that earlier brackets were wrong; some implementations put it outside.

    Raises:
        ConfigError: beta is not positive, or lam is negative.

    """

    beta: float = 0.3
    """Pull to the reference, per nat, > 0. Default 0.3: the paper's, from a second-hand source."""

    lam: float = 50.0
    """λ, weight of the penalty, ≥ 0. Default 50: the paper's; its authors found 5 to 500 alike. 0 is DPO."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("dpop", beta=self.beta)
        not_negative("dpop", lam=self.lam)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = logps.log_ratios()
        loss = -logsigmoid(self.beta * (chosen - rejected - self.lam * relu(-chosen)))
        return LossOutput(loss, self.beta * chosen.detach(), self.beta * rejected.detach())
