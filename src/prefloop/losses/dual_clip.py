"""DPO with both rewards clipped: a reading of TSO's dual-clip reward loss."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn import functional as F

from prefloop.losses._terms import positive, refuse
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class DualClip:
    """Clip the chosen reward from above and the rejected one from below: TSO, arXiv 2409.02118.

        loss = −log σ( min(a, c_w) − max(b, −c_l) )        a, b = beta × log-ratio of chosen, rejected

    A side beyond its threshold takes no gradient: the chosen one is not pushed up further, and the rejected one not
    down, which stops its likelihood from collapsing. With both beyond, the pair's gradient is 0. `extra` says which
    sides were clipped.

    Departs from the paper: not known. Its formula and thresholds were not found; this is the most faithful reading of
    what summaries of it say ("dual clip reward loss"), and the defaults are ours. With infinite thresholds it is DPO.

    Raises:
        ConfigError: a field is out of range.

    """

    beta: float = 0.1
    """Pull to the reference, > 0. Default as DPO's; the paper's was not found."""
    clip_chosen: float = 1.0
    """c_w > 0, in units of reward; in mode ratio ε_w > 0. Infinite: not clipped. Default ours."""
    clip_rejected: float = 1.0
    """c_l > 0, in units of reward; in mode ratio ε_l in (0, 1). Infinite (mode reward): not clipped. Default ours."""
    mode: Literal["reward", "ratio"] = "reward"
    """reward: thresholds of beta × log-ratio. ratio: π/π_ref is kept ≤ 1 + ε_w on chosen and ≥ 1 − ε_l on rejected,
    which is c_w = beta log(1 + ε_w), c_l = −beta log(1 − ε_l)."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    couples_rows: ClassVar[bool] = False
    level: ClassVar[str] = "sequence"

    def __post_init__(self) -> None:
        positive("dual_clip", beta=self.beta)
        if not self.clip_chosen > 0:
            refuse("dual_clip", "clip_chosen", "> 0", self.clip_chosen)
        if not self.clip_rejected > 0 or (self.mode == "ratio" and self.clip_rejected >= 1):
            rule = "in (0, 1) for mode ratio" if self.mode == "ratio" else "> 0"
            refuse("dual_clip", "clip_rejected", rule, self.clip_rejected)
        if self.mode not in ("reward", "ratio"):
            refuse("dual_clip", "mode", "reward or ratio", repr(self.mode))

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = (self.beta * ratio for ratio in logps.log_ratios())
        upper, lower = self._thresholds()
        margin = chosen.clamp(max=upper) - rejected.clamp(min=-lower)
        return LossOutput(
            loss=F.softplus(-margin),
            chosen_reward=chosen.detach(),
            rejected_reward=rejected.detach(),
            extra={
                "chosen_clipped": (chosen > upper).detach().to(torch.float32),
                "rejected_clipped": (rejected < -lower).detach().to(torch.float32),
            },
        )

    def _thresholds(self) -> tuple[float, float]:
        if self.mode == "reward":
            return self.clip_chosen, self.clip_rejected
        return self.beta * math.log1p(self.clip_chosen), -self.beta * math.log1p(-self.clip_rejected)
