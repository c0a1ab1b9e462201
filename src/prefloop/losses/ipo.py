"""Identity preference optimization: a squared distance to a target margin."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from prefloop.losses._terms import mean_log_ratios, positive, refuse
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class IPO:
    """IPO: Azar et al. 2023, arXiv 2310.12036, equation 17.

        loss = (a − b − 1/(2τ))²                                                       τ = beta
        sum:   a = log π(y_w|x)/π_ref(y_w|x),  b the same of y_l
        mean:  each of the two divided by its own completion's length

    The gradient changes sign at a − b = 1/(2τ): unlike DPO, the loss has a finite minimum. The same τ means very
    different things in the two forms. The reported rewards are τ·a and τ·b.

    Departs from the paper: `mean` is not in its text. TRL 1.16 computes it and reports that the authors confirmed
    it; arXiv 2502.01237 lists IPO as not normalized. `sum` is the text's equation 17, to which the constants of
    arXiv 2406.07327 (its η) belong.

    Raises:
        ConfigError: beta is not positive, or normalization is unknown.

    """

    beta: float = 0.1
    """τ, pull to the reference, > 0: the inverse of twice the target margin (per nat for sum, per nat and token for
    mean). 0.1 is common; SimPO's search (arXiv 2405.14734) is over 0.01, 0.1, 0.5, 1."""

    normalization: Literal["mean", "sum"] = "mean"
    """mean: log-ratios per token (TRL 1.16, confirmed by the authors). sum: of the whole completion (the text)."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("ipo", beta=self.beta)
        if self.normalization not in ("mean", "sum"):
            refuse("ipo", "normalization", "mean or sum", self.normalization)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = mean_log_ratios(logps) if self.normalization == "mean" else logps.log_ratios()
        loss = (chosen - rejected - 1 / (2 * self.beta)) ** 2
        return LossOutput(loss, self.beta * chosen.detach(), self.beta * rejected.detach())
