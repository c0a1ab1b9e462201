"""DPO on rankings: the likelihood that the policy ranks K completions as they are ranked."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from prefloop.losses._terms import positive, refuse
from prefloop.tensors import LossOutput, PairLogps


def ranks_after_second(completions: int) -> tuple[str, ...]:
    """Return the names of the views that hold the third and later completions of a ranking: rank_3 … rank_K."""
    return tuple(f"rank_{place}" for place in range(3, completions + 1))


@dataclass(frozen=True)
class PlackettLuce:
    """Plackett-Luce DPO: Rafailov et al. 2023, arXiv 2305.18290, appendix A.3, equation 20.

        loss = −log Π_{k=1…K} exp(β·r_k) / Σ_{j≥k} exp(β·r_j)              β = beta, K = completions
        r_k = log π(y_k|x)/π_ref(y_k|x) of the completion in place k, the best one first

    The policy takes the best completion of K, then the best of the others, and so on; with K = 2 it is DPO. A ranking
    is one row: its first place is `chosen`, its second `rejected`, and the others are the views rank_3 … rank_K under
    the same prompt, so that a ranking is never split and its prompt is computed once. `pair_builder.kind=rankings`
    makes such rows, with the same `completions` or more. The reported rewards are β·r of the first and second place.

    Departs from the paper: none.

    Raises:
        ConfigError: beta is not positive, or completions is below 2.

    """

    beta: float = 0.1
    """Pull to the reference, per nat, > 0. Default 0.1: DPO's."""

    completions: int = 4
    """K, completions of a ranking, ≥ 2. Default 4 (ours, the paper has it open), as many as UltraFeedback has."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False
    # Of the default K; an object has those of its own.
    views: ClassVar[tuple[str, ...]] = ranks_after_second(4)

    def __post_init__(self) -> None:
        positive("plackett_luce", beta=self.beta)
        if self.completions < 2:
            refuse("plackett_luce", "completions", "≥ 2", self.completions)
        object.__setattr__(self, "views", ranks_after_second(self.completions))

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each ranking. Raises ValueError without reference log-probabilities."""
        chosen, rejected = logps.log_ratios()
        places = [chosen, rejected, *(logps.views[name].log_ratio() for name in self.views)]
        rewards = self.beta * torch.stack(places, -1)
        rivals = rewards.flip(-1).logcumsumexp(-1).flip(-1)
        return LossOutput((rivals - rewards).sum(-1), rewards[:, 0].detach(), rewards[:, 1].detach())
