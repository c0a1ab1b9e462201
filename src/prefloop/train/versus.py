"""The log-probs of one model beside those of another that takes the reference's place."""

from dataclasses import replace

from prefloop.tensors import CompletionLogps, PairLogps, ViewLogps


def versus(policy: PairLogps, reference: PairLogps) -> PairLogps:
    """Return `policy` with the policy side of `reference`, the same rows of another model, as its reference."""
    return replace(
        policy,
        reference_chosen=reference.policy_chosen,
        reference_rejected=reference.policy_rejected,
        views={name: ViewLogps(view.policy, reference.views[name].policy) for name, view in policy.views.items()},
    )


def taken_as_given(logps: PairLogps) -> PairLogps:
    """Return the same numbers, through whose policy side no gradient flows."""
    return replace(
        logps,
        policy_chosen=_constant(logps.policy_chosen),
        policy_rejected=_constant(logps.policy_rejected),
        views={name: ViewLogps(_constant(view.policy), view.reference) for name, view in logps.views.items()},
    )


def _constant(logps: CompletionLogps) -> CompletionLogps:
    return CompletionLogps(logps.token_logps.detach(), logps.mask)
