"""The world of nine answers: its optima are what their papers say, and training reaches them."""

import pytest
import torch

from benchmarks.claims.__main__ import find_claims
from benchmarks.claims.engine.tabular import (
    BETA,
    CASES,
    EVEN,
    Case,
    World,
    by_slope,
    distance,
    moved_by_other_pairs,
    tilted,
    train,
    way_covered,
)
from prefloop.losses.dpo import DPO


def test_worlds_are_drawn_by_the_seed_and_preferences_are_probabilities():
    world = World(3)
    assert torch.equal(world.reference, World(3).reference)
    assert not torch.equal(world.reference, World(4).reference)
    assert float(world.reference.sum(-1).exp().sum()) == pytest.approx(1)
    for wins in (world.wins, world.wins_by_reward):
        torch.testing.assert_close(wins + wins.T, torch.ones_like(wins))
    assert float(world.uneven.sum()) == pytest.approx(1)
    better = (world.wins > 0.5).to(torch.float64)
    assert float(torch.trace(better @ better @ better)) > 0  # cycles of three


@pytest.mark.parametrize("arm", CASES)
def test_training_arrives_at_the_optimum(arm):
    assert way_covered(arm, 7) > 99.99


def test_a_loss_of_another_beta_does_not_arrive():
    """The measure tells: nine tenths of the way or less where β is wrong."""
    world = World(7)
    learned = train(DPO(beta=2 * BETA), world, world.wins_by_reward)
    optimum = CASES["DPO"].optimum(world)
    assert distance(learned.draft, optimum) > 1
    wrong_labels = Case(DPO(beta=BETA), CASES["DPO"].optimum, flipped=0.2)
    assert distance(train(wrong_labels.loss, world, wrong_labels.wins(world)).draft, optimum) > 1


def test_the_regularised_reward_is_greatest_at_the_optima():
    """E_π r − β·D(π, π_ref) falls in every direction from the closed forms: reverse KL (DPO), forward KL (f-DPO)."""
    world = World(5)
    reference = world.reference.sum(-1)

    def reverse(logp: torch.Tensor) -> float:
        return float((logp.exp() * (world.rewards - BETA * (logp - reference))).sum())

    def forward(logp: torch.Tensor) -> float:
        return float((logp.exp() * world.rewards - BETA * reference.exp() * (reference - logp)).sum())

    stream = torch.Generator().manual_seed(0)
    for name, value in (("DPO", reverse), ("f-DPO", forward)):
        best = CASES[name].optimum(world)
        assert float(best.exp().sum()) == pytest.approx(1)
        for _ in range(20):
            step = 0.1 * torch.randn(9, generator=stream, dtype=torch.float64)
            assert value(tilted(best, step)) < value(best)
    ratio_of_reverse = by_slope(reference, world.rewards / BETA, lambda slope: (slope - 1).exp())
    torch.testing.assert_close(ratio_of_reverse, CASES["DPO"].optimum(world))


def test_ipo_without_cycles_of_equal_pairs_is_its_papers_optimum():
    """arXiv 2310.12036: π* ∝ π_ref·e^(E_μ P(y beats y')/β), μ the uniform policy; the loss is least there."""
    world, case = World(2), CASES["IPO"]
    optimum = case.optimum(world)
    reference = world.reference.sum(-1)
    target = (2 * world.wins - 1) / (2 * BETA)
    gap = (optimum - reference)[:, None] - (optimum - reference)[None, :]
    gradient = (EVEN * (gap - target)).fill_diagonal_(0.0).sum(1)
    assert float(gradient.abs().max()) < 1e-12


def test_other_pairs_move_dpo_and_ipo_but_not_srpo():
    assert moved_by_other_pairs("SRPO", 7) < 0.001
    assert min(moved_by_other_pairs(arm, 7) for arm in ("IPO", "DPO")) > 0.5


def test_the_claims_name_cases():
    for name in ("exact_optima", "srpo_any_pairs"):
        claim = find_claims()[name]
        assert {arm.name for arm in claim.arms} <= set(CASES)
    assert len(find_claims()["exact_optima"].arms) == len(CASES)
