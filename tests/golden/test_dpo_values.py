"""DPO against values worked out by hand, its identities, and finite differences."""

import math

import pytest
import torch

import tiny
from prefloop.errors import ConfigError
from prefloop.losses.dpo import DPO
from prefloop.models.logps import TokenGroup, completion_logps
from prefloop.rows import TokenizedPair
from prefloop.tensors import CompletionLogps, PairLogps
from prefloop.train.batches import pair_logps

BETAS = [0.01, 0.1, 0.5, 2.0]


def side(totals):
    """Completions of two tokens whose log-probs add up to `totals`."""
    values = torch.as_tensor(totals, dtype=torch.float64)[:, None] * torch.tensor([0.25, 0.75], dtype=torch.float64)
    return CompletionLogps(values, torch.ones_like(values, dtype=torch.bool))


def logps(chosen, rejected, reference_chosen, reference_rejected):
    """Totals of policy and reference, one entry for each pair."""
    ones = torch.ones(len(chosen), dtype=torch.float64)
    return PairLogps(side(chosen), side(rejected), side(reference_chosen), side(reference_rejected), ones, ones)


# log π(w) = −10, log π(l) = −12, log π_ref(w) = −11, log π_ref(l) = −11.5: log-ratios 1 and −0.5, Δ = 1.5.
EXAMPLE = logps([-10.0], [-12.0], [-11.0], [-11.5])


def test_value_of_the_methods_card():
    output = DPO(beta=0.1)(EXAMPLE)
    # −log σ(0.15) = log(1 + e^−0.15)
    assert output.loss.item() == pytest.approx(0.6209570478, abs=1e-10)
    assert output.chosen_reward.item() == pytest.approx(0.1)
    assert output.rejected_reward.item() == pytest.approx(-0.05)


def test_value_with_label_smoothing():
    # 0.8 · log(1 + e^−0.15) + 0.2 · log(1 + e^0.15) = 0.6209570478 + 0.2 · 0.15
    assert DPO(beta=0.1, label_smoothing=0.2)(EXAMPLE).loss.item() == pytest.approx(0.6509570478, abs=1e-10)


def test_no_smoothing_is_dpo():
    many = logps([-3.0, -9.0], [-5.0, -1.0], [-4.0, -2.0], [-4.0, -7.0])
    assert torch.equal(DPO(label_smoothing=0.0)(many).loss, DPO()(many).loss)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_d1_policy_equal_to_reference_gives_log_2(beta, smoothing):
    same = logps([-3.0, -90.0], [-5.0, -1.0], [-3.0, -90.0], [-5.0, -1.0])
    loss = DPO(beta, smoothing)(same).loss
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))


@pytest.mark.parametrize("beta", BETAS)
def test_d2_exchanging_the_sides_adds_beta_times_the_margin(beta):
    swapped = logps([-12.0], [-10.0], [-11.5], [-11.0])
    assert (DPO(beta)(swapped).loss - DPO(beta)(EXAMPLE).loss).item() == pytest.approx(beta * 1.5)


@pytest.mark.parametrize("beta", BETAS)
def test_d3_a_constant_on_both_sides_changes_nothing(beta):
    shifted = logps([-10.0 + 7], [-12.0 + 7], [-11.0], [-11.5])
    torch.testing.assert_close(DPO(beta)(shifted).loss, DPO(beta)(EXAMPLE).loss)


@pytest.mark.parametrize("beta", BETAS)
def test_d4_gradient_is_half_of_beta_at_the_start_and_vanishes_when_the_pair_is_learned(beta):
    chosen = torch.tensor([0.0, 1e4], dtype=torch.float64, requires_grad=True)
    rejected = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(2, dtype=torch.float64)
    DPO(beta)(logps(chosen, rejected, zero, zero)).loss.sum().backward()
    torch.testing.assert_close(chosen.grad, torch.tensor([-beta / 2, 0.0], dtype=torch.float64))
    torch.testing.assert_close(rejected.grad, -chosen.grad)


def test_d5_prompt_and_padding_do_not_count():
    """The loss is the same however much padding a neighbour brings, and other tokens after the end do not matter."""
    model = tiny.tiny_model("llama")
    short = TokenGroup((5, 6, 7), ((8, 9), (10,)))
    long = TokenGroup((5,), (tuple(range(20, 60)), (3,)))
    alone = completion_logps(model, [short], layout="padded")
    beside = completion_logps(model, [short, long], layout="padded")
    torch.testing.assert_close(beside.total[:2], alone.total)
    assert beside.token_logps.shape[1] == 40


