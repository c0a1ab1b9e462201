"""Length-normalized DPO."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from prefloop.losses._terms import mean_log_ratios, positive
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class LNDPO:
    """LN-DPO: Ahrabian et al. 2024, arXiv 2407.15229 (equation number not checked); TRL's `sigmoid_norm`.

        loss = −log σ(β·(a/|y_w| − b/|y_l|))                                           β = beta
        a = log π(y_w|x)/π_ref(y_w|x),  b the same of y_l

    For equal lengths n it is DPO with β/n, so useful β are 10 to 100 times DPO's. Without the reference it is SimPO
    with γ = 0. The reported rewards are β·a/|y_w| and β·b/|y_l|.

    Departs from the paper: none that we know. The formula is from two third-party write-ups and from TRL 1.16,
    which agree; the paper's hyper-parameter grid was not found.

    Raises:
        ConfigError: beta is not positive.

    """

    beta: float = 5.0
    """Pull to the reference, tokens per nat, > 0. Default 5: Tulu 3's length-normalized DPO, since the paper's own is
    not known. DPO's 0.1 would make the loss almost inert."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("ln_dpo", beta=self.beta)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = mean_log_ratios(logps)
        loss = -logsigmoid(self.beta * (chosen - rejected))
        return LossOutput(loss, self.beta * chosen.detach(), self.beta * rejected.detach())
