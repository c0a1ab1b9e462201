"""What losses read and return. Shapes: `row` is one pair, `token` one position of a completion, right-padded."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class CompletionLogps:
    """Per-token log-probabilities of completions, in nats.

    `mask` marks real tokens; it is carried, never inferred from values. Positions outside the mask hold 0.
    """

    token_logps: Float[Tensor, "row token"]
    mask: Bool[Tensor, "row token"]
    log_squares: Float[Tensor, "row token"] | None = None
    """log Σ_v π(v)² of each token's distribution, nats, without gradient; `None`: the loss does not read it."""

    @property
    def total(self) -> Float[Tensor, " row"]:
        """Log-probability of the whole completion, nats."""
        return (self.token_logps * self.mask).sum(-1)

    @property
    def length(self) -> Float[Tensor, " row"]:
        """Number of completion tokens, the end token included where it is a target."""
        return self.mask.sum(-1).to(self.token_logps.dtype)

    @property
    def mean(self) -> Float[Tensor, " row"]:
        """Log-probability per token, nats; 0 for an empty completion."""
        return self.total / self.length.clamp(min=1)


@dataclass(frozen=True)
class ViewLogps:
    """Log-probabilities of one more completion of each row, under a prompt of its own: see `rows.View`."""

    policy: CompletionLogps
    reference: CompletionLogps | None

    def log_ratio(self) -> Float[Tensor, " row"]:
        """Return log π − log π_ref, summed over tokens, nats.

        Raises:
            ValueError: there are no reference log-probabilities.

        """
        if self.reference is None:
            raise ValueError("ViewLogps.log_ratio: the reference log-probabilities are missing")
        return self.policy.total - self.reference.total


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of a batch of pairs under policy and reference. Row i is pair i in every field.

    The reference fields are `None` for a loss that needs no reference. `win_prob` is the probability that chosen
    is better (1 where the judge gave a plain label); `weight` scales each row's loss in the trainer, not in the
    loss. `views` holds by name what a loss asks for beside the two sides. A side that a row does not have is an empty
    row: nothing of it is in the mask.
    """

    policy_chosen: CompletionLogps
    policy_rejected: CompletionLogps
    reference_chosen: CompletionLogps | None
    reference_rejected: CompletionLogps | None
    win_prob: Float[Tensor, " row"]
    weight: Float[Tensor, " row"]
    views: Mapping[str, ViewLogps] = field(default_factory=dict)

    def log_ratios(self) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
        """Return log π − log π_ref of (chosen, rejected), summed over tokens, nats.

        Raises:
            ValueError: there are no reference log-probabilities.

        """
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ValueError("PairLogps.log_ratios: the reference log-probabilities are missing")
        chosen = self.policy_chosen.total - self.reference_chosen.total
        rejected = self.policy_rejected.total - self.reference_rejected.total
        return chosen, rejected


@dataclass(frozen=True)
class LossOutput:
    """One loss value for each row; rewards are detached and only reported. The trainer takes the mean."""

    loss: Float[Tensor, " row"]
    chosen_reward: Float[Tensor, " row"]
    rejected_reward: Float[Tensor, " row"]
    extra: dict[str, Float[Tensor, " row"]] = field(default_factory=dict)
