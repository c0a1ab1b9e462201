"""Gradients of the pairwise losses in the log-probabilities: finite differences, signs, and what shifts leave alone."""

import math

import pytest
import torch

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
from prefloop.tensors import CompletionLogps, PairLogps

BETA = 0.5
LENGTHS = (3, 5)
REFERENCE = (-6.0, -8.0)
POINTS = [(a, b) for a in (-4.3, -0.2, 0.15, 3.1) for b in (-3.7, -0.3, 0.25, 4.9)]
"""Log-ratios of chosen and rejected, whole completions, away from the kinks of hinge, SLiC and DPOP."""

REFERENCE_FREE = [SLiC(2.5, 0.1), CPO(BETA, 0.7), ORPO(0.3), SimPO(2.0, 0.5), SimPO(2.0, 0.5, 0.1), ASFT(0.3), SFT()]
REFERENCE_FREE += [ASFT(lam=1.0, beta=0.2, sft_weight=0.0)]
WITH_REFERENCE = [
    DPO(BETA),
    DPO(BETA, 0.1),
    IPO(BETA, "sum"),
    IPO(BETA, "mean"),
    Hinge(BETA),
    RobustDPO(BETA, 0.1),
    RDPO(BETA, 0.2),
    LNDPO(5.0),
    EXO(BETA, 0.1),
    NCA(BETA),
    BCO(BETA),
    SPPO(BETA),
    SPPO(BETA, "single"),
    AOT(BETA),
    AOT(BETA, 0.1),
    AOTUnpaired(BETA, 0.1),
    APOZero(BETA),
    APODown(BETA),
    DiscoPOP(BETA, 0.5),
    FlexDPO(BETA, 0.3),
    DPOSFT(BETA, 0.01),
    DPOP(BETA, 3.0),
    CalDPO(0.1),
    RPO(BETA, 0.7),
    FDPO(BETA, "forward_kl"),
    FDPO(BETA, "js"),
    FDPO(BETA, "alpha", 0.3),
    LDDPO(BETA, 0.3),
    Mixture(),
]
EVERY = REFERENCE_FREE + WITH_REFERENCE


def side(totals, length):
    """Completions of `length` tokens whose log-probs add up to `totals`."""
    totals = torch.as_tensor(totals, dtype=torch.float64)
    return CompletionLogps(totals[:, None].expand(-1, length) / length, torch.ones(len(totals), length).bool())


def logps(ratios, lengths=LENGTHS, reference=REFERENCE):
    """One pair for each row (a, b) of `ratios`."""
    rows = len(ratios)
    stored = [torch.full((rows,), r, dtype=torch.float64) for r in reference]
    ones = torch.ones(rows, dtype=torch.float64)
    policy = [side(ratios[:, i] + stored[i], lengths[i]) for i in range(2)]
    return PairLogps(*policy, *(side(stored[i], lengths[i]) for i in range(2)), 0.8 * ones, ones)


def gradient(loss, points, **more):
    """d loss / d (S_w, S_l) at each point."""
    at = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    loss(logps(at, **more)).loss.sum().backward()
    return at.grad


@pytest.mark.parametrize("loss", EVERY, ids=repr)
def test_gradient_equals_finite_differences(loss):
    points = torch.tensor(POINTS, dtype=torch.float64)
    step = 1e-6
    found = gradient(loss, POINTS)
    for row in range(len(POINTS)):
        for column in range(2):
            move = torch.zeros_like(points)
            move[row, column] = step
            up, down = (loss(logps(points + sign * move)).loss.sum() for sign in (1, -1))
            assert found[row, column].item() == pytest.approx(((up - down) / (2 * step)).item(), rel=2e-5, abs=2e-7)


@pytest.mark.parametrize("loss", EVERY, ids=repr)
def test_gradient_is_spread_over_the_tokens_of_the_mask(loss):
    """A sequence loss has one slope for all tokens of a completion."""
    ratios = torch.tensor([[0.4, -0.3]], dtype=torch.float64)
    scored = logps(ratios)
    tokens = [s.token_logps.clone().requires_grad_(True) for s in (scored.policy_chosen, scored.policy_rejected)]
    live = [
        CompletionLogps(t, s.mask) for t, s in zip(tokens, (scored.policy_chosen, scored.policy_rejected), strict=True)
    ]
    loss(
        PairLogps(*live, scored.reference_chosen, scored.reference_rejected, scored.win_prob, scored.weight)
    ).loss.sum().backward()
    for token in tokens:
        if token.grad is not None and loss.level == "sequence":
            torch.testing.assert_close(token.grad, token.grad[:, :1].expand_as(token.grad))


