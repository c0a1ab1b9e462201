"""KTO and unpaired APO-zero: values by hand, slopes against finite differences, and what z₀ does."""

import math
from dataclasses import replace

import pytest
import torch

from prefloop.errors import ConfigError
from prefloop.losses.apo_zero import APOZero
from prefloop.losses.apo_zero_unpaired import APOZeroUnpaired
from prefloop.losses.kto import KTO
from prefloop.losses.mixture import Mixture
from prefloop.losses.sft import SFT
from prefloop.tensors import CompletionLogps, PairLogps, ViewLogps

BETA = 0.4


def logps(totals, present=None):
    """Completions of two tokens whose log-probs add up to `totals`; where not present, a row without tokens."""
    totals = torch.as_tensor(totals, dtype=torch.float64)
    here = torch.ones(len(totals)) if present is None else torch.tensor(present)
    return CompletionLogps(totals[:, None].expand(-1, 2) / 2, here.bool()[:, None].expand(-1, 2))


def rows(good, bad, mismatched):
    """Rows of one side: first the good completions, then the bad ones, given as log-ratios; the reference is at −7."""
    count = len(good) + len(bad)
    is_good = [1] * len(good) + [0] * len(bad)
    is_bad = [1 - value for value in is_good]
    ratios = torch.cat([torch.as_tensor(part, dtype=torch.float64) for part in (good, bad)])
    at = torch.full((count,), -7.0, dtype=torch.float64)
    view = ViewLogps(logps(torch.as_tensor(mismatched, dtype=torch.float64) - 7), logps(at))
    sides = (logps(ratios - 7, is_good), logps(ratios - 7, is_bad), logps(at, is_good), logps(at, is_bad))
    ones = torch.ones(count, dtype=torch.float64)
    return PairLogps(*sides, ones, ones, {"mismatched": view})


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def test_values_by_hand():
    """z₀ = max(0, (1 + 3 − 1)/3) = 1."""
    output = KTO(BETA, 1.5, 0.5)(rows([2.0, -1.0], [0.5], [1.0, 3.0, -1.0]))
    expected = [1.5 * (1 - sigmoid(BETA * 1.0)), 1.5 * (1 - sigmoid(BETA * -2.0)), 0.5 * (1 - sigmoid(BETA * 0.5))]
    assert output.loss.tolist() == pytest.approx(expected, rel=1e-12)
    assert output.extra["z0"].tolist() == pytest.approx([1.0] * 3)
    assert output.chosen_reward.tolist() == pytest.approx([2 * BETA, -BETA, 0])
    assert output.rejected_reward.tolist() == pytest.approx([0, 0, 0.5 * BETA])


def test_at_the_reference_a_completion_costs_half_its_weight():
    output = KTO(BETA, 1.5, 0.5)(rows([0.0], [0.0], [0.0, 0.0]))
    assert output.loss.tolist() == pytest.approx([0.75, 0.25])


def test_a_negative_estimate_counts_as_zero_and_kto_is_then_unpaired_apo_zero():
    below = rows([2.0, -1.0], [0.5, 1.5], [-1.0, -3.0, 1.0, 0.0])
    assert KTO(BETA)(below).extra["z0"].tolist() == [0.0] * 4
    torch.testing.assert_close(KTO(BETA, 1.2, 0.9)(below).loss, APOZeroUnpaired(BETA, 1.2, 0.9)(below).loss)
    above = replace(below, views=rows([2.0, -1.0], [0.5, 1.5], [1.0, 3.0, 1.0, 0.0]).views)
    assert (KTO(BETA)(above).loss - KTO(BETA)(below).loss).abs().min() > 1e-3


def value(loss, good, bad, mismatched):
    return loss(rows(good, bad, mismatched)).loss


