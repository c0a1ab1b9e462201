"""SRPO: a policy that drafts and the same policy revising a draft in its context, trained on one offline objective."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from prefloop.losses._terms import positive, refuse
from prefloop.tensors import LossOutput, PairLogps

VIEWS = ("chosen_given_rejected", "rejected_given_rejected", "chosen_given_chosen", "rejected_given_chosen")


@dataclass(frozen=True)
class SRPO:
    """Self-Improving Robust Preference Optimization: Choi et al. 2024, arXiv 2406.01660.

        L†  = [½ − β(ρ(w|l) − ρ(l|l))]² + [½ − β(ρ(w|w) − ρ(l|w))]²                              β = beta
        L_g = [1 − β(ρ(w|l) + r(w) − ρ(l|w) − r(l))]²
        loss = (1 − α)·L_g + α·L†                                                                α = alpha

        r(y) = log π(y|x)/π_ref(y|x);   ρ(a|b) = the same of answer a after a prompt that shows draft b

    Six completions are scored for each pair; ρ(w|w) and ρ(l|l), copying, belong to it. The optimum does not depend on
    the policy that made the data. The reported rewards are β·r. `extra` holds both parts.

    Departs from the paper: not known. The formulas are those of a pull request to TRL (1772, never merged) that
    reviews of the paper agree with, and their identities hold on an enumerable example. Whether the paper sums or
    averages the two terms of L† is not certain: the pull request sums.

    Raises:
        ConfigError: a field is out of range.

    """

    beta: float = 0.1
    """Pull to the reference, per nat, > 0. Default from the pull request's configuration; the paper's was not found."""
    alpha: float = 0.8
    """Weight of the revision term, in [0, 1]; at 1 drafts are not trained. Default from the pull request."""
    revision_terms: Literal["sum", "mean"] = "sum"
    """How the two terms of L† are put together. Default from the pull request."""

    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    couples_rows: ClassVar[bool] = False
    level: ClassVar[str] = "sequence"
    views: ClassVar[tuple[str, ...]] = VIEWS

    def __post_init__(self) -> None:
        positive("srpo", beta=self.beta)
        if not 0 <= self.alpha <= 1:
            refuse("srpo", "alpha", "in [0, 1]", self.alpha)
        if self.revision_terms not in ("sum", "mean"):
            refuse("srpo", "revision_terms", "sum or mean", repr(self.revision_terms))

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError without reference log-probabilities."""
        chosen, rejected = logps.log_ratios()
        w_l, l_l, w_w, l_w = (logps.views[name].log_ratio() for name in VIEWS)
        revision = self._revision(w_l - l_l, w_w - l_w)
        joint = (1 - self.beta * (w_l + chosen - l_w - rejected)) ** 2
        extra = {"revision_loss": revision.detach(), "joint_loss": joint.detach()}
        extra["revision_margin"] = self.beta * ((w_l - l_l) + (w_w - l_w)).detach() / 2
        loss = (1 - self.alpha) * joint + self.alpha * revision
        return LossOutput(loss, self.beta * chosen.detach(), self.beta * rejected.detach(), extra)

    def _revision(self, after_bad: Float[Tensor, " row"], after_good: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
        total = (0.5 - self.beta * after_bad) ** 2 + (0.5 - self.beta * after_good) ** 2
        return total if self.revision_terms == "sum" else total / 2
