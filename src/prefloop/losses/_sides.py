"""Losses on completions one by one: a row has the terms of the sides that it has. Not a loss: no `kind` names this."""

from jaxtyping import Float
from torch import Tensor

from prefloop.tensors import CompletionLogps, PairLogps


def present(scored: CompletionLogps) -> Float[Tensor, " row"]:
    """Return 1 for each row that has this completion, 0 for a row whose completion is absent."""
    return scored.mask.any(-1).to(scored.token_logps.dtype)


def sum_of_sides(
    logps: PairLogps, of_chosen: Float[Tensor, " row"], of_rejected: Float[Tensor, " row"]
) -> Float[Tensor, " row"]:
    """Return the sum of the terms of the sides that each row has: one term for an unpaired row, two for a pair."""
    return of_chosen * present(logps.policy_chosen) + of_rejected * present(logps.policy_rejected)
