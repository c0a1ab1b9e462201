"""The pairwise losses against values worked out by hand: at policy = reference, in their limits, and identities."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid, softplus

from prefloop.components import build, component_class, kinds
from prefloop.errors import ConfigError
from prefloop.losses._terms import log1mexp
from prefloop.losses.aot import AOT
from prefloop.losses.aot_unpaired import AOTUnpaired
from prefloop.losses.apo_down import APODown
from prefloop.losses.apo_zero import APOZero
from prefloop.losses.asft import ASFT
from prefloop.losses.bco import BCO
from prefloop.losses.cal_dpo import CalDPO
from prefloop.losses.cpo import CPO
from prefloop.losses.discopop import DiscoPOP
from prefloop.losses.dpo import DPO
from prefloop.losses.dpo_sft import DPOSFT
from prefloop.losses.dpop import DPOP
from prefloop.losses.exo import EXO
from prefloop.losses.f_dpo import FDPO
from prefloop.losses.flex_dpo import FlexDPO
from prefloop.losses.hinge import Hinge
from prefloop.losses.ipo import IPO
from prefloop.losses.ld_dpo import LDDPO
from prefloop.losses.ln_dpo import LNDPO
from prefloop.losses.mixture import Mixture
from prefloop.losses.nca import NCA
from prefloop.losses.orpo import ORPO
from prefloop.losses.r_dpo import RDPO
from prefloop.losses.robust_dpo import RobustDPO
from prefloop.losses.rpo import RPO
from prefloop.losses.sft import SFT
from prefloop.losses.simpo import SimPO
from prefloop.losses.slic import SLiC
from prefloop.losses.sppo import SPPO
from prefloop.recipe import Spec
from prefloop.tensors import CompletionLogps, PairLogps

LN2 = math.log(2)
BETA = 0.4


def side(totals, lengths):
    """Completions of `lengths` tokens whose log-probs add up to `totals`, spread unevenly."""
    totals = torch.as_tensor(totals, dtype=torch.float64)
    lengths = torch.tensor(lengths)
    place = torch.arange(int(lengths.max()))
    mask = place < lengths[:, None]
    shares = (1.0 + place) * mask
    return CompletionLogps(totals[:, None] * shares / shares.sum(-1, keepdim=True), mask)


def pairs(chosen, rejected, reference=None, lengths=(2, 2), win_prob=1.0):
    """Totals of the policy, and of the reference (chosen, rejected) where there is one; one entry for each pair."""
    rows = len(chosen)
    lengths = [n if isinstance(n, list) else [n] * rows for n in lengths]
    stored = [None, None] if reference is None else [side(t, n) for t, n in zip(reference, lengths, strict=True)]
    ones = torch.ones(rows, dtype=torch.float64)
    return PairLogps(side(chosen, lengths[0]), side(rejected, lengths[1]), *stored, ones * win_prob, ones)


def shifted(ratio_chosen, ratio_rejected, **more):
    """Pairs with these log-ratios; the reference is at −7 and −9."""
    chosen = torch.as_tensor(ratio_chosen, dtype=torch.float64) - 7
    rejected = torch.as_tensor(ratio_rejected, dtype=torch.float64) - 9
    rows = len(chosen)
    return pairs(chosen, rejected, ([-7.0] * rows, [-9.0] * rows), **more)


def value(loss, logps):
    return loss(logps).loss.sum()


def slopes(loss, chosen, rejected, **more):
    """d loss / d (S_w, S_l) at these log-ratios (of the whole completion)."""
    start = torch.tensor([chosen, rejected], dtype=torch.float64, requires_grad=True)
    value(loss, shifted(start[:1], start[1:], **more)).backward()
    return start.grad.tolist()


# log π(w) = −10, log π(l) = −12, log π_ref(w) = −11, log π_ref(l) = −11.5: log-ratios 1 and −0.5, Δ = 1.5.
EXAMPLE = pairs([-10.0], [-12.0], ([-11.0], [-11.5]), lengths=(5, 3))
MANY = pairs(
    [-3.0, -9.0, -1.0, -20.0],
    [-5.0, -1.0, -30.0, -2.0],
    ([-4.0, -2.0, -6.0, -18.5], [-4.0, -7.0, -8.0, -2.0]),
    lengths=([1, 4, 2, 6], [3, 4, 1, 2]),
    win_prob=0.8,
)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (DPO(0.1), 0.6209570478),
        (Hinge(0.1), 0.85),
        (IPO(0.1, "sum"), 12.25),
        (IPO(0.1, "mean"), (1 / 5 + 0.5 / 3 - 5) ** 2),
        (SPPO(0.1), 36.25),
        (RPO(0.1, 1.0), 2.6209570478),
        (DPOSFT(0.1, 0.1), 1.6209570478),
        (RobustDPO(0.1, 0.1), (0.9 * 0.6209570478 - 0.1 * 0.7709570478) / 0.8),
        (BCO(0.1), softplus(torch.tensor(-0.1)).item() + softplus(torch.tensor(-0.05)).item()),
        (LNDPO(5.0), math.log1p(math.exp(-5 * (1 / 5 + 0.5 / 3)))),
        (RDPO(0.1, 0.05), math.log1p(math.exp(-0.15 - 0.05 * 2))),
        (FlexDPO(0.1, 0.08), math.log1p(math.exp(-0.1 - 0.04))),
        (DPOP(0.1, 50.0), 0.6209570478),
        (CalDPO(0.1, 1.0), math.log1p(math.exp(-1.5)) + 16 + 4.5**2),
        (CalDPO(0.1, 0.5), math.log1p(math.exp(-1.5)) + 0.5 * (16 + 4.5**2)),
        (SLiC(1.0, 0.1), 1.0),
        (SLiC(5.0, 0.1), 3.0 + 1.0),
        (CPO(0.1, 1.0), math.log1p(math.exp(-0.2)) + 2),
        (SimPO(2.0, 0.5), math.log1p(math.exp(-(2 * (-2 + 4) - 0.5)))),
        (SFT(), 2.0),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, float) else "",
)
def test_values_of_the_methods_card_and_by_hand(loss, expected):
    assert loss(EXAMPLE).loss.item() == pytest.approx(expected, rel=1e-8)


def test_sppo_single_is_the_paper_s_loss_with_win_rates_p_and_1_minus_p():
    """η = 10, P = 0.8: ½[(1 − 3)² + (−0.5 + 3)²]."""
    logps = pairs([-10.0], [-12.0], ([-11.0], [-11.5]), win_prob=0.8)
    assert SPPO(0.1, "single")(logps).loss.item() == pytest.approx(0.5 * (4 + 6.25))


def one_sided(win_chosen, win_rejected):
    """The example's two completions as rows of their own, with win rates as `pair_builder.kind=win_rates` has them."""
    both = pairs([-10.0] * 2, [-12.0] * 2, ([-11.0] * 2, [-11.5] * 2), lengths=(5, 3))
    here = torch.tensor([[True], [False]])
    sides = (both.policy_chosen, both.policy_rejected, both.reference_chosen, both.reference_rejected)
    masked = [CompletionLogps(s.token_logps, s.mask & (here if i % 2 == 0 else ~here)) for i, s in enumerate(sides)]
    win_prob = torch.tensor([win_chosen, 1 - win_rejected], dtype=torch.float64)
    return PairLogps(*masked, win_prob, torch.ones(2))


