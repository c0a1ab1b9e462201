"""DPO with a ground-truth completion learned beside the pair: gDPO of video-SALMONN 2."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import softplus

from prefloop.losses._terms import not_negative, positive
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class Guided:
    """Guided DPO: video-SALMONN 2, arXiv 2506.15220 and its code; the ICLR 2025 submission's equation 11.

        loss = −log σ(β·Δ) + λ·CE(y_gt)                   β = beta, λ = gold_weight
        CE(y_gt) = −log π(y_gt|x)/|y_gt|                  a ground-truth completion, the view `gold`

    Many rounds of DPO on own samples drift to unnatural text; the likelihood of what people wrote holds them. λ = 0
    is DPO.

    Departs from the paper: its equation 11 prints the log-likelihood with a plus sign; its text makes it a
    cross-entropy to minimise, as here.

    Raises:
        ConfigError: beta is not positive, or gold_weight is negative.

    """

    beta: float = 0.1
    """Pull to the reference, per nat, > 0. Default from the authors' code."""
    gold_weight: float = 0.1
    """λ, weight of the cross-entropy per token, ≥ 0. Default from the paper and the code."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    couples_rows: ClassVar[bool] = False
    level: ClassVar[str] = "sequence"
    views: ClassVar[tuple[str, ...]] = ("gold",)

    def __post_init__(self) -> None:
        positive("guided", beta=self.beta)
        not_negative("guided", gold_weight=self.gold_weight)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = (self.beta * ratio for ratio in logps.log_ratios())
        cross_entropy = -logps.views["gold"].policy.mean
        loss = softplus(rejected - chosen) + self.gold_weight * cross_entropy
        return LossOutput(loss, chosen.detach(), rejected.detach(), {"gold_cross_entropy": cross_entropy.detach()})
