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


def closed_form(wins: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log π_ref [answer]; log-ratios of the optimum: r [answer], ρ [draft, answer]."""
    reference = torch.rand(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(0)
    tilted = reference[None, :] + wins.T / BETA
    partition = tilted.logsumexp(1)
    return reference, (reference - partition).log_softmax(0) - reference, tilted - partition[:, None] - reference


def all_pairs(draft: torch.Tensor, revise: torch.Tensor) -> PairLogps:
    """Every ordered pair of five answers, i as chosen and j as rejected."""
    i, j = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    return rows(draft[i], draft[j], revise[j, i], revise[j, j], revise[i, i], revise[i, j])


def preferences(seed: int) -> torch.Tensor:
    raw = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return raw / (raw + raw.T)  # P(i ≻ j), not transitive, P(i ≻ i) = ½


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_at_the_closed_form_optimum_both_brackets_are_what_the_label_leaves(seed):
    """P − ½ = β[ρ(y2|y1) − ρ(y1|y1)] and 2P − 1 = β[ρ(y2|y1) − ρ(y1|y2) + r(y2) − r(y1)]."""
    wins = preferences(seed)
    _, draft, revise = closed_form(wins, seed)
    found = SRPO(beta=BETA)(all_pairs(draft, revise)).extra
    torch.testing.assert_close(found["revision_loss"], 2 * (1 - wins.flatten()) ** 2, rtol=0, atol=1e-12)
    torch.testing.assert_close(found["joint_loss"], (2 - 2 * wins.flatten()) ** 2, rtol=0, atol=1e-12)


def test_sure_preferences_bring_the_loss_to_0_even_where_they_go_in_a_circle():
    """Every answer beats the two after it and loses to the two before: rock, paper, scissors of five."""
    place = torch.arange(5)
    ahead = (place[None, :] - place[:, None]) % 5
    wins = torch.where(ahead == 0, 0.5, ((ahead == 1) | (ahead == 2)).double())
    _, draft, revise = closed_form(wins, 4)
    loss = SRPO(beta=BETA, alpha=0.6)(all_pairs(draft, revise)).loss.reshape(5, 5)
    assert loss[wins == 1].abs().max() < 1e-24
    assert loss[wins == 0].min() > 1


def test_where_nothing_is_preferred_the_optimum_is_the_reference():
    even = torch.full((5, 5), 0.5, dtype=torch.float64)
    reference, draft, revise = closed_form(even, 3)
    assert draft.abs().max() < 1e-14
    assert revise.abs().max() < 1e-14
    pairs = torch.rand(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drafts, revisions = (torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in ((5,), (5, 5)))

    def loss() -> torch.Tensor:
        log_ratios = (
            (reference + drafts).log_softmax(0) - reference,
            (reference + revisions).log_softmax(1) - reference,
        )
        return expected_loss(*log_ratios, even, pairs + pairs.T)

    least = loss()
    for gradient in torch.autograd.grad(least, [drafts, revisions]):
        assert gradient.abs().max() < 1e-15
    with torch.no_grad():  # a minimum, not only a stationary point
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            drafts.copy_(torch.randn(5, generator=generator))
            revisions.copy_(torch.randn(5, 5, generator=generator))
            assert loss() > least


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
