"""DPO with the log-probability of the chosen completion added."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from prefloop.losses._terms import not_negative, positive
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class DPOSFT:
    """SFT-DPO of 3D-Properties: Yan et al. 2024, arXiv 2406.07327, equation 7.

        loss = −log σ(β·Δ) − γ·log π(y_w|x)                                            β = beta, γ = gamma
        Δ = log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x)

    The added log-probability is a sum over tokens, so long completions weigh more; `rpo` adds its mean instead. The
    reported rewards are β·log π/π_ref.

    Departs from the paper: in its equation 7 the outer minus also turns the added term round, which would push the
    chosen completion down; its gradient −γ/π_w shows the sign meant, which is used here. The paper gives γ no value
    and the method no result.

    Raises:
        ConfigError: beta is not positive, or gamma is negative.

    """

    beta: float = 0.1
    """Pull to the reference, per nat, > 0. The paper: 0.1."""

    gamma: float = 1e-3
    """γ, weight of the chosen completion's log-probability, per nat, ≥ 0. The paper has no value; 0.001 kept the
    chosen completion up in our repetition of its toy. 0 is DPO."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("dpo_sft", beta=self.beta)
        not_negative("dpo_sft", gamma=self.gamma)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = logps.log_ratios()
        loss = -logsigmoid(self.beta * (chosen - rejected)) - self.gamma * logps.policy_chosen.total
        return LossOutput(loss, self.beta * chosen.detach(), self.beta * rejected.detach())
