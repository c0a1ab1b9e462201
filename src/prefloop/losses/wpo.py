"""DPO with each pair weighted by how likely the policy itself is to write it."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.losses._terms import positive
from prefloop.tensors import CompletionLogps, LossOutput, PairLogps


@dataclass(frozen=True)
class WPO:
    """WPO: Zhou et al. 2024, arXiv 2406.11827, equation 2 with sampled alignment, and its code; TRL's `use_weighting`.

        loss = −w(y_w)·w(y_l)·log σ(β·Δ)                                                β = beta
        Δ = log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x)
        w(y) = exp( 1/|y|·Σ_t [ log π(y_t) − log Σ_v π(v)² ] ),  without gradient

    Pairs that the policy would not write count little, so that data of another model resemble its own. Σ_v π(v)² is
    the mean probability of a token that the policy draws: what it samples itself weighs about 1. The reported rewards
    are β·log π/π_ref; `extra` holds the weight.

    Departs from the paper: none in the loss. Its authors cut the weight of a pair at 1, see `cap`; TRL 1.16 does not.

    Raises:
        ConfigError: beta is not positive.

    """

    beta: float = 0.01
    """Pull to the reference, per nat, > 0. Default 0.01: the paper's, as TRL's documentation gives it."""

    cap: bool = True
    """Cut w(y_w)·w(y_l) at 1. Default true: the authors' code. False: TRL 1.16."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "token"
    couples_rows: ClassVar[bool] = False
    reads_squares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("wpo", beta=self.beta)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities or squares."""
        chosen, rejected = (self.beta * log_ratio for log_ratio in logps.log_ratios())
        weight = (_log_weight(logps.policy_chosen) + _log_weight(logps.policy_rejected)).exp()
        if self.cap:
            weight = weight.clamp(max=1)
        loss = -weight * logsigmoid(chosen - rejected)
        return LossOutput(loss, chosen.detach(), rejected.detach(), {"pair_weight": weight})


def _log_weight(scored: CompletionLogps) -> Float[Tensor, " row"]:
    """Return log w: the mean over tokens of log π(token) − log Σ_v π(v)², without gradient."""
    if scored.log_squares is None:
        raise ValueError("losses/wpo.py: the sums of squared probabilities are missing")
    aligned = (scored.token_logps.detach() - scored.log_squares) * scored.mask
    return aligned.sum(-1) / scored.length.clamp(min=1)
