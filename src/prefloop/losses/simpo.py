"""Simple preference optimization: the mean log-probability as the reward, and a target margin. No reference."""

from dataclasses import dataclass
from typing import ClassVar

from prefloop.losses._terms import noise_rate, not_negative, positive, smoothed
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class SimPO:
    """SimPO: Meng et al. 2024, arXiv 2405.14734 (equation number not checked), and the authors' code.

        u = β·log π(y_w|x)/|y_w| − β·log π(y_l|x)/|y_l| − γ                            β = beta, γ = gamma
        loss = −(1 − ε)·log σ(u) − ε·log σ(−u)                                         ε = label_smoothing

    The authors' code sets γ by `gamma_beta_ratio`: gamma = gamma_beta_ratio × beta. TRL's simpo_gamma is gamma
    itself. The reported rewards are β × mean log-probability.

    Departs from the paper: label smoothing is from the authors' code. Its hinge form and its supervised term (0 by
    default) are left out; for the latter use the `mixture` of simpo and sft.

    Raises:
        ConfigError: beta is not positive, gamma is negative, or label_smoothing is not in [0, 0.5).

    """

    beta: float = 2.0
    """Scale of the mean log-probability, tokens per nat, > 0. Default 2 (authors' code). Their best, as beta:
    gamma_beta_ratio: Mistral-Base 2: 0.8, Mistral-Instruct 2.5: 0.1, Llama3-Base 2: 0.5, Llama3-Instruct 2.5: 0.55
    (its second version 10: 0.3), Gemma-2-9b-it 10: 0.5."""

    gamma: float = 0.5
    """Target margin of the rewards, ≥ 0. Default 0.5 = the authors' ratio 0.25 × their beta 2, and TRL's default.
    Their advice: start at a ratio of 0.5 and search it in [0, 1]."""

    label_smoothing: float = 0.0
    """Probability that a label is wrong, in [0, 0.5). Default 0: the paper."""

    needs_reference: ClassVar[bool] = False
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("simpo", beta=self.beta)
        not_negative("simpo", gamma=self.gamma)
        noise_rate("simpo", self.label_smoothing)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair."""
        chosen, rejected = self.beta * logps.policy_chosen.mean, self.beta * logps.policy_rejected.mean
        loss = smoothed(chosen - rejected - self.gamma, self.label_smoothing)
        return LossOutput(loss, chosen.detach(), rejected.detach())
