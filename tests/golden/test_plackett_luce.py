"""Plackett-Luce DPO against enumeration, DPO, and the logits of a tabular policy."""

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch

from prefloop.errors import ConfigError
from prefloop.losses.dpo import DPO
from prefloop.losses.plackett_luce import PlackettLuce
from prefloop.tensors import CompletionLogps, PairLogps, ViewLogps

BETA = 0.7
RATIOS = (1.2, -0.4, 0.3, -2.0, 0.9)


def scored(totals):
    totals = torch.as_tensor(totals, dtype=torch.float64)
    return CompletionLogps(totals[:, None], torch.ones(len(totals), 1, dtype=torch.bool))


def ranking(ratios):
    """Rows of log-ratios, one for each place, the best first; the reference of place k is at −(5 + k)."""
    columns = torch.as_tensor(ratios, dtype=torch.float64).T
    reference = [torch.full_like(column, -5.0 - place) for place, column in enumerate(columns)]
    policy = [scored(column + stored) for column, stored in zip(columns, reference, strict=True)]
    stored = [scored(values) for values in reference]
    ones = torch.ones(columns.shape[1], dtype=torch.float64)
    names = [f"rank_{place}" for place in range(3, len(columns) + 1)]
    views = {name: ViewLogps(*pair) for name, pair in zip(names, zip(policy[2:], stored[2:], strict=True), strict=True)}
    return PairLogps(policy[0], policy[1], stored[0], stored[1], ones, ones, views)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_the_probabilities_of_all_rankings_add_up_to_one(count):
    every = ranking(list(permutations(RATIOS[:count])))
    assert PlackettLuce(BETA, count)(every).loss.neg().exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_two_completions_are_dpo():
    draw = torch.Generator().manual_seed(0)
    ratios = 3 * torch.randn(200, 2, generator=draw, dtype=torch.float64)
    found = []
    for loss in (PlackettLuce(BETA, 2), DPO(BETA)):
        leaf = ratios.clone().requires_grad_(True)
        output = loss(ranking(leaf))
        output.loss.sum().backward()
        found.append((output.loss, output.chosen_reward, output.rejected_reward, leaf.grad))
    for mine, dpo in zip(*found, strict=True):
        torch.testing.assert_close(mine, dpo, rtol=1e-12, atol=1e-14)
    assert PlackettLuce(BETA, 2).views == ()


def test_three_completions_by_hand():
    """Places a, b, c: −log [e^a/(e^a + e^b + e^c) · e^b/(e^b + e^c)]."""
    a, b, c = (math.exp(BETA * r) for r in (1.0, 0.5, -1.0))
    expected = -math.log(a / (a + b + c) * b / (b + c))
    assert PlackettLuce(BETA, 3)(ranking([[1.0, 0.5, -1.0]])).loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [2, 4])
def test_at_the_reference_every_ranking_is_equally_likely(count):
    loss = PlackettLuce(BETA, count)(ranking([[0.0] * count])).loss.item()
    assert loss == pytest.approx(math.log(math.factorial(count)), rel=1e-12)


def test_a_constant_on_all_places_changes_nothing_and_the_slopes_add_up_to_zero():
    places = torch.tensor([RATIOS], dtype=torch.float64, requires_grad=True)
    loss = PlackettLuce(BETA, 5)
    loss(ranking(places)).loss.sum().backward()
    torch.testing.assert_close(loss(ranking(places + 3)).loss, loss(ranking(places)).loss)
    assert places.grad.sum().item() == pytest.approx(0, abs=1e-12)
    assert places.grad[0, 0] < 0 < places.grad[0, -1]


def test_slopes_equal_finite_differences():
    assert torch.autograd.gradcheck(
        lambda places: PlackettLuce(BETA, 5)(ranking(places)).loss,
        torch.tensor([RATIOS, RATIOS[::-1]], dtype=torch.float64, requires_grad=True),
    )


def test_extreme_rewards_stay_finite():
    loss = PlackettLuce(1.0, 3)(ranking([[1e6, 0.0, -1e6], [-1e6, 0.0, 1e6]])).loss
    torch.testing.assert_close(loss, torch.tensor([0.0, 3e6], dtype=torch.float64))


def test_a_longer_ranking_than_the_loss_reads_gives_the_ranking_of_its_first_places():
    long, short = ranking([RATIOS]), ranking([RATIOS[:3]])
    torch.testing.assert_close(PlackettLuce(BETA, 3)(long).loss, PlackettLuce(BETA, 3)(short).loss)


def test_without_reference_or_with_impossible_settings_it_refuses():
    bare = ranking([RATIOS[:2]])
    with pytest.raises(ValueError, match="reference log-probabilities are missing"):
        PlackettLuce(BETA, 2)(replace(bare, reference_chosen=None, reference_rejected=None))
    with pytest.raises(ConfigError, match=r"losses/plackett_luce\.py.*≥ 2, got 1"):
        PlackettLuce(completions=1)
    with pytest.raises(ConfigError, match=r"beta .*> 0, got 0"):
        PlackettLuce(beta=0)
