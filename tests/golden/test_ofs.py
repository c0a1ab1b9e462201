"""OFS-DPO's values and identities of the method card, sections 5 and 11."""

import math

import pytest
import torch

from prefloop.losses.dpo import DPO
from prefloop.losses.hinge import Hinge
from prefloop.tensors import CompletionLogps, PairLogps
from prefloop.train.fast_slow import FastSlow, chase, objectives

REFERENCE = (-11.0, -11.5)


def side(total: torch.Tensor) -> CompletionLogps:
    """Two tokens that sum to `total`."""
    tokens = torch.stack([0.25 * total, 0.75 * total], dim=-1)
    return CompletionLogps(tokens, torch.ones_like(tokens, dtype=torch.bool))


def module(margin: torch.Tensor | float, chosen: float = 1.0) -> PairLogps:
    """A module whose log-ratio of chosen is `chosen` and whose margin against the reference is `margin`."""
    margin = torch.as_tensor(margin, dtype=torch.float64).reshape(-1)
    zeros, ones = torch.zeros_like(margin), torch.ones_like(margin)
    return PairLogps(
        policy_chosen=side(zeros + REFERENCE[0] + chosen),
        policy_rejected=side(REFERENCE[1] + chosen - margin),
        reference_chosen=side(zeros + REFERENCE[0]),
        reference_rejected=side(zeros + REFERENCE[1]),
        win_prob=ones,
        weight=ones,
    )


def values(fast: float, slow: float, beta: float = 0.1, **settings: float | None) -> tuple[float, float, float]:
    """L_FS, J_F and J_S."""
    found = objectives(FastSlow(**settings), DPO(beta=beta), module(fast), module(slow, chosen=-0.3))
    return found.chase.item(), found.fast.item(), found.slow.item()


def test_the_cards_values():
    assert values(1.5, 0.5, chase=0.3) == pytest.approx((0.6443966601, 0.8142760458, 0.4751406500), abs=1e-10)
    assert values(1.5, 0.5, chase=0.3, clamp=None) == pytest.approx((0.6443966601, 0.8142760458, 0.4751406500))


def test_the_cards_base_loss_and_its_derivative():
    margin = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    found = objectives(FastSlow(chase=0.0), DPO(beta=0.1), module(margin), module(0.5))
    assert found.fast.item() == pytest.approx(0.6209570478, abs=1e-10)
    assert torch.autograd.grad(found.fast.sum(), margin)[0].item() == pytest.approx(-0.0462570155, abs=1e-10)


def test_equal_modules_chase_at_ln_2():
    for margin in (-3.0, 0.0, 40.0):
        assert values(margin, margin)[0] == pytest.approx(math.log(2))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(("fast", "slow"), [(0.0, 0.0), (1.5, 0.5), (-2.0, 3.0), (8.0, 8.0), (30.0, 30.0), (4.0, -4.0)])
@pytest.mark.parametrize("weight", [0.1, 0.3, 2.0])
def test_both_modules_get_the_same_extra_push(fast, slow, weight):
    """∂J_F/∂Δ_F + σ(−Δ_F) = ∂J_S/∂Δ_S + σ(−Δ_S) = −α σ(Δ_S − Δ_F), β = 1, by finite differences."""
    game, step = {"beta": 1.0, "chase": weight}, 1e-5
    by_fast = (values(fast + step, slow, **game)[1] - values(fast - step, slow, **game)[1]) / (2 * step)
    by_slow = (values(fast, slow + step, **game)[2] - values(fast, slow - step, **game)[2]) / (2 * step)
    expected = -weight * sigmoid(slow - fast)
    assert by_fast + sigmoid(-fast) == pytest.approx(expected, abs=1e-8)
    assert by_slow + sigmoid(-slow) == pytest.approx(expected, abs=1e-8)
    if fast == slow:
        assert by_fast + sigmoid(-fast) == pytest.approx(-weight / 2, abs=1e-8)


def test_the_push_stays_where_dpos_gradient_has_vanished():
    margin = torch.tensor([60.0], dtype=torch.float64, requires_grad=True)
    found = objectives(FastSlow(chase=0.3), DPO(beta=1.0), module(margin), module(60.0))
    assert torch.autograd.grad(found.base_fast.loss.sum(), margin, retain_graph=True)[0].abs().item() < 1e-25
    assert torch.autograd.grad(found.fast.sum(), margin)[0].item() == pytest.approx(-0.15)


def test_the_gradient_is_that_of_the_objective():
    def objective(name: str, fast: torch.Tensor, slow: torch.Tensor) -> torch.Tensor:
        return getattr(objectives(FastSlow(chase=0.7), DPO(beta=0.5), module(fast), module(slow)), name)

    fixed = torch.tensor([0.5, -3.0, 2.0], dtype=torch.float64)
    moved = torch.tensor([1.5, 2.0, -1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: objective("fast", x, fixed), moved)
    assert torch.autograd.gradcheck(lambda x: objective("slow", fixed, x), moved)


def test_each_side_takes_the_other_as_given():
    fast = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    slow = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    found = objectives(FastSlow(chase=0.3), DPO(), module(fast), module(slow))
    for objective, own, other in ((found.fast, fast, slow), (found.slow, slow, fast)):
        gradient = torch.autograd.grad(objective.sum(), [own, other], allow_unused=True, retain_graph=True)
        assert gradient[0].item() != 0
        assert gradient[1] is None


@pytest.mark.parametrize(("slow", "least"), [(50.0, -15.0), (500.0, -150.0)])
def test_the_slow_objective_has_no_lower_bound_without_the_clamp(slow, least):
    assert values(0.0, slow, beta=1.0, chase=0.3, clamp=None)[2] == pytest.approx(least, abs=1e-9)
    # L_DPO(S) is 0 here; the chase is held at −log σ(−10).
    assert values(0.0, slow, beta=1.0, chase=0.3)[2] == pytest.approx(-0.3 * math.log1p(math.exp(10)), abs=1e-9)


@pytest.mark.parametrize(("slow", "moves"), [(-9.9, True), (-10.1, False), (9.9, True), (10.1, False)])
def test_beyond_the_clamp_the_chase_has_a_value_and_no_gradient(slow, moves):
    fast = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    found = chase(DPO(beta=1.0), module(fast), module(slow), 10.0)
    assert found.item() == pytest.approx(math.log1p(math.exp(-max(-10.0, min(10.0, -slow)))), abs=1e-9)
    if moves:
        assert torch.autograd.grad(found.sum(), fast)[0].item() == pytest.approx(-sigmoid(slow))
    else:
        assert not torch.autograd.grad(found.sum(), fast)[0].any()


def test_another_loss_takes_the_place_of_the_logistic_one():
    found = objectives(FastSlow(chase=0.3), Hinge(beta=0.1), module(1.5), module(0.5))
    assert found.chase.item() == pytest.approx(1 - 0.1 * (1.5 - 0.5))
    assert found.fast.item() == pytest.approx(0.85 + 0.3 * 0.9)
    assert found.slow.item() == pytest.approx(0.95 - 0.3 * 0.9)
