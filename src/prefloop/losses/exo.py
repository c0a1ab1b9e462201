"""Efficient exact optimization on pairs: the reverse KL to a smoothed label."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from prefloop.losses._terms import positive, refuse
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class EXO:
    """EXO-pref: Ji et al. 2024, arXiv 2402.00856, equation 16.

        loss = q·(log q − log(1 − ε)) + (1 − q)·(log(1 − q) − log ε),   q = σ(β·Δ)
        Δ = log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x)        β = beta, ε = label_smoothing

    This is KL(q ‖ label) with the label (1 − ε, ε): least, 0, at q = 1 − ε. DPO is the other direction. The reported
    rewards are β·log π/π_ref.

    Departs from the paper: none for pairs; its form for K completions is a loss on lists.

    Raises:
        ConfigError: beta is not positive, or label_smoothing is not in (0, 0.5).

    """

    beta: float = 0.1
    """Pull to the reference, per nat, > 0. The paper: 0.1."""

    label_smoothing: float = 1e-3
    """ε, probability of the rejected side in the label, in (0, 0.5); at 0 the loss is infinite. 0.001: TRL's advice."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("exo", beta=self.beta)
        if not 0 < self.label_smoothing < 0.5:
            refuse("exo", "label_smoothing", "in (0, 0.5)", self.label_smoothing)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = logps.log_ratios()
        logit = self.beta * (chosen - rejected)
        label, other = math.log1p(-self.label_smoothing), math.log(self.label_smoothing)
        loss = logit.sigmoid() * (logsigmoid(logit) - label) + (-logit).sigmoid() * (logsigmoid(-logit) - other)
        return LossOutput(loss, self.beta * chosen.detach(), self.beta * rejected.detach())
