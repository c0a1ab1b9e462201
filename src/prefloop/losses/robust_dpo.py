"""DPO with an unbiased correction for labels that are wrong at a known rate."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from prefloop.losses._terms import noise_rate, positive
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class RobustDPO:
    """Robust DPO (rDPO): Ray Chowdhury et al. 2024, arXiv 2403.00409, section 3.1.

        loss = [ −(1 − ε)·log σ(β·Δ) + ε·log σ(−β·Δ) ] / (1 − 2ε)
        Δ = log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x)        β = beta, ε = label_smoothing

    Its mean over labels that are flipped with probability ε is DPO's loss on the true labels. It has no lower bound
    (slope −ε/(1 − 2ε) for large β·Δ), so its value does not say whether training has converged. The reported
    rewards are β·log π/π_ref.

    Departs from the paper: none.

    Raises:
        ConfigError: beta is not positive, or label_smoothing is not in [0, 0.5).

    """

    beta: float = 0.1
    """Pull to the reference, per nat, > 0. Default 0.1; TRL's index of papers gives 0.01 for the paper's runs."""

    label_smoothing: float = 0.1
    """ε, probability that a label is wrong, in [0, 0.5); near 0.5 the loss explodes. The paper: 0.1. 0 is DPO."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("robust_dpo", beta=self.beta)
        noise_rate("robust_dpo", self.label_smoothing)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = logps.log_ratios()
        logit = self.beta * (chosen - rejected)
        noise = self.label_smoothing
        loss = (-(1 - noise) * logsigmoid(logit) + noise * logsigmoid(-logit)) / (1 - 2 * noise)
        return LossOutput(loss, self.beta * chosen.detach(), self.beta * rejected.detach())