def test_sppo_soft_is_the_card_s_value_over_a_pair_s_two_completions():
    """η = 10, P_w = 0.8, P_l = 0.3: ½[(1 − 3)² + (−0.5 + 2)²]."""
    output = SPPO(0.1, "soft")(one_sided(0.8, 0.3))
    assert output.loss.tolist() == pytest.approx([4.0, 2.25])
    assert output.loss.mean().item() == pytest.approx(3.125, rel=1e-12)
    assert output.chosen_reward.tolist() == pytest.approx([0.1, 0.0])
    assert output.rejected_reward.tolist() == pytest.approx([0.0, -0.05])


def test_sppo_soft_with_sure_wins_is_half_of_hard_and_with_even_ones_least_at_the_reference():
    assert SPPO(0.1, "soft")(one_sided(1.0, 0.0)).loss.mean().item() == pytest.approx(36.25 / 2)
    assert SPPO(0.1, "soft")(one_sided(0.5, 0.5)).loss.tolist() == pytest.approx([1.0, 0.25])
    both = SPPO(0.1, "single")(pairs([-10.0], [-12.0], ([-11.0], [-11.5]), win_prob=0.7)).loss.item()
    assert SPPO(0.1, "soft")(one_sided(0.7, 0.3)).loss.mean().item() == pytest.approx(both)


def test_sppo_soft_learns_from_single_completions_and_refuses_pairs():
    assert (SPPO(form="soft").consumes, SPPO().consumes, SPPO(form="single").consumes) == ("unpaired", "pair", "pair")
    with pytest.raises(ConfigError, match=r"losses/sppo\.py.*pair_builder\.kind=win_rates"):
        SPPO(0.1, "soft")(EXAMPLE)


