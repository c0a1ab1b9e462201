"""Length-desensitized DPO: tokens beyond the shorter completion's length count less."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.losses._terms import positive, reference_of, refuse
from prefloop.tensors import CompletionLogps, LossOutput, PairLogps


@dataclass(frozen=True)
class LDDPO:
    """LD-DPO: Liu et al. 2024, arXiv 2409.06411 (equation number not checked); TRL's `ld_alpha`.

        loss = −log σ(β·(Ŝ_π(y_w) − Ŝ_ref(y_w) − Ŝ_π(y_l) + Ŝ_ref(y_l)))               β = beta
        Ŝ(y) = Σ_{t ≤ L} log p(y_t) + α·Σ_{t > L} log p(y_t),   L = min(|y_w|, |y_l|)  α = alpha

    Only the longer completion of a pair is changed. The reported rewards are β·(Ŝ_π − Ŝ_ref).

    Departs from the paper: none that we know.

    Raises:
        ConfigError: beta is not positive, or alpha is not in [0, 1].

    """

    beta: float = 0.1
    """Pull to the reference, per nat, > 0. Default 0.1: DPO's."""

    alpha: float = 0.5
    """α, weight of the tokens beyond the shared length, in [0, 1]. Default 0.5: the paper's, as TRL's documentation
    gives it. 1 is DPO, 0 cuts both completions to the shared length."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "token"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("ld_dpo", beta=self.beta)
        if not 0 <= self.alpha <= 1:
            refuse("ld_dpo", "alpha", "in [0, 1]", self.alpha)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        reference_chosen, reference_rejected = reference_of(logps)
        shared = torch.minimum(logps.policy_chosen.length, logps.policy_rejected.length)
        chosen = self._total(logps.policy_chosen, shared) - self._total(reference_chosen, shared)
        rejected = self._total(logps.policy_rejected, shared) - self._total(reference_rejected, shared)
        loss = -logsigmoid(self.beta * (chosen - rejected))
        return LossOutput(loss, self.beta * chosen.detach(), self.beta * rejected.detach())

    def _total(self, scored: CompletionLogps, shared: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Return Ŝ: the sum over tokens, those after the first `shared` ones times alpha."""
        within = scored.mask.cumsum(-1) <= shared[:, None]
        return (scored.token_logps * scored.mask * torch.where(within, 1.0, self.alpha)).sum(-1)
