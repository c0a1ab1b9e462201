"""DPO with another divergence than the reverse KL."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.losses._terms import positive, refuse
from prefloop.tensors import LossOutput, PairLogps

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
LARGEST_EXPONENT = 80.0
"""Exponents are cut here: e^88.7 is the largest that float32 holds."""


@dataclass(frozen=True)
class FDPO:
    """f-DPO: Wang et al. 2023, arXiv 2309.16240, in the parametrization of TRL 1.16.

        loss = −log σ(β·(f'(π/π_ref)(y_w|x) − f'(π/π_ref)(y_l|x)))                     β = beta
        with u = log π/π_ref:   reverse_kl  u              forward_kl  1 − e^−u
                                js  log 2 + log σ(u)       alpha       (e^((α−1)·u) − 1)/(α − 1)      α = alpha

    α = 1 is reverse_kl, that is DPO, and α = 0 is forward_kl. The reported rewards are β·f'.

    Departs from the paper: α counts the other way round than in the paper and in TRL up to 0.24: here α is 1 − theirs.
    Exponents are cut at 80, beyond which a pair has no gradient.

    Raises:
        ConfigError: beta is not positive, divergence is unknown, or alpha is not in [0, 1].

    """

    beta: float = 0.1
    """Pull to the reference, per unit of f', > 0. Default 0.1: DPO's."""

    divergence: Divergence = "js"
    """The divergence between policy and reference that is held small."""

    alpha: float = 0.5
    """α, read by `alpha` only, in [0, 1]. Default 0.5 (TRL). 1: reverse_kl. 0: forward_kl."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("f_dpo", beta=self.beta)
        if self.divergence not in get_args(Divergence):
            refuse("f_dpo", "divergence", f"one of {', '.join(get_args(Divergence))}", self.divergence)
        if not 0 <= self.alpha <= 1:
            refuse("f_dpo", "alpha", "in [0, 1]", self.alpha)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = (self.beta * self._slope(log_ratio) for log_ratio in logps.log_ratios())
        return LossOutput(-logsigmoid(chosen - rejected), chosen.detach(), rejected.detach())

    def _slope(self, log_ratio: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Return f' at the ratio e^log_ratio."""
        if self.divergence == "js":
            return math.log(2) + logsigmoid(log_ratio)
        power = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha": self.alpha - 1}[self.divergence]
        if abs(power) < 1e-6:
            return log_ratio
        return (power * log_ratio).clamp(max=LARGEST_EXPONENT).expm1() / power
