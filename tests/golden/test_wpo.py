"""WPO's weights against plain softmax, and what they do."""

import math
from dataclasses import replace

import pytest
import torch

import tiny
from prefloop.losses.dpo import DPO
from prefloop.losses.mixture import Mixture
from prefloop.losses.wpo import WPO
from prefloop.models.head import HeadFacts, target_logps_and_squares
from prefloop.models.logps import TokenGroup, completion_logps
from prefloop.tensors import CompletionLogps, PairLogps

GROUPS = [TokenGroup((5, 6), ((7, 8, 9), (7, 10))), TokenGroup((11,), ((12, 13, 14, 15),))]


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("head_chunk", [None, 1, 37])
def test_squares_are_those_of_the_softmax(layout, head_chunk):
    model = tiny.tiny_model("llama")
    found = completion_logps(model, GROUPS, layout=layout, head_chunk=head_chunk, squares=True)
    assert not found.log_squares.requires_grad
    rows = [(group.context, completion) for group in GROUPS for completion in group.completions]
    for row, (context, completion) in enumerate(rows):
        logits = model(torch.tensor([context + completion])).logits[0, len(context) - 1 : -1]
        expected = logits.softmax(-1).square().sum(-1).log()
        torch.testing.assert_close(found.log_squares[row][: len(completion)], expected, rtol=1e-5, atol=1e-5)
        assert not found.log_squares[row][len(completion) :].any()


def test_without_asking_there_are_none_and_the_log_probs_are_the_same():
    model = tiny.tiny_model("llama")
    plain = completion_logps(model, GROUPS)
    assert plain.log_squares is None
    assert torch.equal(plain.token_logps, completion_logps(model, GROUPS, squares=True).token_logps)


def test_squares_of_a_soft_capped_head():
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(8, 50), torch.randn(5, 8)
    facts = HeadFacts(scale=1.5, softcap=2.0, temperature=0.7)
    _, squares = target_logps_and_squares(hidden, head, torch.arange(5), facts, chunk=64)
    logits = 2 * torch.tanh(head(hidden) * 1.5 / 2) / 0.7
    torch.testing.assert_close(squares, logits.softmax(-1).square().sum(-1).log())


def side(logps, squares):
    values = torch.tensor([logps], dtype=torch.float64)
    mask = torch.ones(1, len(logps), dtype=torch.bool)
    return CompletionLogps(values, mask, torch.tensor([squares], dtype=torch.float64))


def pair(squares=-2.0):
    one = torch.ones(1, dtype=torch.float64)
    reference = [side([-1.0, -1.5], [0, 0]), side([-2.0], [0])]
    return PairLogps(side([-1.0, -2.0], [squares] * 2), side([-3.0], [squares]), *reference, one, one)


def test_the_weight_by_hand_and_where_it_is_cut():
    """w_w = exp((1 + 0)/2), w_l = exp(−1): their product is e^−½; with another alignment it is above 1."""
    dpo = DPO(0.1)(pair()).loss
    assert WPO(0.1)(pair()).loss.item() == pytest.approx(math.exp(-0.5) * dpo.item())
    assert WPO(0.1)(pair(-3.0)).extra["pair_weight"].item() == 1
    assert WPO(0.1, cap=False)(pair(-3.0)).extra["pair_weight"].item() == pytest.approx(math.exp(1.5))


def test_a_uniform_policy_weighs_every_pair_as_one():
    uniform = -math.log(50)
    even = replace(pair(), policy_chosen=side([uniform] * 3, [uniform] * 3), policy_rejected=side([uniform], [uniform]))
    assert WPO(0.1, cap=False)(even).extra["pair_weight"].item() == pytest.approx(1)


def test_the_weight_has_no_gradient():
    scored = pair()
    leaf = scored.policy_chosen.token_logps.clone().requires_grad_(True)
    live = replace(scored, policy_chosen=replace(scored.policy_chosen, token_logps=leaf))
    for loss, factor in ((WPO(0.1), math.exp(-0.5)), (DPO(0.1), 1.0)):
        leaf.grad = None
        loss(live).loss.sum().backward()
        assert leaf.grad[0, 0].item() / factor == pytest.approx(-0.1 / (1 + math.exp(0.1 * 0.5)))


def test_a_mixture_asks_for_what_its_part_reads():
    mixture = Mixture(({"kind": "wpo", "beta": 0.1}, {"kind": "dpo", "beta": 0.1}))
    assert mixture.reads_squares
    assert not Mixture().reads_squares
    torch.testing.assert_close(mixture(pair()).loss, WPO(0.1)(pair()).loss + DPO(0.1)(pair()).loss)


def test_a_trainer_that_does_not_give_squares_is_told():
    scored = pair()
    with pytest.raises(ValueError, match="squared probabilities are missing"):
        WPO()(replace(scored, policy_chosen=replace(scored.policy_chosen, log_squares=None)))