# Where the chosen completion's slope may be positive (card of the losses, section 11): none, or from a log-ratio on.
ALWAYS_UP = [
    DPO(BETA),
    Hinge(BETA),
    RobustDPO(BETA, 0.1),
    RDPO(BETA, 0.2),
    LNDPO(5.0),
    BCO(BETA),
    AOT(BETA),
    AOTUnpaired(BETA),
    APOZero(BETA),
    FlexDPO(BETA, 0.3),
    DPOSFT(BETA, 0.01),
    DPOP(BETA, 3.0),
    RPO(BETA, 0.7),
    FDPO(BETA, "forward_kl"),
    FDPO(BETA, "js"),
    FDPO(BETA, "alpha", 0.3),
    LDDPO(BETA, 0.3),
    SLiC(2.5, 0.1),
    CPO(BETA, 0.7),
    ORPO(0.3),
    SimPO(2.0, 0.5),
    ASFT(0.3),
    SFT(),
]


@pytest.mark.parametrize("loss", ALWAYS_UP, ids=repr)
def test_chosen_is_never_pushed_down_and_rejected_never_up(loss):
    found = gradient(loss, POINTS)
    assert (found[:, 0] <= 0).all()
    assert found[:, 0].min() < 0
    assert (found[:, 1] >= 0).all()


LOGIT = math.log(9)
"""log((1 − ε)/ε) for ε = 0.1."""
TURNING = [
    (NCA(BETA), math.log(2) / BETA),
    (IPO(BETA, "sum"), 1 / (2 * BETA)),
    (IPO(BETA, "mean"), LENGTHS[0] / (2 * BETA)),
    (SPPO(BETA), 0.5 / BETA),
    (SPPO(BETA, "single"), 0.3 / BETA),
    (DPO(BETA, 0.1), LOGIT / BETA),
    (EXO(BETA, 0.1), LOGIT / BETA),
    (AOT(BETA, 0.1), LOGIT / BETA),
]


@pytest.mark.parametrize(("loss", "turn"), TURNING, ids=[repr(row[0]) for row in TURNING])
def test_chosen_turns_down_exactly_past_its_target(loss, turn):
    """With the rejected completion at the reference."""
    before, after = gradient(loss, [(turn - 1e-3, 0.0)]), gradient(loss, [(turn + 1e-3, 0.0)])
    assert before[0, 0] < 0 < after[0, 0]
    assert gradient(loss, [(-3.0, 0.0)])[0, 0] < 0
    assert gradient(loss, [(turn + 3, 0.0)])[0, 0] > 0


def test_apo_down_leaves_chosen_at_the_start_and_lowers_it_once_the_pair_is_told_apart():
    assert gradient(APODown(BETA), [(0.0, 0.0)])[0, 0].item() == pytest.approx(0.0, abs=1e-15)
    assert gradient(APODown(BETA), [(0.0, -5.0)])[0, 0] > 0
    assert gradient(APODown(BETA), [(0.0, 0.0)])[0, 1] > 0
    assert gradient(APODown(BETA), [(-5.0, -5.0)])[0, 0] < 0


@pytest.mark.parametrize("loss", [DPO(BETA), DPO(BETA, 0.1), Hinge(BETA), RobustDPO(BETA, 0.1), EXO(BETA), RDPO(BETA)])
def test_pairwise_losses_push_both_sides_alike(loss):
    found = gradient(loss, POINTS)
    torch.testing.assert_close(found[:, 0], -found[:, 1])


def shift_policy(loss, by, lengths):
    """The change of the loss when `by` is added to both log-probabilities of the policy."""
    points = torch.tensor(POINTS, dtype=torch.float64)
    return loss(logps(points + by, lengths)).loss - loss(logps(points, lengths)).loss


def shift_reference(loss, by, lengths):
    """The change of the loss when `by` is taken from both log-probabilities of the reference."""
    points = torch.tensor(POINTS, dtype=torch.float64)
    lowered = tuple(r - by for r in REFERENCE)
    return loss(logps(points + by, lengths, lowered)).loss - loss(logps(points, lengths)).loss


