"""DNPO's values of the method card, section 11, and the trap of its one-pass objective."""

import pytest
import torch

from prefloop.components import build_parts
from prefloop.launch import read_recipe
from prefloop.losses.dpo import DPO
from prefloop.losses.hinge import Hinge
from prefloop.recipe import for_round
from prefloop.tensors import CompletionLogps, PairLogps
from prefloop.train.noise_game import model_loss, noise_loss


def side(*values: float, grad: bool = False) -> CompletionLogps:
    tokens = torch.tensor([values], dtype=torch.float64, requires_grad=grad)
    return CompletionLogps(tokens, torch.ones(1, len(values), dtype=torch.bool))


def card(grad: bool = False) -> PairLogps:
    """The card's pair: logp(w) −10, logp(l) −12, reference −11 and −11.5."""
    one = torch.ones(1, dtype=torch.float64)
    return PairLogps(side(-4, -6, grad=grad), side(-12, 0, grad=grad), side(-11, 0), side(-6, -5.5), one, one)


def test_noise_that_lowers_the_references_rejected_log_prob_raises_the_loss_to_the_cards_value():
    logps, noisy = card(), side(-6.5, -5.7)
    assert DPO(beta=0.1)(logps).loss.item() == pytest.approx(0.6209570478, abs=1e-10)
    output = model_loss(DPO(beta=0.1), logps, noisy)
    assert output.loss.item() == pytest.approx(0.6539469673, abs=1e-10)
    assert (output.chosen_reward - output.rejected_reward).item() == pytest.approx(0.08)
    assert noise_loss(DPO(beta=0.1), logps, noisy).item() == pytest.approx(-0.6539469673, abs=1e-10)


def test_no_noise_is_spin():
    assert model_loss(DPO(beta=0.1), card(), side(-6, -5.5)).loss.item() == pytest.approx(0.6209570478, abs=1e-10)


def test_another_loss_takes_the_place_of_the_logistic_one():
    assert model_loss(Hinge(beta=0.1), card(), side(-6.5, -5.7)).loss.item() == pytest.approx(1 - 0.08)


def test_each_loss_moves_one_player_only():
    logps, noisy = card(grad=True), side(-6.5, -5.7, grad=True)
    inputs = [logps.policy_chosen.token_logps, logps.policy_rejected.token_logps, noisy.token_logps]
    slope = -0.1 * torch.sigmoid(torch.tensor(-0.08, dtype=torch.float64)).item()  # dℓ/dΔ
    model = torch.autograd.grad(model_loss(DPO(beta=0.1), logps, noisy).loss.sum(), inputs, allow_unused=True)
    noise = torch.autograd.grad(noise_loss(DPO(beta=0.1), logps, noisy).sum(), inputs, allow_unused=True)
    assert model[0].tolist() == [pytest.approx([slope, slope])]
    assert model[1].tolist() == [pytest.approx([-slope, -slope])]
    assert model[2] is None
    assert noise[:2] == (None, None)
    # Descent on the noise's loss lowers log p^noise(y⁻), and so the margin.
    assert noise[2].tolist() == [pytest.approx([-slope, -slope])]


def test_without_the_stop_gradient_the_one_pass_objective_is_its_penalty():
    """With the prime read as "the same noise" both sums cancel, value and gradients: the trap."""
    logps, noisy = card(grad=True), side(-6.5, -5.7, grad=True)
    inputs = [logps.policy_chosen.token_logps, logps.policy_rejected.token_logps, noisy.token_logps]
    with_noise = DPO(beta=0.1)(
        PairLogps(logps.policy_chosen, logps.policy_rejected, side(-11, 0), noisy, *[torch.ones(1)] * 2)
    )
    naive = with_noise.loss.sum() - with_noise.loss.sum()
    assert naive.item() == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(naive, inputs))
    ours = model_loss(DPO(beta=0.1), logps, noisy).loss.sum() + noise_loss(DPO(beta=0.1), logps, noisy).sum()
    assert ours.item() == 0
    assert all(gradient.any() for gradient in torch.autograd.grad(ours, inputs))


def test_the_recipe_warms_up_with_spin_and_goes_on_with_labels_and_noise():
    recipe, _ = read_recipe("dnpo", ["trainer.bound=0.5"])
    made = [build_parts(for_round(recipe, number)) for number in range(recipe.rounds)]
    assert [parts.pair_builder.prefer for parts in made] == ["human", "score", "score", "score"]
    assert [parts.trainer.silent for parts in made] == [True, False, False, False]
    assert {parts.trainer.bound for parts in made} == {0.5}
    assert {parts.loss.beta for parts in made} == {0.1}
