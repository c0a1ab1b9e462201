"""Self-play preference optimization: each completion's log-ratio is fitted to its win rate."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from prefloop.losses._terms import positive, refuse
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class SPPO:
    """SPPO: Wu et al. 2024, arXiv 2405.00675, equation 4.7, and the authors' code.

        hard:    loss = (a − η/2)² + (b + η/2)²
        single:  loss = ½·[ (a − η·(P − ½))² + (b + η·(P − ½))² ]
        a = log π(y_w|x)/π_ref(y_w|x),  b the same of y_l;  η = 1/beta;  P = win_prob, of chosen over rejected

    Both are pointwise: adding a constant to a and b changes them. With P = 1, which stands for a judge that gives no
    win probability, single is half of hard. The reported rewards are beta·a and beta·b.

    Departs from the paper: its own form, here called soft, fits a and b to the win rates P_w and P_l of each
    completion against all K completions of the prompt, ½·[(a − η·(P_w − ½))² + (b − η·(P_l − ½))²]. A pair carries
    only P(chosen beats rejected), from which P_w and P_l cannot be had unless K = 2, so soft is left out. `hard` is
    TRL 1.16's `sppo_hard`; `single` is `sppo_single` of the authors' code.

    Raises:
        ConfigError: beta is not positive, or form is unknown.

    """

    beta: float = 1e-3
    """Pull to the reference, per nat, > 0; 1/η. The paper: 0.001, with learning rate 5e-7."""

    form: Literal["hard", "single"] = "hard"
    """hard: the winner wins surely. single: the judge's probability that chosen beats rejected."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("sppo", beta=self.beta)
        if self.form not in ("hard", "single"):
            refuse("sppo", "form", "hard or single", self.form)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = logps.log_ratios()
        if self.form == "hard":
            target = 0.5 / self.beta
            loss = (chosen - target) ** 2 + (rejected + target) ** 2
        else:
            targets = (logps.win_prob - 0.5) / self.beta
            loss = 0.5 * ((chosen - targets) ** 2 + (rejected + targets) ** 2)
        return LossOutput(loss, self.beta * chosen.detach(), self.beta * rejected.detach())
