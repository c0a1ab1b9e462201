"""Direct preference optimization, with label smoothing."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from prefloop.errors import ConfigError
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class DPO:
    """DPO: Rafailov et al. 2023, arXiv 2305.18290, equation 7; with label smoothing, cDPO: Mitchell 2023.

        loss = −(1 − ε) · log σ(β·Δ) − ε · log σ(−β·Δ)
        Δ = log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x)        β = beta, ε = label_smoothing

    The reported rewards are β · log π/π_ref. With ε = 0 the loss is the paper's and has no finite minimum; with
    ε > 0 it is least at β·Δ = log((1 − ε)/ε).

    Departs from the paper: none. Label smoothing is from "A note on DPO with noisy preferences & relationship to IPO"
    (E. Mitchell, 2023, a note without arXiv id). `PairLogps.win_prob` is not read: every pair counts as labeled chosen
    over rejected, and ε says how often that label may be wrong.

    Raises:
        ConfigError: beta is not positive, or label_smoothing is not in [0, 0.5).

    """

    beta: float = 0.1
    """Pull to the reference, per nat; > 0. The paper uses 0.1, and 0.5 for summaries (its appendix B)."""

    label_smoothing: float = 0.0
    """Probability that a label is wrong, in [0, 0.5). 0 is the paper; 0.1 is common for noisy labels."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    couples_rows: ClassVar[bool] = False
    level: ClassVar[str] = "sequence"

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"loss.beta (losses/dpo.py): must be > 0, got {self.beta}; the paper uses 0.1")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                "loss.label_smoothing (losses/dpo.py): must be in [0, 0.5), "
                f"got {self.label_smoothing}; use 0 for clean labels"
            )

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = logps.log_ratios()
        logit = self.beta * (chosen - rejected)
        smoothing = self.label_smoothing
        loss = -(1 - smoothing) * logsigmoid(logit) - smoothing * logsigmoid(-logit)
        return LossOutput(loss, self.beta * chosen.detach(), self.beta * rejected.detach())
