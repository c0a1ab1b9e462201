"""Sequence likelihood calibration: a margin between log-probabilities, and a likelihood term. No reference."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import relu

from prefloop.losses._terms import not_negative
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class SLiC:
    """SLiC-HF: Zhao et al. 2023, arXiv 2305.10425, section 2, with the chosen completion as the target.

        loss = max(0, δ − log π(y_w|x) + log π(y_l|x)) − λ·log π(y_w|x)                δ = delta, λ = lam

    Log-probabilities are sums over the completion's tokens. The reported rewards are the log-probabilities.

    Departs from the paper: the likelihood term takes the chosen completion, as in HALOs and in the tables of
    arXiv 2405.14734; the paper's takes the completion of its supervised data. The default constants are HALOs's; the
    paper's own are not in our notes.

    Raises:
        ConfigError: delta or lam is negative.

    """

    delta: float = 1.0
    """δ, the wanted margin, nats, ≥ 0. Default 1 (HALOs). Searches: 0.1, 0.5, 1, 2 (2405.14734); 5 (2406.07327)."""

    lam: float = 0.1
    """λ, weight of the likelihood term, ≥ 0. Default 0.1 (HALOs). Search of 2405.14734: 0.1, 0.5, 1, 10."""

    needs_reference: ClassVar[bool] = False
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        not_negative("slic", delta=self.delta, lam=self.lam)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair."""
        chosen, rejected = logps.policy_chosen.total, logps.policy_rejected.total
        loss = relu(self.delta - chosen + rejected) - self.lam * chosen
        return LossOutput(loss, chosen.detach(), rejected.detach())