EQUAL = (4, 4)
PAIRWISE = [
    DPO(BETA),
    DPO(BETA, 0.1),
    Hinge(BETA),
    IPO(BETA, "sum"),
    RobustDPO(BETA, 0.1),
    EXO(BETA, 0.1),
    FDPO(BETA, "reverse_kl"),
    DiscoPOP(BETA, 0.5),
    AOT(BETA, 0.1),
    AOTUnpaired(BETA, 0.1),
    RDPO(BETA, 0.2),
    LDDPO(BETA, 0.3),
]
PAIRWISE_AT_EQUAL_LENGTHS = [IPO(BETA, "mean"), LNDPO(5.0), CPO(BETA, 0.0), SimPO(2.0, 0.5)]
POINTWISE = [NCA(BETA), BCO(BETA), APOZero(BETA), APODown(BETA), SPPO(BETA), SPPO(BETA, "single"), CalDPO(0.1)]
POINTWISE += [FlexDPO(BETA, 0.3), DPOP(BETA, 3.0), FDPO(BETA, "forward_kl"), FDPO(BETA, "js"), Mixture()]


@pytest.mark.parametrize("by", [-2.0, 3.0])
@pytest.mark.parametrize("loss", PAIRWISE, ids=repr)
def test_pairwise_losses_do_not_see_a_constant_on_both_sides(loss, by):
    for shift in (shift_policy, shift_reference):
        # LD-DPO weighs tokens by place: a shift of the totals is the same on both sides only at equal lengths.
        lengths = EQUAL if isinstance(loss, LDDPO) else LENGTHS
        change = shift(loss, by, lengths)
        torch.testing.assert_close(change, torch.zeros_like(change), rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", PAIRWISE_AT_EQUAL_LENGTHS, ids=repr)
def test_normalized_losses_do_not_see_it_at_equal_lengths_only(loss):
    change = shift_policy(loss, 2.0, EQUAL)
    torch.testing.assert_close(change, torch.zeros_like(change), rtol=0, atol=1e-12)
    if not isinstance(loss, CPO):
        assert shift_policy(loss, 2.0, LENGTHS).abs().max() > 1e-3


@pytest.mark.parametrize("loss", POINTWISE, ids=repr)
def test_pointwise_losses_do_see_it(loss):
    assert shift_policy(loss, 1.0, EQUAL).abs().max() > 1e-3
    assert shift_reference(loss, 1.0, EQUAL).abs().max() > 1e-3


@pytest.mark.parametrize("loss", [ASFT(0.3), ORPO(0.3), SFT(), SLiC(2.5, 0.1), CPO(BETA, 0.7)], ids=repr)
def test_losses_with_a_likelihood_see_the_policy_s_level(loss):
    assert shift_policy(loss, 0.5, EQUAL).abs().max() > 1e-3


@pytest.mark.parametrize("loss", [RPO(BETA, 0.7), DPOSFT(BETA, 0.01)], ids=repr)
def test_dpo_with_a_likelihood_sees_the_policy_s_level_but_not_the_reference_s(loss):
    assert shift_policy(loss, 0.5, EQUAL).abs().max() > 1e-3
    change = shift_reference(loss, 2.0, EQUAL)
    torch.testing.assert_close(change, torch.zeros_like(change), rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", REFERENCE_FREE, ids=repr)
def test_reference_free_losses_do_not_depend_on_one(loss):
    assert not loss.needs_reference
    points = torch.tensor(POINTS, dtype=torch.float64)
    scored = logps(points)
    bare = PairLogps(scored.policy_chosen, scored.policy_rejected, None, None, scored.win_prob, scored.weight)
    assert torch.equal(loss(scored).loss, loss(bare).loss)


@pytest.mark.parametrize("loss", WITH_REFERENCE, ids=repr)
def test_the_others_say_that_it_is_missing(loss):
    assert loss.needs_reference
    scored = logps(torch.tensor(POINTS, dtype=torch.float64))
    bare = PairLogps(scored.policy_chosen, scored.policy_rejected, None, None, scored.win_prob, scored.weight)
    with pytest.raises(ValueError, match="reference log-probabilities are missing"):
        loss(bare)
