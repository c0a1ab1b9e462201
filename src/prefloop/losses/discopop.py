"""DiscoPOP: a loss that a language model found, half logistic and half exponential."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from prefloop.losses._terms import positive
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class DiscoPOP:
    """DiscoPOP (log-ratio modulated loss): Lu et al. 2024, arXiv 2406.08414, equation 5.

        loss = (1 − k)·(−log σ(t)) + k·e^−t,   t = β·Δ,  k = σ(t/τ)                    β = beta, τ = tau
        Δ = log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x)

    It is not monotone: for τ = 0.05 it rises with t on about (−0.119, 0.072), so that at policy = reference a step
    lowers the margin. The reported rewards are β·log π/π_ref.

    Departs from the paper: none. The second term is computed as exp(log σ(t/τ) − t), which stays finite where e^−t
    alone is not.

    Raises:
        ConfigError: beta or tau is not positive.

    """

    beta: float = 0.05
    """Pull to the reference, per nat, > 0. The paper: 0.05, with learning rate 5e-7."""

    tau: float = 0.05
    """Temperature of the switch between the two parts, > 0. The paper: 0.05."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("discopop", beta=self.beta, tau=self.tau)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = logps.log_ratios()
        logit = self.beta * (chosen - rejected)
        logistic = -logsigmoid(logit) * (-logit / self.tau).sigmoid()
        exponential = (logsigmoid(logit / self.tau) - logit).exp()
        return LossOutput(logistic + exponential, self.beta * chosen.detach(), self.beta * rejected.detach())
