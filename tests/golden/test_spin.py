"""SPIN: the authors' loss written out, where it stands still, and the direction in which it sets out."""

import math

import pytest
import torch

from prefloop.components import build_parts
from prefloop.launch import read_recipe
from prefloop.losses.dpo import DPO
from prefloop.losses.hinge import Hinge
from prefloop.recipe import for_round
from prefloop.rows import TokenizedPair
from prefloop.tensors import CompletionLogps, PairLogps
from prefloop.train.batches import pair_logps
from prefloop.train.reference import score_reference
from tiny import tiny_model

LAMBDA = 0.3


def side(totals: torch.Tensor) -> CompletionLogps:
    return CompletionLogps(totals[:, None], torch.ones(len(totals), 1, dtype=torch.bool))


def pairs(human: torch.Tensor, own: torch.Tensor, human_before: torch.Tensor, own_before: torch.Tensor) -> PairLogps:
    ones = torch.ones(len(human), dtype=torch.float64)
    return PairLogps(side(human), side(own), side(human_before), side(own_before), ones, ones)


def random_pairs(rows: int = 50) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(-20 * torch.rand(4, rows, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize(("loss", "of"), [(DPO(LAMBDA), "sigmoid"), (Hinge(LAMBDA), "hinge")])
def test_the_loss_is_the_authors_with_beta_in_the_place_of_lambda(loss, of):
    human, own, human_before, own_before = random_pairs()
    u = LAMBDA * ((human - human_before) - (own - own_before))
    expected = torch.log1p(torch.exp(-u)) if of == "sigmoid" else torch.relu(1 - u)
    torch.testing.assert_close(loss(pairs(human, own, human_before, own_before)).loss, expected)


def test_the_hinge_is_0_with_no_gradient_from_u_1_on():
    human = torch.tensor([0.0, 9.99, 10.0, 10.01, 1e3], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(5, dtype=torch.float64)
    loss = Hinge(beta=0.1)(pairs(human, zero, zero, zero)).loss
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([1.0, 0.001, 0, 0, 0], dtype=torch.float64))
    assert human.grad[:2].tolist() == pytest.approx([-0.1, -0.1])
    assert human.grad[3:].tolist() == [0.0, 0.0]


def test_the_same_text_on_both_sides_is_ln_2_and_moves_nothing():
    """Through a model: the pair builder makes no such pair, and the loss would learn nothing from one."""
    model, other = tiny_model("llama").requires_grad_(True), tiny_model("llama", seed=1)
    same = TokenizedPair("p", (5, 6), (7, 8, 2), (7, 8, 2), None, None, None, 1.0)
    different = TokenizedPair("q", (5, 6), (7, 8, 2), (9, 2), None, None, None, 1.0)
    norms = []
    for pair in (same, different):
        model.zero_grad()
        logps = pair_logps(model, score_reference(other, [pair], "padded", 100), layout="padded")
        loss = DPO(beta=5.0)(logps).loss
        loss.sum().backward()
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)))
        if pair is same:
            assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert norms[0] < 1e-6 * norms[1]


ANSWERS = 5


def expected_gradient(data: torch.Tensor, before: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The gradient of the mean loss over every pair (human ~ data, own ~ before), each with its probability."""
    logits = logits.clone().requires_grad_(True)
    logp, logp_before = logits.log_softmax(0), before.log()
    i, j = torch.cartesian_prod(torch.arange(ANSWERS), torch.arange(ANSWERS)).T
    loss = DPO(LAMBDA)(pairs(logp[i], logp[j], logp_before[i], logp_before[j])).loss
    return torch.autograd.grad((data[i] * before[j] * loss).sum(), logits)[0]


def distribution(seed: int) -> torch.Tensor:
    return torch.randn(ANSWERS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(0)


@pytest.mark.parametrize("seed", range(3))
def test_a_policy_that_writes_as_people_do_stands_still(seed):
    """Human and own answers are then exchangeable: the fixed point of the paper's theorem."""
    data = distribution(seed)
    assert expected_gradient(data, data, data.log()).abs().max() < 1e-15
    assert expected_gradient(data, data, (0.9 * data.log())).abs().max() > 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_a_round_sets_out_towards_what_people_write(seed):
    """At the round's start −dL/dlogits is λ/2 · (p_data − p_t), by hand: σ(0) = ½ for every pair."""
    data, before = distribution(seed), distribution(seed + 10)
    torch.testing.assert_close(-expected_gradient(data, before, before.log()), LAMBDA / 2 * (data - before))


def test_the_recipe_has_the_authors_settings_by_round():
    recipe, _ = read_recipe("spin", ["policy=p", "prompts=q", "judge=lexicon"])
    rounds = [for_round(recipe, number) for number in range(recipe.rounds)]
    assert [build_parts(its).loss.beta for its in rounds] == [0.1, 0.1, 0.1, 5.0]
    assert [its.train.learning_rate for its in rounds] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert {(its.train.schedule, its.train.warmup, its.train.pairs_per_step) for its in rounds} == {("linear", 0.1, 64)}
    assert {(its.prompts_per_round, its.replay, its.reference) for its in rounds} == {(50_000, 1, "previous")}