def test_d5_what_the_model_computes_at_prompt_and_padding_does_not_count():
    """The hidden states there are disturbed before the LM head: log-probs are the same to the bit."""
    model = tiny.tiny_model("llama")
    groups = [TokenGroup((5, 6, 7), ((8, 9), (10,))), TokenGroup((5,), (tuple(range(20, 30)),))]
    rows = [(group.context, completion) for group in groups for completion in group.completions]
    used = torch.zeros(len(rows), 10, dtype=torch.bool)  # the longest row: a prompt of 1 and 9 tokens that predict
    for row, (context, completion) in enumerate(rows):
        used[row, len(context) - 1 : len(context) - 1 + len(completion)] = True

    def scores(disturbed):
        def disturb(module, inputs, output):
            noise = 100 * torch.randn(output.last_hidden_state.shape, generator=torch.Generator().manual_seed(1))
            output.last_hidden_state = output.last_hidden_state + noise * disturbed[..., None]

        hook = model.model.register_forward_hook(disturb)
        found = completion_logps(model, groups, layout="padded").token_logps
        hook.remove()
        return found

    clean = completion_logps(model, groups, layout="padded").token_logps
    assert (~used).sum() == 17
    assert torch.equal(scores(~used), clean)
    assert (scores(used) - clean).abs().max() > 1


def test_d6_no_gradient_reaches_the_reference():
    model = tiny.tiny_model("llama")
    pair = TokenizedPair("p", (5, 6), (7, 8), (9,), (-4.0, -3.0), (-5.0,), None, 1.0)
    scored = pair_logps(model, [pair])
    assert not scored.reference_chosen.token_logps.requires_grad
    assert not scored.reference_rejected.token_logps.requires_grad
    assert scored.reference_chosen.total.item() == -7.0
    DPO()(scored).loss.sum().backward()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_gradient_equals_finite_differences(smoothing):
    loss = DPO(0.7, smoothing)
    start = torch.tensor([-10.0, -12.0], dtype=torch.float64, requires_grad=True)

    def value(policy):
        return loss(logps(policy[:1], policy[1:], [-11.0], [-11.5])).loss.sum()

    value(start).backward()
    for index in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[index] = 1e-5
        difference = (value(start.detach() + step) - value(start.detach() - step)) / 2e-5
        assert start.grad[index].item() == pytest.approx(difference.item(), rel=1e-8)
    # dL/dΔ = −β · (σ(−βΔ) − ε)
    expected = -0.7 * (1 / (1 + math.exp(0.7 * 1.5)) - smoothing)
    assert start.grad[0].item() == pytest.approx(expected)


def test_smoothed_loss_is_least_where_sigmoid_is_one_minus_epsilon():
    margin = torch.tensor([math.log(0.9 / 0.1) / 0.1], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    DPO(0.1, 0.1)(logps(margin, zero, zero, zero)).loss.sum().backward()
    assert margin.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_extreme_margins_stay_finite():
    loss = DPO(1.0, 0.1)(logps([-1e6, 0.0], [0.0, -1e6], [0.0, 0.0], [0.0, 0.0])).loss
    torch.testing.assert_close(loss, torch.tensor([9e5, 1e5], dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 0.0}, r"loss\.beta .*> 0, got 0\.0"),
        ({"beta": float("nan")}, "got nan"),
        ({"label_smoothing": 0.5}, r"label_smoothing .*got 0\.5"),
        ({"label_smoothing": -0.1}, r"got -0\.1"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        DPO(**settings)


def test_a_stricter_reference_than_the_policy_starts_above_ln_2():
    """sDPO's M_{t−1} as reference of the first policy S: above ln 2 where it prefers chosen by more than S, and only
    there."""
    start = {"chosen": [-10.0, -10.0, -10.0], "rejected": [-12.0, -12.0, -12.0]}  # γ = 2 each
    stricter = logps(*start.values(), [-9.0, -10.0, -11.0], [-13.0, -12.0, -12.0])  # γ = 4, 2, 1
    loss = DPO(beta=0.1)(stricter).loss
    expected = [math.log1p(math.exp(0.1 * gap)) for gap in (2, 0, -1)]
    assert loss.tolist() == pytest.approx(expected)
    assert loss[0].item() > math.log(2) > loss[2].item()
