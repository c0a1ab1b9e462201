"""Alignment via optimal transport, unpaired: chosen and rejected compared as two distributions over the batch."""

from dataclasses import dataclass
from typing import ClassVar

from prefloop.losses._terms import matched_by_rank, noise_rate, positive, smoothed
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class AOTUnpaired:
    """Unpaired AOT: Melnyk et al. 2024, arXiv 2406.05882, section 3; TRL's `aot_unpaired` (once `aot_pair`).

        u_i = a_(i) − b_(i),   a = log π(y_w|x)/π_ref(y_w|x),  b the same of y_l,   (i): i-th smallest in the batch
        loss = mean of −(1 − ε)·log σ(β·u_i) − ε·log σ(−β·u_i)           β = beta, ε = label_smoothing

    Which rejected completion belongs to which chosen one does not matter. It couples the rows of a batch, so it must
    see all pairs of a step at once. Each row gets the term of its chosen completion's rank. A batch of one pair with
    ε = 0 is DPO. The reported rewards are β·a and β·b.

    Departs from the paper: none that we know; label smoothing is from TRL. Both sides have the same number of
    completions here, because they come from pairs.

    Raises:
        ConfigError: beta is not positive, or label_smoothing is not in [0, 0.5).

    """

    beta: float = 0.01
    """Pull to the reference, per nat, > 0. Default 0.01: the paper's, as TRL's documentation gives it."""

    label_smoothing: float = 0.0
    """ε, in [0, 0.5). Default 0."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("aot_unpaired", beta=self.beta)
        noise_rate("aot_unpaired", self.label_smoothing)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = logps.log_ratios()
        loss = smoothed(self.beta * (chosen - matched_by_rank(chosen, rejected)), self.label_smoothing)
        return LossOutput(loss, self.beta * chosen.detach(), self.beta * rejected.detach())
