"""KL to the reference on the policy's own completions: the pull that policy-gradient trainers hold on to."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prefloop.errors import ConfigError
from prefloop.losses._terms import positive
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class RolloutKL:
    """KL(π ‖ π_ref) on sampled completions, for `trainer.kind` ppo and group_advantage, which add the policy gradient.

        loss = β · Σ_t k(y_t),   d = log π(y_t) − log π_ref(y_t)
        k1 = d        k2 = d²/2        k3 = e^{−d} + d − 1

    k1 and k3 have the KL as their mean over samples of π; k3 is never negative. In the reward (`place`), β·k(y_t) of
    the sampling policy is taken off the reward of its token, as in arXiv 2009.01325 and 2406.09279. In the loss, the
    mean of β·k over the tokens is added to the policy's loss, as in GRPO, arXiv 2402.03300, equations 3 and 4.

    Only the chosen side is read: a rollout has no other. The reported reward is −loss.

    Departs from the paper: none for k1 in the reward and k3 in the loss. The names k1, k2, k3 are those of a note by
    J. Schulman, "Approximating KL divergence" (2020, recalled). In the loss, the mean gradient over samples of π is 0
    for k1, which is refused, that of KL(π ‖ π_ref) for k2, and neither for k3, GRPO's, unless it is `corrected`.

    Raises:
        ConfigError: beta is not positive, an unknown estimator or place, k1 in the loss, or `corrected` outside it.

    """

    beta: float = 0.05
    """β, pull to the reference, in score units per nat; > 0. Default 0.05: PPO of arXiv 2406.09279 (its code). GRPO's
    paper has 0.04."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """How a token's KL is estimated. k1: PPO and RLOO. k3: GRPO."""
    place: Literal["reward", "loss", "none"] = "reward"
    """Where the KL goes: into the reward, into the loss, or nowhere, so that it is measured only."""
    corrected: bool = False
    """In the loss only: multiply k1 or k3 by π/π_old, so that its mean gradient is that of KL(π ‖ π_ref): arXiv
    2512.02556 as TRL 1.16 has it, where it is the default. False: GRPO's paper."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "unpaired"
    level: ClassVar[str] = "token"
    couples_rows: ClassVar[bool] = False
    needs_trainer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("rollout_kl", beta=self.beta)
        if self.estimator not in ("k1", "k2", "k3"):
            raise ConfigError(f"loss.estimator (losses/rollout_kl.py): must be k1, k2 or k3, got {self.estimator!r}")
        if self.place not in ("reward", "loss", "none"):
            raise ConfigError(f"loss.place (losses/rollout_kl.py): must be reward, loss or none, got {self.place!r}")
        if self.corrected and (self.place != "loss" or self.estimator == "k2"):
            raise ConfigError(
                "loss.corrected (losses/rollout_kl.py): for k1 and k3 with loss.place=loss only; leave it out"
            )
        if self.place == "loss" and self.estimator == "k1" and not self.corrected:
            raise ConfigError(
                "loss.estimator (losses/rollout_kl.py): k1's gradient has mean 0 over the policy's own samples: in "
                "the loss it holds nothing; choose k3, or loss.place=reward"
            )

    def per_token(self, policy: Float[Tensor, "*token"], reference: Float[Tensor, "*token"]) -> Float[Tensor, "*token"]:
        """Return k of each token, nats, without β. Differentiable with respect to `policy`."""
        ratio = policy - reference
        if self.estimator == "k1":
            return ratio
        if self.estimator == "k2":
            return ratio.square() / 2
        return torch.exp(-ratio) + ratio - 1

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return β times the summed KL of each row. Raises ValueError without reference log-probabilities."""
        if logps.reference_chosen is None:
            raise ValueError("RolloutKL: the reference log-probabilities are missing")
        scored = logps.policy_chosen
        kl = self.per_token(scored.token_logps, logps.reference_chosen.token_logps)
        loss = self.beta * torch.where(scored.mask, kl, 0.0).sum(-1)
        return LossOutput(loss, -loss.detach(), torch.zeros_like(loss).detach())
