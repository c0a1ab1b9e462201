"""Noise contrastive alignment on pairs: absolute, not relative, rewards."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from prefloop.losses._terms import positive
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class NCA:
    """NCA for pairs: Chen et al. 2024, arXiv 2402.05369, section 4.1; TRL's `nca_pair`.

        loss = −log σ(β·a) − ½·log σ(−β·a) − ½·log σ(−β·b)                             β = beta
        a = log π(y_w|x)/π_ref(y_w|x),  b the same of y_l

    The chosen completion's gradient vanishes at β·a = ln 2 and is positive above: it is held at a level, not pushed
    without end. The reported rewards are β·a and β·b.

    Departs from the paper: none for pairs; its form for K completions with scores is a loss on lists.

    Raises:
        ConfigError: beta is not positive.

    """

    beta: float = 0.01
    """Pull to the reference, per nat, > 0; the paper's α. The paper: 0.01, with learning rate 5e-6."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("nca", beta=self.beta)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        log_ratio_chosen, log_ratio_rejected = logps.log_ratios()
        chosen, rejected = self.beta * log_ratio_chosen, self.beta * log_ratio_rejected
        loss = -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
        return LossOutput(loss, chosen.detach(), rejected.detach())