# Loss, value at policy = reference, slopes there with respect to S_w and S_l; completions of two tokens.
AT_REFERENCE = [
    (DPO(BETA), LN2, -BETA / 2, BETA / 2),
    (RobustDPO(BETA, 0.1), LN2, -BETA / 1.6, BETA / 1.6),
    (LNDPO(BETA), LN2, -BETA / 4, BETA / 4),
    (RDPO(BETA, 0.3), LN2, -BETA / 2, BETA / 2),
    (LDDPO(BETA, 0.3), LN2, -BETA / 2, BETA / 2),
    (DPOP(BETA, 50.0), LN2, -BETA / 2, BETA / 2),
    (FlexDPO(BETA, 0.1), LN2, -BETA / 2, 0.05),
    (AOT(BETA), LN2, -BETA / 2, BETA / 2),
    (AOT(BETA, 0.1), LN2, -0.8 * BETA / 2, 0.8 * BETA / 2),
    (AOTUnpaired(BETA), LN2, -BETA / 2, BETA / 2),
    (FDPO(BETA, "reverse_kl"), LN2, -BETA / 2, BETA / 2),
    (FDPO(BETA, "forward_kl"), LN2, -BETA / 2, BETA / 2),
    (FDPO(BETA, "js"), LN2, -BETA / 4, BETA / 4),
    (FDPO(BETA, "alpha", 0.3), LN2, -BETA / 2, BETA / 2),
    (Hinge(BETA), 1.0, -BETA, BETA),
    (IPO(BETA, "sum"), 1 / (4 * BETA**2), -1 / BETA, 1 / BETA),
    (IPO(BETA, "mean"), 1 / (4 * BETA**2), -1 / (2 * BETA), 1 / (2 * BETA)),
    (NCA(BETA), 2 * LN2, -BETA / 4, BETA / 4),
    (BCO(BETA), 2 * LN2, -BETA / 2, BETA / 2),
    (APOZero(BETA), 1.0, -BETA / 4, BETA / 4),
    (APODown(BETA), 1.0, 0.0, BETA / 4),
    (SPPO(BETA), 1 / (2 * BETA**2), -1 / BETA, 1 / BETA),
    (SPPO(BETA, "single"), 1 / (4 * BETA**2), -1 / (2 * BETA), 1 / (2 * BETA)),
    (CalDPO(BETA), LN2 + 1 / (2 * BETA**2), -0.5 - 1 / BETA, 0.5 + 1 / BETA),
    (EXO(BETA, 0.1), -LN2 - 0.5 * math.log(0.09), -BETA * math.log(9) / 4, BETA * math.log(9) / 4),
    (
        DiscoPOP(BETA, 0.05),
        0.5 * LN2 + 0.5,
        BETA * ((1 - LN2) / 0.2 - 0.75),
        -BETA * ((1 - LN2) / 0.2 - 0.75),
    ),
]


@pytest.mark.parametrize(
    ("loss", "expected", "slope_chosen", "slope_rejected"), AT_REFERENCE, ids=[repr(row[0]) for row in AT_REFERENCE]
)
def test_value_and_gradient_at_policy_equal_to_reference(loss, expected, slope_chosen, slope_rejected):
    output = loss(shifted([0.0], [0.0]))
    assert output.loss.item() == pytest.approx(expected, rel=1e-9)
    assert output.chosen_reward.item() == output.rejected_reward.item() == 0
    assert slopes(loss, 0.0, 0.0) == pytest.approx([slope_chosen, slope_rejected], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("limit", "same_as"),
    [
        (RobustDPO(BETA, 0.0), DPO(BETA)),
        (RPO(BETA, 0.0), DPO(BETA)),
        (DPOSFT(BETA, 0.0), DPO(BETA)),
        (DPOP(BETA, 0.0), DPO(BETA)),
        (FlexDPO(BETA, BETA), DPO(BETA)),
        (RDPO(BETA, 0.0), DPO(BETA)),
        (LDDPO(BETA, 1.0), DPO(BETA)),
        (FDPO(BETA, "reverse_kl"), DPO(BETA)),
        (FDPO(BETA, "alpha", 1.0), DPO(BETA)),
        (FDPO(BETA, "alpha", 0.0), FDPO(BETA, "forward_kl")),
        (CalDPO(BETA, 0.0), DPO(1.0)),
        (CPO(BETA, 0.0), SLiC(0.0, 0.0)),
        (ORPO(0.0), SFT()),
        (ASFT(0.0), SFT()),
        (Mixture(({"kind": "dpo", "beta": BETA},)), DPO(BETA)),
        (Mixture(({"kind": "dpo", "weight": 0}, {"kind": "nca", "beta": BETA})), NCA(BETA)),
        (Mixture(({"kind": "dpo", "beta": BETA}, {"kind": "sft", "weight": 0.3})), RPO(BETA, 0.3)),
    ],
    ids=repr,
)
def test_limits(limit, same_as):
    if isinstance(same_as, SLiC):
        # CPO without likelihood is DPO against a reference that gives everything probability 1.
        free = pairs(MANY.policy_chosen.total, MANY.policy_rejected.total, ([0.0] * 4, [0.0] * 4))
        torch.testing.assert_close(limit(MANY).loss, DPO(BETA)(free).loss)
        return
    torch.testing.assert_close(limit(MANY).loss, same_as(MANY).loss, rtol=1e-12, atol=1e-12)


def test_robust_is_unbiased_under_flips_and_falls_without_bound():
    logit = torch.linspace(-6, 6, 25, dtype=torch.float64)
    zero = torch.zeros(25, dtype=torch.float64)
    forward = RobustDPO(1.0, 0.2)(shifted(logit, zero)).loss
    backward = RobustDPO(1.0, 0.2)(shifted(-logit, zero)).loss
    torch.testing.assert_close(0.8 * forward + 0.2 * backward, DPO(1.0)(shifted(logit, zero)).loss)
    assert slopes(RobustDPO(1.0, 0.1), 1e3, 0.0)[0] == pytest.approx(-0.125)


