"""The hinge loss of RSO on the margin of log-ratios."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import relu

from prefloop.losses._terms import positive
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class Hinge:
    """The hinge-norm loss of RSO: Liu et al. 2023, arXiv 2309.06657 (equation number not checked).

        loss = max(0, 1 − γ·(a − b))                                                   γ = beta
        a = log π(y_w|x)/π_ref(y_w|x),  b the same of y_l

    A pair whose margin is above 1/γ nats teaches nothing more. RSO's other loss, sigmoid-norm, is DPO. The reported
    rewards are γ·a and γ·b.

    Departs from the paper: none in the loss. RSO draws its pairs by statistical rejection sampling; that is the
    recipe's business.

    Raises:
        ConfigError: beta is not positive.

    """

    beta: float = 0.05
    """γ, inverse of the margin that is wanted, per nat, > 0. Default 0.05: RSO's, from a second-hand source."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("hinge", beta=self.beta)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = logps.log_ratios()
        loss = relu(1 - self.beta * (chosen - rejected))
        return LossOutput(loss, self.beta * chosen.detach(), self.beta * rejected.detach())
