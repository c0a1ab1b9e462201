"""The loss of Iterative RPO: DPO and the mean negative log-likelihood of the chosen completion."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from prefloop.losses._terms import not_negative, positive
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class RPO:
    """Iterative Reasoning Preference Optimization: Pang et al. 2024, arXiv 2404.19733, version 3.

        loss = −log σ(β·Δ) − α·log π(y_w|x)/|y_w|                                      β = beta, α = alpha
        Δ = log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x)

    |y_w| is the length of the chosen completion, reasoning and answer, in tokens. The likelihood term is normalized
    by length, DPO's is not. The reported rewards are β·log π/π_ref.

    Departs from the paper: none. Earlier versions of the paper weighted DPO's term instead. The paper of the same
    short name, 2405.16436, has this form with α = 0.005.

    Raises:
        ConfigError: beta is not positive, or alpha is negative.

    """

    beta: float = 0.1
    """Pull to the reference, per nat, > 0. The paper: 0.1, from a second-hand source."""

    alpha: float = 1.0
    """Weight of the likelihood term, ≥ 0. The paper: 1, and it finds the term essential. 0 is DPO."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("rpo", beta=self.beta)
        not_negative("rpo", alpha=self.alpha)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = logps.log_ratios()
        loss = -logsigmoid(self.beta * (chosen - rejected)) - self.alpha * logps.policy_chosen.mean
        return LossOutput(loss, self.beta * chosen.detach(), self.beta * rejected.detach())