def test_ipo_and_exo_and_sppo_are_least_at_their_target():
    assert slopes(IPO(0.1, "sum"), 5.0, 0.0)[0] == pytest.approx(0.0, abs=1e-12)
    assert slopes(IPO(0.1, "sum"), 5.1, 0.0)[0] > 0 > slopes(IPO(0.1, "sum"), 4.9, 0.0)[0]
    at = shifted([math.log(0.9 / 0.1) / BETA], [0.0])
    assert EXO(BETA, 0.1)(at).loss.item() == pytest.approx(0.0, abs=1e-12)
    win = {"win_prob": 0.7}
    assert slopes(SPPO(0.1, "single"), 2.0, -2.0, **win) == pytest.approx([0.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_sppo_soft_is_least_where_each_log_ratio_is_eta_times_the_win_rate_less_a_half(rate):
    """r = η(P − ½) with η = 1/β = 10, on the chosen and on the rejected side; P = ½ asks for the reference itself."""
    target = 10 * (rate - 0.5)
    ratios = torch.tensor([target, target], dtype=torch.float64, requires_grad=True)
    both = shifted(ratios[:1].expand(2), ratios[1:].expand(2))
    here = torch.tensor([[True], [False]])
    sides = (both.policy_chosen, both.policy_rejected, both.reference_chosen, both.reference_rejected)
    masked = [CompletionLogps(s.token_logps, s.mask & (here if i % 2 == 0 else ~here)) for i, s in enumerate(sides)]
    win_prob = torch.tensor([rate, 1 - rate], dtype=torch.float64)
    loss = SPPO(0.1, "soft")(PairLogps(*masked, win_prob, torch.ones(2))).loss
    assert loss.tolist() == pytest.approx([0, 0], abs=1e-20)
    assert torch.autograd.grad(loss.sum(), ratios)[0].tolist() == pytest.approx([0, 0], abs=1e-10)


def test_exo_is_the_kl_divergence_from_the_label():
    q = 1 / (1 + math.exp(-BETA * 1.5))
    expected = q * math.log(q / 0.8) + (1 - q) * math.log((1 - q) / 0.2)
    assert EXO(BETA, 0.2)(EXAMPLE).loss.item() == pytest.approx(expected)


def test_sppo_single_with_even_odds_is_zero_at_the_reference_and_with_certainty_half_of_hard():
    assert SPPO(BETA, "single")(shifted([0.0], [0.0], win_prob=0.5)).loss.item() == 0
    sure = shifted([1.0, -2.0], [3.0, 0.5])
    torch.testing.assert_close(SPPO(BETA, "single")(sure).loss, 0.5 * SPPO(BETA)(sure).loss)


def test_nca_is_stationary_in_the_chosen_completion_at_log_2():
    assert slopes(NCA(BETA), LN2 / BETA, 0.0)[0] == pytest.approx(0.0, abs=1e-12)


def test_bco_bounds_dpo_from_above():
    assert (BCO(BETA)(MANY).loss >= DPO(BETA)(MANY).loss).all()


def test_discopop_rises_only_inside_its_window():
    logit = torch.linspace(-1, 1, 2001, dtype=torch.float64, requires_grad=True)
    value(DiscoPOP(1.0, 0.05), shifted(logit, torch.zeros(2001))).backward()
    rising = logit.detach()[logit.grad > 0]
    assert rising.min().item() == pytest.approx(-0.119, abs=2e-3)
    assert rising.max().item() == pytest.approx(0.072, abs=2e-3)
    plain = DiscoPOP(BETA, 0.5)(MANY).loss
    t = BETA * (MANY.log_ratios()[0] - MANY.log_ratios()[1])
    k = torch.sigmoid(t / 0.5)
    torch.testing.assert_close(plain, -(1 - k) * logsigmoid(t) + k * torch.exp(-t))


def test_dpop_penalizes_only_a_chosen_completion_below_the_reference():
    below = shifted([-0.5], [-1.0])
    assert DPOP(0.3, 50.0)(below).loss.item() == pytest.approx(math.log1p(math.exp(-0.3 * (0.5 - 25))))
    above = shifted([0.5], [-1.0])
    assert DPOP(0.3, 50.0)(above).loss.item() == pytest.approx(DPO(0.3)(above).loss.item())


def test_rpo_normalizes_the_likelihood_by_length_and_nothing_else():
    once = pairs([-4.0], [-6.0], ([-5.0], [-5.0]), lengths=(3, 2))
    twice = pairs([-8.0], [-12.0], ([-10.0], [-10.0]), lengths=(6, 4))
    likelihood = [RPO(BETA, 1.0)(x).loss - RPO(BETA, 0.0)(x).loss for x in (once, twice)]
    torch.testing.assert_close(*likelihood)
    assert RPO(BETA, 0.0)(once).loss.item() != pytest.approx(RPO(BETA, 0.0)(twice).loss.item())


# Table of arXiv 2406.07327 in our card: β 0.1, π_w 0.5, π_l 1e−8; slopes with respect to probabilities.
@pytest.mark.parametrize(
    ("loss", "reference", "slope_chosen", "slope_rejected"),
    [
        (DPO(0.1), 0.3, -0.029040, 1.4520e6),
        (DPOSFT(0.1, 0.1), 0.3, -0.229040, 1.4520e6),
        (FlexDPO(0.1, 0.08), 0.12, -0.038101, 1.5240e6),
    ],
    ids=repr,
)
def test_gradients_of_the_3d_paper_in_probability_space(loss, reference, slope_chosen, slope_rejected):
    probability = torch.tensor([0.5, 1e-8], dtype=torch.float64, requires_grad=True)
    logs = probability.log()
    value(loss, pairs(logs[:1], logs[1:], ([math.log(reference)], [math.log(reference)]))).backward()
    assert probability.grad.tolist() == pytest.approx([slope_chosen, slope_rejected], rel=1e-4)


def test_flex_dpo_pushes_free_logits_outside_the_pair_down():
    """dL/dθ_j = c·(−β⁺[j=w] + β⁻[j=l] + (β⁺ − β⁻)·π_j), c = σ(−u)."""
    theta = torch.tensor([0.3, -0.2, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    policy = theta.log_softmax(0)
    reference = math.log(0.25)
    value(FlexDPO(0.4, 0.1), pairs(policy[:1], policy[1:2], ([reference], [reference]))).backward()
    p = policy.detach()
    c = torch.sigmoid(-(0.4 * (p[0] - reference) - 0.1 * (p[1] - reference)))
    own = torch.tensor([-0.4, 0.1, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(theta.grad, c * (own + 0.3 * p.exp()))
    assert (theta.grad[2:] > 0).all()


def test_r_dpo_is_least_at_the_policy_that_pays_for_length():
    """Labels drawn by reward r: the minimum is π ∝ π_ref·exp((r − α·length)/β). This fixes the sign of α."""
    beta, alpha = 0.5, 0.2
    reward = torch.tensor([1.0, 0.2, -0.5], dtype=torch.float64)
    lengths = [5, 2, 9]
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    best = (reference + (reward - alpha * torch.tensor(lengths, dtype=torch.float64)) / beta).log_softmax(0)
    theta = best.clone().requires_grad_(True)
    policy = theta.log_softmax(0)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            if i != j:
                stored = (reference[i : i + 1], reference[j : j + 1])
                logps = pairs(policy[i : i + 1], policy[j : j + 1], stored, lengths=(lengths[i], lengths[j]))
                total = total + torch.sigmoid(reward[i] - reward[j]) * value(RDPO(beta, alpha), logps)
    total.backward()
    torch.testing.assert_close(theta.grad, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_f_divergences_by_their_formula():
    chosen, rejected = MANY.log_ratios()
    formulas = {
        ("js", 0.5): lambda t: torch.log(2 * t / (1 + t)),
        ("forward_kl", 0.5): lambda t: 1 - 1 / t,
        ("alpha", 0.3): lambda t: (t**-0.7 - 1) / -0.7,
    }
    for (name, alpha), slope in formulas.items():
        expected = -logsigmoid(BETA * (slope(chosen.exp()) - slope(rejected.exp())))
        torch.testing.assert_close(FDPO(BETA, name, alpha)(MANY).loss, expected)


def test_ld_dpo_cuts_the_longer_completion_and_leaves_equal_lengths_alone():
    equal = pairs([-3.0, -9.0], [-5.0, -1.0], ([-4.0, -2.0], [-4.0, -7.0]), lengths=(3, 3))
    torch.testing.assert_close(LDDPO(BETA, 0.0)(equal).loss, DPO(BETA)(equal).loss)

    def cut(scored):
        return CompletionLogps(scored.token_logps[:, :2], scored.mask[:, :2])

    long = pairs([-3.0], [-5.0], ([-4.0], [-4.5]), lengths=(2, 4))
    short = PairLogps(
        long.policy_chosen,
        cut(long.policy_rejected),
        long.reference_chosen,
        cut(long.reference_rejected),
        long.win_prob,
        long.weight,
    )
    torch.testing.assert_close(LDDPO(BETA, 0.0)(long).loss, DPO(BETA)(short).loss)
    half = 0.5 * (DPO(BETA)(long).chosen_reward - DPO(BETA)(long).rejected_reward)
    half = half + 0.5 * (DPO(BETA)(short).chosen_reward - DPO(BETA)(short).rejected_reward)
    torch.testing.assert_close(LDDPO(BETA, 0.5)(long).loss, -logsigmoid(half))


@pytest.mark.parametrize("loss", [AOT(BETA), AOTUnpaired(BETA)], ids=repr)
def test_aot_of_one_pair_is_dpo(loss):
    torch.testing.assert_close(loss(EXAMPLE).loss, DPO(BETA)(EXAMPLE).loss)


def test_aot_compares_sorted_margins():
    chosen, rejected = MANY.log_ratios()
    policy = MANY.policy_chosen.total - MANY.policy_rejected.total
    reference = MANY.reference_chosen.total - MANY.reference_rejected.total
    paired = -logsigmoid(BETA * (policy.sort().values - reference.sort().values))
    unpaired = -logsigmoid(BETA * (chosen.sort().values - rejected.sort().values))
    # Rows keep their place: the terms are the sorted ones, each at the row that has the rank.
    torch.testing.assert_close(AOT(BETA)(MANY).loss[policy.argsort()], paired)
    torch.testing.assert_close(AOTUnpaired(BETA)(MANY).loss[chosen.argsort()], unpaired)
    assert AOT(BETA)(MANY).loss.mean().item() != pytest.approx(DPO(BETA)(MANY).loss.mean().item())


def test_ln_dpo_equals_dpo_and_simpo_where_it_should():
    equal = pairs([-3.0, -9.0], [-5.0, -1.0], ([-4.0, -2.0], [-4.0, -7.0]), lengths=(4, 4))
    torch.testing.assert_close(LNDPO(BETA)(equal).loss, DPO(BETA / 4)(equal).loss)
    once = pairs([-4.0], [-6.0], ([-5.0], [-5.0]), lengths=(3, 2))
    twice = pairs([-8.0], [-12.0], ([-10.0], [-10.0]), lengths=(6, 4))
    torch.testing.assert_close(LNDPO(BETA)(once).loss, LNDPO(BETA)(twice).loss)
    free = pairs([-8.0], [-12.0], ([0.0], [0.0]), lengths=(6, 4))
    torch.testing.assert_close(LNDPO(BETA)(free).loss, SimPO(BETA, 0.0)(free).loss)


def test_simpo_by_the_card():
    equal = pairs([-3.0, -9.0], [-5.0, -1.0], lengths=(4, 4))
    torch.testing.assert_close(SimPO(2.0, 0.0)(equal).loss, CPO(0.5, 0.0)(equal).loss)
    level = pairs([-6.0], [-9.0], lengths=(2, 3))
    assert SimPO(2.0, 0.5)(level).loss.item() == pytest.approx(math.log1p(math.exp(0.5)))
    doubled = pairs([-12.0], [-18.0], lengths=(4, 6))
    torch.testing.assert_close(SimPO(2.0, 0.5)(doubled).loss, SimPO(2.0, 0.5)(level).loss)
    # dL/dS_w = −β·σ(γ − β·(s_w − s_l))/n_w
    far = torch.tensor([-1.0, -9.0], dtype=torch.float64, requires_grad=True)
    value(SimPO(2.0, 0.5), pairs(far[:1], far[1:], lengths=(2, 3))).backward()
    weight = 2 / (1 + math.exp(-(0.5 - 2 * 2.5)))
    assert far.grad.tolist() == pytest.approx([-weight / 2, weight / 3])
    # ε = 0.2: 0.8 of the loss and 0.2 of that with the sides exchanged.
    smoothed = SimPO(2.0, 0.5, 0.2)(level).loss.item()
    assert smoothed == pytest.approx(0.8 * math.log1p(math.exp(0.5)) + 0.2 * math.log1p(math.exp(-0.5)))


HALF = pairs([2 * math.log(0.5)], [3 * math.log(0.5)], lengths=(2, 3))


def test_asft_by_its_identities():
    logps = pairs([-3.0, -9.0, -0.2], [-5.0, -1.0, -8.0], lengths=(4, 2))
    p_w, p_l = logps.policy_chosen.mean.exp(), logps.policy_rejected.mean.exp()
    for lam in (0.1, 1.0):
        expected = -(1 + lam) * p_w.log() - lam * (1 - p_l).log()
        torch.testing.assert_close(ASFT(lam)(logps).loss, expected)
        excess = lam * (p_w * (1 - p_l) + p_l * (1 - p_w)).log()
        torch.testing.assert_close(ORPO(lam)(logps).loss, ASFT(lam)(logps).loss + excess)
    assert (ASFT(1.0)(HALF).loss - SFT()(HALF).loss).item() == pytest.approx(2 * LN2)
    odds = torch.log(p_w / (1 - p_w)), torch.log(p_l / (1 - p_l))
    tempered = -logsigmoid(0.2 * odds[0]) - logsigmoid(-0.2 * odds[1])
    torch.testing.assert_close(ASFT(lam=1.0, beta=0.2, sft_weight=0.0)(logps).loss, tempered)


def test_asft_gradient_in_mean_log_probabilities():
    """dL/d log p_w = −(1 + λ), always; dL/d log p_l = λ·p_l/(1 − p_l), which goes to 0 with p_l."""
    totals = torch.tensor([-3.0, -40.0], dtype=torch.float64, requires_grad=True)
    value(ASFT(0.3), pairs(totals[:1], totals[1:], lengths=(1, 1))).backward()
    tiny = math.exp(-40)
    assert totals.grad.tolist() == pytest.approx([-1.3, 0.3 * tiny / (1 - tiny)], rel=1e-9)


def test_orpo_with_equal_mean_log_probabilities():
    assert (ORPO(0.7)(HALF).loss - ORPO(0.0)(HALF).loss).item() == pytest.approx(0.7 * LN2)


def test_log1mexp_is_exact_and_its_gradient_finite():
    points = torch.tensor([-1e-12, -1e-6, -0.1, -LN2, -0.7, -5.0, -50.0], dtype=torch.float64, requires_grad=True)
    expected = [math.log(-math.expm1(x)) for x in points.tolist()]
    assert log1mexp(points).tolist() == pytest.approx(expected, rel=1e-13)
    single = torch.tensor([0.0, -1e-9, -0.3, -20.0, -200.0], requires_grad=True)
    log1mexp(single).sum().backward()
    assert log1mexp(single).isfinite().all()
    assert single.grad.isfinite().all()


EVERY = [
    *[row[0] for row in AT_REFERENCE],
    SLiC(),
    CPO(),
    SimPO(),
    RPO(),
    DPOSFT(),
    SFT(),
    Mixture(),
]


@pytest.mark.parametrize("loss", EVERY, ids=repr)
def test_extreme_log_probabilities_stay_finite_in_float32(loss):
    big = torch.tensor([-1e4, 0.0, -1e4, 0.0], requires_grad=True)
    other = torch.tensor([0.0, -1e4, -1e4, 0.0], requires_grad=True)
    ones = torch.ones(4)
    one = torch.ones(4, 1, dtype=torch.bool)
    zero = CompletionLogps(torch.full((4, 1), -5e3), one)
    output = loss(PairLogps(*(CompletionLogps(x[:, None], one) for x in (big, other)), zero, zero, ones, ones))
    output.loss.sum().backward()
    assert output.loss.isfinite().all()
    assert all(x.grad is None or x.grad.isfinite().all() for x in (big, other))


@pytest.mark.parametrize("loss", [ORPO(), ASFT()], ids=repr)
def test_a_completion_that_is_certain_stays_finite(loss):
    """p = 1 makes the odds infinite; they are cut one step of float32 below."""
    totals = torch.tensor([0.0, 0.0, -3.0], requires_grad=True)
    one = torch.ones(3, 1, dtype=torch.bool)
    scored = CompletionLogps(totals[:, None], one)
    output = loss(PairLogps(scored, scored, None, None, torch.ones(3), torch.ones(3)))
    output.loss.sum().backward()
    assert output.loss.isfinite().all()
    assert totals.grad.isfinite().all()


def test_an_empty_completion_does_not_divide_by_zero():
    empty = CompletionLogps(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool))
    full = CompletionLogps(torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool))
    logps = PairLogps(full, empty, full, empty, torch.ones(1), torch.ones(1))
    for loss in (IPO(), LNDPO(), SimPO(), RPO(), LDDPO(), ORPO()):
        assert loss(logps).loss.isfinite().all()


# Mixtures.


def test_a_mixture_is_the_sum_of_its_parts_and_reports_them():
    mixed = Mixture(({"kind": "dpo", "weight": 0.8, "beta": BETA}, {"kind": "bco", "weight": 2, "beta": BETA}))
    output = mixed(MANY)
    torch.testing.assert_close(output.loss, 0.8 * DPO(BETA)(MANY).loss + 2 * BCO(BETA)(MANY).loss)
    torch.testing.assert_close(output.extra["1_bco"], BCO(BETA)(MANY).loss)
    assert torch.equal(output.chosen_reward, DPO(BETA)(MANY).chosen_reward)


def test_the_default_mixture_is_mpo():
    expected = 0.8 * DPO(0.1)(MANY).loss + 0.2 * BCO(0.1)(MANY).loss + SFT()(MANY).loss
    torch.testing.assert_close(Mixture()(MANY).loss, expected)


def test_a_mixture_needs_what_its_parts_need():
    free = Mixture(({"kind": "simpo"}, {"kind": "sft", "weight": 0.1}))
    assert not free.needs_reference
    assert not free.couples_rows
    assert free.level == "sequence"
    assert free(pairs([-3.0], [-4.0])).loss.isfinite().all()
    assert Mixture().needs_reference
    assert Mixture(({"kind": "aot"}, {"kind": "sft"})).couples_rows
    assert Mixture(({"kind": "ld_dpo"},)).level == "token"
    assert Mixture(({"kind": "mixture", "parts": [{"kind": "ld_dpo"}]},)).level == "token"


def test_a_mixture_comes_from_a_recipe_file():
    settings = {"kind": "mixture", "parts": [{"kind": "dpo", "beta": "0.4"}, {"kind": "sft", "weight": 0.3}]}
    built = build("loss", Spec.model_validate(settings))
    torch.testing.assert_close(built(MANY).loss, RPO(0.4, 0.3)(MANY).loss)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((), "must have a part with a weight > 0"),
        (({"kind": "dpo", "weight": 0},), "must have a part with a weight > 0"),
        (({"kind": "dpo", "weight": -1},), r"parts\[0\]\.weight .*≥ 0, got -1"),
        (({"kind": "dpo", "weight": "much"},), r"≥ 0, got 'much'"),
        (({"kind": "dpo", "weight": True},), "≥ 0, got True"),
        (({"kind": "dpoo"},), r"no loss 'dpoo'; kind must be one of aot, "),
        (({"beta": 0.1},), "no loss None"),
        (({"kind": "_terms"},), "no loss '_terms'"),
        (({"kind": "dpo", "betta": 0.1},), "dpo has no field"),
        (({"kind": "dpo", "beta": "high"},), r"dpo\.beta: .*number.*got 'high'"),
        (({"kind": "dpo", "beta": -1.0},), r"losses/dpo\.py.*> 0, got -1\.0"),
        (({"kind": "dpo", "weight": 0}, {"kind": "nca", "beta": 0.0}, {"kind": "sft"}), r"losses/nca\.py"),
    ],
)
def test_impossible_mixtures_are_refused(parts, words):
    with pytest.raises(ConfigError, match=words):
        Mixture(parts)


# Settings.

POSITIVE_BETA = [IPO, Hinge, RobustDPO, CPO, SimPO, RDPO, ASFT, LNDPO, EXO, NCA, BCO, SPPO, AOT, AOTUnpaired, APOZero]
POSITIVE_BETA += [APODown, DiscoPOP, DPOSFT, DPOP, CalDPO, RPO, FDPO, LDDPO]
REFUSED = [
    *[(loss, {"beta": bad}, r"beta .*> 0, got") for loss in POSITIVE_BETA for bad in (0.0, -1.0, math.nan, math.inf)],
    *[(loss, {"label_smoothing": 0.5}, r"in \[0, 0\.5\), got 0\.5") for loss in (RobustDPO, SimPO, AOT, AOTUnpaired)],
    *[(loss, {"label_smoothing": -0.1}, "got -0.1") for loss in (RobustDPO, SimPO, AOT, AOTUnpaired, EXO)],
    (EXO, {"label_smoothing": 0.0}, r"in \(0, 0\.5\), got 0\.0"),
    (IPO, {"normalization": "median"}, "mean or sum, got median"),
    (SPPO, {"form": "firm"}, "hard, single or soft, got firm"),
    (SLiC, {"delta": -1.0}, "delta .*≥ 0, got -1.0"),
    (SLiC, {"lam": -1.0}, "lam .*≥ 0"),
    (ORPO, {"lam": -1.0}, "lam .*≥ 0"),
    (DPOP, {"lam": -1.0}, "lam .*≥ 0"),
    (CPO, {"alpha": -1.0}, "alpha .*≥ 0"),
    (RPO, {"alpha": -1.0}, "alpha .*≥ 0"),
    (RDPO, {"alpha": -1.0}, "alpha .*≥ 0"),
    (SimPO, {"gamma": -0.1}, "gamma .*≥ 0"),
    (DPOSFT, {"gamma": -0.1}, "gamma .*≥ 0"),
    (CalDPO, {"calibration": -0.1}, "calibration .*≥ 0"),
    (ASFT, {"lam": -0.1}, "lam .*≥ 0"),
    (ASFT, {"lam": 0.0, "sft_weight": 0.0}, "> 0, got 0"),
    (FlexDPO, {"beta_plus": 0.0}, "beta_plus .*> 0"),
    (FlexDPO, {"beta_minus": -0.1}, "beta_minus .*≥ 0"),
    (DiscoPOP, {"tau": 0.0}, "tau .*> 0"),
    (FDPO, {"divergence": "kl"}, "one of reverse_kl, forward_kl, js, alpha, got kl"),
    (FDPO, {"alpha": 1.5}, r"in \[0, 1\], got 1\.5"),
    (LDDPO, {"alpha": -0.5}, r"in \[0, 1\], got -0\.5"),
]


@pytest.mark.parametrize(("loss", "settings", "words"), REFUSED, ids=[f"{r[0].__name__} {r[1]}" for r in REFUSED])
def test_impossible_settings_are_refused(loss, settings, words):
    place = f"losses/{loss.__module__.rpartition('.')[2]}.py"
    with pytest.raises(ConfigError, match=words) as refused:
        loss(**settings)
    assert place in str(refused.value)


@pytest.mark.parametrize("loss", [type(x) for x in EVERY] + [ORPO, ASFT], ids=lambda x: x.__name__)
def test_kind_finds_every_loss(loss):
    kind = loss.__module__.rpartition(".")[2]
    assert kind in kinds("loss")
    assert component_class("loss", kind) is loss
    assert build("loss", SimpleNamespace(kind=kind, settings=dict)) == loss()


def test_the_shared_terms_are_no_kind():
    assert "_terms" not in kinds("loss")
