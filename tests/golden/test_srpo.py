"""SRPO: the values of the method card, its limits, and its optimum in a world of five answers."""

import pytest
import torch

from prefloop.errors import ConfigError
from prefloop.losses.srpo import SRPO, VIEWS
from prefloop.tensors import CompletionLogps, PairLogps, ViewLogps

ONE = torch.ones(1, dtype=torch.float64)


def ratio(policy: torch.Tensor, reference: torch.Tensor | float = 0.0) -> ViewLogps:
    mask = torch.ones(policy.shape[0], 1, dtype=torch.bool)
    reference = torch.as_tensor(reference, dtype=torch.float64).expand(policy.shape[0])
    return ViewLogps(CompletionLogps(policy[:, None], mask), CompletionLogps(reference[:, None], mask))


def rows(chosen, rejected, *views) -> PairLogps:
    """Pairs with these log-ratios; `views` in the order of VIEWS."""
    first, second, *others = [
        ratio(torch.as_tensor(v, dtype=torch.float64).reshape(-1)) for v in (chosen, rejected, *views)
    ]
    weight = torch.ones(first.policy.mask.shape[0], dtype=torch.float64)
    return PairLogps(
        first.policy,
        second.policy,
        first.reference,
        second.reference,
        weight,
        weight,
        dict(zip(VIEWS, others, strict=True)),
    )


def card() -> PairLogps:
    """ρ(w|l) = .8, ρ(l|l) = .1, ρ(w|w) = .3, ρ(l|w) = −.4."""
    return rows(1.0, -0.5, 0.8, 0.1, 0.3, -0.4)


def test_values_of_the_card():
    found = SRPO(beta=0.1, alpha=0.8)(card())
    assert found.extra["revision_loss"].item() == pytest.approx(0.3698, abs=1e-10)
    assert found.extra["joint_loss"].item() == pytest.approx(0.5329, abs=1e-10)
    assert found.loss.item() == pytest.approx(0.40242, abs=1e-10)
    halved = SRPO(beta=0.1, alpha=1.0, revision_terms="mean")(card()).loss.item()
    assert halved == pytest.approx(0.3698 / 2, abs=1e-10)


def test_at_the_reference():
    zero = rows(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    for alpha in (0.0, 0.3, 1.0):
        assert SRPO(alpha=alpha)(zero).loss.item() == pytest.approx(1 - alpha / 2, abs=1e-12)


def test_a_policy_that_ignores_the_draft_has_ipos_residuals():
    good, bad, beta = 1.0, -0.5, 0.1
    found = SRPO(beta=beta)(rows(good, bad, good, bad, good, bad))
    margin = good - bad
    assert found.extra["joint_loss"].item() == pytest.approx(4 * beta**2 * (margin - 1 / (2 * beta)) ** 2)
    assert found.extra["revision_loss"].item() == pytest.approx(2 * (0.5 - beta * margin) ** 2)


def test_with_alpha_1_drafts_take_no_gradient():
    values = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    logps = card()
    chosen = CompletionLogps(values[:, None], logps.policy_chosen.mask)
    logps = PairLogps(
        chosen, logps.policy_rejected, logps.reference_chosen, logps.reference_rejected, ONE, ONE, logps.views
    )
    SRPO(alpha=1.0)(logps).loss.sum().backward()
    assert values.grad.item() == 0


def expected_loss(draft: torch.Tensor, revise: torch.Tensor, wins: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Mean loss where answers i, j are compared with probability pairs[i, j] and i wins with wins[i, j]."""
    r, rho = draft, revise  # log-ratios to the reference: [answer], [draft, answer]
    loss = SRPO(beta=BETA, alpha=0.6)
    i, j = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    views = {"chosen_given_rejected": rho[j, i], "rejected_given_rejected": rho[j, j]}
    views |= {"chosen_given_chosen": rho[i, i], "rejected_given_chosen": rho[i, j]}
    made = rows(r[i], r[j], *(views[name] for name in VIEWS))
    return (loss(made).loss * (pairs[i, j] * wins[i, j])).sum()


BETA = 0.4


@pytest.mark.parametrize("seed", [0, 1])
def test_the_closed_form_optimum_is_stationary_whatever_pairs_are_asked(seed):
    draw = torch.Generator().manual_seed(seed)
    raw = torch.rand(5, 5, generator=draw, dtype=torch.float64)
    wins = raw / (raw + raw.T)  # P(i ≻ j), not transitive, P(i ≻ i) = ½
    reference = torch.rand(5, generator=draw, dtype=torch.float64).log_softmax(0)
    # π†*(y2|y1) ∝ π_ref(y2) exp(P(y2 ≻ y1)/β);  π*(y) ∝ π_ref(y)/Z(y)
    tilted = reference[None, :] + wins.T / BETA
    partition = tilted.logsumexp(1)
    revise = (tilted - partition[:, None]).requires_grad_(True)
    drafts = (reference - partition).log_softmax(0).requires_grad_(True)
    for sampling in (
        torch.full((5, 5), 0.04, dtype=torch.float64),
        torch.outer(*torch.rand(2, 5, generator=draw).double()),
    ):
        pairs = sampling + sampling.T
        loss = expected_loss(drafts.log_softmax(0) - reference, revise.log_softmax(1) - reference[None, :], wins, pairs)
        for gradient in torch.autograd.grad(loss, [drafts, revise]):
            assert gradient.abs().max() < 1e-12
    off = (drafts.detach() + torch.linspace(0, 1, 5, dtype=torch.float64)).requires_grad_(True)
    loss = expected_loss(off.log_softmax(0) - reference, revise.log_softmax(1) - reference[None, :], wins, pairs)
    assert torch.autograd.grad(loss, off)[0].abs().max() > 1e-3


@pytest.mark.parametrize("bad", [{"beta": 0.0}, {"alpha": 1.5}, {"alpha": -0.1}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ConfigError, match=rf"loss\.{next(iter(bad))}"):
        SRPO(**bad)
