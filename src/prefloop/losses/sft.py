"""Supervised learning of the chosen completion, as a part of mixtures."""

from dataclasses import dataclass
from typing import ClassVar

from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class SFT:
    """Supervised term on pairs, as in Mixed Preference Optimization: Wang et al. 2024, arXiv 2411.10442.

        loss = −log π(y_w|x)/|y_w|

    The rejected completion is not learned from. The reported rewards are the mean log-probabilities of both.

    Departs from the paper: none. TRL's `sft` takes the mean over all tokens of the batch instead, so that long
    completions weigh more.

    """

    needs_reference: ClassVar[bool] = False
    consumes: ClassVar[str] = "unpaired"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair."""
        chosen, rejected = logps.policy_chosen.mean, logps.policy_rejected.mean
        return LossOutput(-chosen, chosen.detach(), rejected.detach())
