"""Odds ratio preference optimization: supervised learning with a penalty on the odds of the rejected completion."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from prefloop.losses._terms import log_odds, not_negative
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class ORPO:
    """ORPO: Hong et al. 2024, arXiv 2403.07691, equations 4 and 7.

        loss = −log p_w − λ·log σ(o(y_w) − o(y_l))                                     λ = lam
        o(y) = log(p/(1 − p)),  p = exp(log π(y|x)/|y|)

    p is the length-normalized probability. No reference is used. The reported rewards are the log-odds o.

    Departs from the paper: the likelihood term is a mean over the completion's tokens only, then over pairs. TRL
    1.16 takes it over prompt and completion, and over all tokens of the batch: the gradient differs by what the
    prompt's tokens teach.

    Raises:
        ConfigError: lam is negative.

    """

    lam: float = 0.1
    """λ, weight of the odds-ratio term, ≥ 0. Default 0.1. Search of arXiv 2405.14734: 0.1, 0.5, 1, 2. 0: plain
    supervised learning of the chosen completion."""

    needs_reference: ClassVar[bool] = False
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        not_negative("orpo", lam=self.lam)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair."""
        chosen, rejected = log_odds(logps.policy_chosen), log_odds(logps.policy_rejected)
        loss = -logps.policy_chosen.mean - self.lam * logsigmoid(chosen - rejected)
        return LossOutput(loss, chosen.detach(), rejected.detach())
