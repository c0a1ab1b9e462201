"""TSO's dual clip, as read here: golden value of the card, limits, and where the gradient stops."""

import math

import pytest
import torch

from prefloop.errors import ConfigError
from prefloop.losses.dpo import DPO
from prefloop.losses.dual_clip import DualClip
from prefloop.tensors import CompletionLogps, PairLogps

BETA = 0.1


def column(value: float, grad: bool = False) -> CompletionLogps:
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=grad)
    return CompletionLogps(values, torch.ones(1, 1, dtype=torch.bool))


def pair(chosen_ratio: float, rejected_ratio: float) -> PairLogps:
    one = torch.ones(1, dtype=torch.float64)
    policy = column(-10 + chosen_ratio, grad=True), column(-12 + rejected_ratio, grad=True)
    return PairLogps(*policy, column(-10.0), column(-12.0), one, one)


def gradients(loss: DualClip, logps: PairLogps) -> tuple[float, float]:
    loss(logps).loss.sum().backward()
    found = (logps.policy_chosen.token_logps.grad, logps.policy_rejected.token_logps.grad)
    return tuple(0.0 if g is None else float(g.sum()) for g in found)


def test_golden_value_of_the_card():
    loss = DualClip(beta=BETA, clip_chosen=0.09, clip_rejected=0.02)(pair(1.0, -0.5))
    assert loss.loss.item() == pytest.approx(0.6396589186, abs=1e-9)
    assert (loss.extra["chosen_clipped"].item(), loss.extra["rejected_clipped"].item()) == (1.0, 1.0)


@pytest.mark.parametrize(("a", "b"), [(1.0, -0.5), (-3.0, 4.0), (40.0, -40.0)])
def test_infinite_thresholds_are_dpo(a, b):
    free = DualClip(beta=BETA, clip_chosen=math.inf, clip_rejected=math.inf)
    assert free(pair(a, b)).loss.item() == pytest.approx(DPO(beta=BETA)(pair(a, b)).loss.item())


@pytest.mark.parametrize("clip", [0.01, 1.0, 5.0])
def test_the_loss_at_the_reference_is_ln_2_for_any_threshold(clip):
    loss = DualClip(clip_chosen=clip, clip_rejected=clip)(pair(0.0, 0.0)).loss.item()
    assert loss == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("a", "b", "moves"),
    [(0.5, -0.5, (True, True)), (2.0, -0.5, (False, True)), (0.5, -2.0, (True, False)), (2.0, -2.0, (False, False))],
)
def test_a_side_beyond_its_threshold_takes_no_gradient(a, b, moves):
    loss = DualClip(beta=BETA, clip_chosen=0.1, clip_rejected=0.1)
    chosen, rejected = gradients(loss, pair(a, b))
    assert (chosen != 0, rejected != 0) == moves
    assert chosen <= 0
    assert rejected >= 0


def test_the_floor_is_reached_where_both_sides_are_clipped():
    loss = DualClip(beta=BETA, clip_chosen=0.3, clip_rejected=0.2)(pair(50.0, -50.0)).loss.item()
    assert loss == pytest.approx(math.log1p(math.exp(-0.5)))


@pytest.mark.parametrize(("a", "b"), [(0.3, -0.4), (3.0, -0.1), (0.1, -3.0), (3.0, -3.0)])
def test_ratio_thresholds_are_reward_thresholds_under_the_mapping(a, b):
    up, down = 0.5, 0.4
    ratio = DualClip(beta=BETA, clip_chosen=up, clip_rejected=down, mode="ratio")
    reward = DualClip(beta=BETA, clip_chosen=BETA * math.log(1 + up), clip_rejected=-BETA * math.log(1 - down))
    assert ratio(pair(a, b)).loss.item() == pytest.approx(reward(pair(a, b)).loss.item())
    assert gradients(ratio, pair(a, b)) == pytest.approx(gradients(reward, pair(a, b)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.0}, "beta"),
        ({"clip_chosen": 0.0}, "clip_chosen"),
        ({"clip_rejected": -1.0}, "clip_rejected"),
        ({"clip_rejected": 1.0, "mode": "ratio"}, r"in \(0, 1\) for mode ratio"),
        ({"clip_chosen": math.nan}, "clip_chosen"),
        ({"mode": "both"}, "mode"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        DualClip(**fields)
