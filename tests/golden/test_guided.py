"""gDPO: the value of the method card, and its limits."""

import math
from dataclasses import replace

import pytest
import torch

from prefloop.losses.dpo import DPO
from prefloop.losses.guided import Guided
from prefloop.losses.sft import SFT
from prefloop.tensors import CompletionLogps, PairLogps, ViewLogps


def logps(total: float, length: int = 1) -> CompletionLogps:
    values = torch.full((1, length), total / length, dtype=torch.float64, requires_grad=True)
    return CompletionLogps(values, torch.ones(1, length, dtype=torch.bool))


def pair(cross_entropy: float = 2.3) -> PairLogps:
    """The card's common input: r_w = 1, r_l = −0.5."""
    gold = ViewLogps(logps(-5 * cross_entropy, 5), None)
    one = torch.ones(1, dtype=torch.float64)
    return PairLogps(logps(-10), logps(-12), logps(-11), logps(-11.5), one, one, {"gold": gold})


def test_value_of_the_card():
    assert Guided(beta=0.1, gold_weight=0.1)(pair()).loss.item() == pytest.approx(0.8509570478, abs=1e-10)


def test_at_the_reference_the_loss_is_ln_2_and_the_cross_entropy():
    same = replace(pair(), policy_chosen=logps(-11), policy_rejected=logps(-11.5))
    assert Guided()(same).loss.item() == pytest.approx(math.log(2) + 0.1 * 2.3, abs=1e-12)


def test_without_weight_it_is_dpo_and_without_a_difference_sft_on_the_ground_truth():
    dpo, guided = DPO(beta=0.1)(pair()).loss, Guided(beta=0.1, gold_weight=0)(pair()).loss
    assert guided.item() == pytest.approx(dpo.item(), abs=1e-12)
    one = pair()
    Guided(beta=1e-9, gold_weight=1.0)(one).loss.sum().backward()
    gold = pair()
    SFT()(replace(gold, policy_chosen=gold.views["gold"].policy)).loss.sum().backward()
    expected = gold.views["gold"].policy.token_logps.grad
    torch.testing.assert_close(one.views["gold"].policy.token_logps.grad, expected)
    assert one.policy_chosen.token_logps.grad.abs().max() < 1e-8
