"""Binary classifier optimization on pairs: chosen and rejected told apart from the reference, each on its own."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from prefloop.losses._terms import positive
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class BCO:
    """BCO for pairs: Jung et al. 2024, arXiv 2404.04656, section 4; in the form of TRL 1.16's `bco_pair`.

        loss = −log σ(β·a) − log σ(−β·b)                                               β = beta
        a = log π(y_w|x)/π_ref(y_w|x),  b the same of y_l

    It is an upper bound of DPO's loss. The reported rewards are β·a and β·b.

    Departs from the paper: the reward shift δ (a running mean of the rewards) is left out, as TRL 1.16 does; with it
    the loss would depend on earlier batches. The form for unpaired data is another loss.

    Raises:
        ConfigError: beta is not positive.

    """

    beta: float = 0.01
    """Pull to the reference, per nat, > 0. The paper: 0.01, with learning rate 5e-7."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("bco", beta=self.beta)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = (self.beta * log_ratio for log_ratio in logps.log_ratios())
        return LossOutput(-logsigmoid(chosen) - logsigmoid(-rejected), chosen.detach(), rejected.detach())
