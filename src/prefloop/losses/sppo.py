"""Self-play preference optimization: each completion's log-ratio is fitted to its win rate."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from prefloop.losses._sides import present, sum_of_sides
from prefloop.losses._terms import positive, refuse
from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True)
class SPPO:
    """SPPO: Wu et al. 2024, arXiv 2405.00675, equation 4.7, and the authors' code.

        hard:    loss = (a − η/2)² + (b + η/2)²
        single:  loss = ½·[ (a − η·(P − ½))² + (b + η·(P − ½))² ]
        soft:    loss = (r − η·(P(y beats π) − ½))²           of each completion y by itself, r = a or b
        a = log π(y_w|x)/π_ref(y_w|x),  b the same of y_l;  η = 1/beta;  P = win_prob, of chosen over rejected

    All are pointwise: adding a constant to a and b changes them. With P = 1, which stands for a judge that gives no
    win probability, single is half of hard. The reported rewards are beta·a and beta·b, 0 for an absent side.

    `soft` is the paper's own form. Its rows are single completions with their win rate against all K completions of
    the prompt as win_prob (of a rejected side: the rate of the others), which `pair_builder.kind=win_rates` makes. The
    mean over a prompt's best and worst completion is the authors' loss of a pair, so that 2n rows weigh as n pairs.

    Departs from the paper: hard and single know only of the pair; `hard` is TRL 1.16's `sppo_hard`, `single` is
    `sppo_single` of the authors' code.

    Raises:
        ConfigError: beta is not positive, form is unknown, or soft gets a row with two sides.

    """

    beta: float = 1e-3
    """Pull to the reference, per nat, > 0; 1/η. The paper: 0.001, with learning rate 5e-7."""

    form: Literal["hard", "single", "soft"] = "hard"
    """hard: the winner wins surely. single: the judge's probability that chosen beats rejected. soft: each completion's
    win rate against the policy; needs `pair_builder.kind=win_rates`."""

    needs_reference: ClassVar[bool] = True
    # Of the class; an object of the form soft learns from one completion at a time.
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("sppo", beta=self.beta)
        if self.form not in ("hard", "single", "soft"):
            refuse("sppo", "form", "hard, single or soft", self.form)
        if self.form == "soft":
            object.__setattr__(self, "consumes", "unpaired")

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = logps.log_ratios()
        if self.form == "hard":
            target = 0.5 / self.beta
            loss = (chosen - target) ** 2 + (rejected + target) ** 2
        else:
            targets = (logps.win_prob - 0.5) / self.beta
            squares = (chosen - targets) ** 2, (rejected + targets) ** 2
            loss = _of_single(logps, *squares) if self.form == "soft" else 0.5 * (squares[0] + squares[1])
        return LossOutput(loss, self.beta * chosen.detach(), self.beta * rejected.detach())


def _of_single(logps: PairLogps, of_chosen: Float[Tensor, " row"], of_rejected: Float[Tensor, " row"]) -> Tensor:
    """Return the term of the one side that each row has; a row of two has no win rates of its own to go by."""
    if bool((present(logps.policy_chosen) * present(logps.policy_rejected)).any()):
        refuse("sppo", "form", "hard or single for pairs; soft reads pair_builder.kind=win_rates", "soft")
    return sum_of_sides(logps, of_chosen, of_rejected)