@pytest.mark.parametrize("loss", [KTO(BETA, 1.3, 0.7), APOZeroUnpaired(BETA, 1.3, 0.7)], ids=repr)
@pytest.mark.parametrize("at", [-2.0, 0.3, 4.0])
def test_slopes_equal_finite_differences_and_push_good_up_and_bad_down(loss, at):
    good, bad = (torch.tensor([at], dtype=torch.float64, requires_grad=True) for _ in range(2))
    value(loss, good, bad, [1.0, 2.0]).sum().backward()
    step = 1e-6
    for place, found in enumerate((good.grad, bad.grad)):
        moved = [[at + sign * step * (side == place) for side in range(2)] for sign in (1, -1)]
        up, down = (value(loss, [g], [b], [1.0, 2.0]).sum().item() for g, b in moved)
        assert found.item() == pytest.approx((up - down) / (2 * step), rel=1e-6)
    assert good.grad < 0 < bad.grad


def test_no_gradient_reaches_the_mismatched_completions():
    mismatched = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    good = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    value(KTO(BETA), good, [0.1], mismatched).sum().backward()
    assert mismatched.grad is None or not mismatched.grad.any()
    assert good.grad.any()


def test_the_absent_side_of_a_row_gets_no_gradient():
    scored = rows([0.5], [0.1], [1.0, 2.0])
    tokens = [s.token_logps.clone().requires_grad_(True) for s in (scored.policy_chosen, scored.policy_rejected)]
    sides = zip(tokens, (scored.policy_chosen, scored.policy_rejected), strict=True)
    chosen, rejected = (CompletionLogps(t, s.mask) for t, s in sides)
    KTO(BETA)(replace(scored, policy_chosen=chosen, policy_rejected=rejected)).loss.sum().backward()
    assert [bool(row.any()) for row in tokens[0].grad] == [True, False]
    assert [bool(row.any()) for row in tokens[1].grad] == [False, True]


def test_a_pair_has_the_terms_of_both_its_sides():
    pair = PairLogps(*(logps([t]) for t in (-6.0, -8.0, -7.0, -7.5)), torch.ones(1), torch.ones(1))
    torch.testing.assert_close(APOZeroUnpaired(BETA)(pair).loss, APOZero(BETA)(pair).loss)


def test_a_constant_on_every_log_ratio_moves_kto_only_as_far_as_it_is_not_in_z0():
    """z₀ takes it away where it is positive: then KTO sees no constant; unpaired APO-zero always does."""
    before, after = ([2.0, -1.0], [0.5], [1.0, 3.0, 2.0]), ([3.0, 0.0], [1.5], [2.0, 4.0, 3.0])
    torch.testing.assert_close(value(KTO(BETA), *before), value(KTO(BETA), *after))
    assert (value(APOZeroUnpaired(BETA), *before) - value(APOZeroUnpaired(BETA), *after)).abs().min() > 1e-2


def test_a_mixture_of_unpaired_losses_reads_the_view_and_stays_unpaired():
    mixture = Mixture(({"kind": "kto", "beta": BETA}, {"kind": "sft", "weight": 0.5}))
    assert (mixture.consumes, mixture.views, mixture.couples_rows) == ("unpaired", ("mismatched",), True)
    data = rows([2.0], [0.5], [1.0, 3.0])
    torch.testing.assert_close(mixture(data).loss, KTO(BETA)(data).loss + 0.5 * SFT()(data).loss)


@pytest.mark.parametrize("loss", [KTO, APOZeroUnpaired])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 0.0}, "beta .*> 0"),
        ({"beta": math.inf}, "beta .*> 0"),
        ({"lambda_d": -0.1}, "lambda_d .*≥ 0"),
        ({"lambda_u": math.nan}, "lambda_u .*≥ 0"),
        ({"lambda_d": 0.0, "lambda_u": 0.0}, "lambda_d .*> 0 where lambda_u is 0"),
    ],
)
def test_impossible_settings_are_refused(loss, settings, words):
    with pytest.raises(ConfigError, match=words) as refused:
        loss(**settings)
    assert f"losses/{loss.__module__.rpartition('.')[2]}.py" in str(refused.value)
