"""Steps, microbatches, and a microbatch as log-probs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from prefloop.errors import ConfigError
from prefloop.models.logps import TokenGroup, completion_logps
from prefloop.rows import TokenizedPair
from prefloop.train.batches import group_by_context, pair_logps
from prefloop.train.plan import PairIndex, Plan


def plan_steps(lengths, pairs_per_step, epochs, seed, tokens_per_microbatch, prompts=None):
    index = PairIndex.of_lengths([(*triple, 0) for triple in lengths], prompts and [hash(p) for p in prompts])
    return list(Plan(index, pairs_per_step, epochs, seed, tokens_per_microbatch))


LENGTHS = [(10, 5, 5), (1, 1, 1), (30, 20, 10), (4, 8, 2), (7, 7, 7), (100, 50, 50), (2, 2, 1)]

lengths = st.lists(st.tuples(*[st.integers(0, 60)] * 3), max_size=40)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 9), st.integers(1, 3), st.integers(0, 5), st.integers(1, 200))
def test_every_pair_once_an_epoch_and_every_microbatch_within_the_budget(lengths, per_step, epochs, seed, budget):
    plan = plan_steps(lengths, per_step, epochs, seed, budget)
    steps_per_epoch = -(-len(lengths) // per_step)
    assert len(plan) == epochs * steps_per_epoch
    for epoch in range(epochs):
        steps = plan[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch]
        assert sorted(i for step in steps for batch in step for i in batch) == list(range(len(lengths)))
        assert all(sum(map(len, step)) == per_step for step in steps[:-1])
        for batch in (batch for step in steps for batch in step):
            assert batch
            assert len(batch) == 1 or sum(sum(lengths[i]) for i in batch) <= budget


def test_the_budget_changes_microbatches_and_not_steps():
    plans = [plan_steps(LENGTHS, 3, 2, 0, budget) for budget in (1, 30, 10_000)]
    pairs = [[sorted(i for batch in step for i in batch) for step in plan] for plan in plans]
    assert pairs[0] == pairs[1] == pairs[2]
    assert all(len(batch) == 1 for step in plans[0] for batch in step)
    assert all(len(step) == 1 for step in plans[2])


def test_a_step_is_sorted_by_size_so_that_similar_pairs_share_a_microbatch():
    (step,) = plan_steps(LENGTHS, len(LENGTHS), 1, 0, 45)
    assert step == [[1, 6, 3, 0], [4], [2], [5]]


def test_order_depends_on_seed_and_epoch_only():
    plan = plan_steps([(1, 1, 1)] * 50, 50, 2, 7, 3)
    assert plan == plan_steps([(1, 1, 1)] * 50, 50, 2, 7, 3)
    # Inside a step pairs are sorted by size, so steps of one pair show the order.
    orders = [[step[0][0] for step in plan_steps([(1, 1, 1)] * 50, 1, 2, seed, 3)] for seed in (7, 8)]
    assert orders[0][:50] != orders[0][50:]
    assert orders[0] != orders[1]
    assert orders[0][:50] == [step[0][0] for step in plan_steps([(1, 1, 1)] * 50, 1, 1, 7, 3)]


def test_no_pairs_make_no_steps():
    assert plan_steps([], 4, 3, 0, 100) == []


@pytest.mark.parametrize("name", ["pairs_per_step", "epochs", "tokens_per_microbatch"])
def test_impossible_settings_are_refused(name):
    good = {"pairs_per_step": 1, "epochs": 1, "seed": 0, "tokens_per_microbatch": 1}
    with pytest.raises(ConfigError, match=rf"train\.{name} .*≥ 1, got 0"):
        plan_steps(LENGTHS, **{**good, name: 0})


def pair(name="p", chosen=(7, 8), rejected=(9,), reference=True, win_prob=None):
    stored = (tuple(-1.0 * i for i in chosen), tuple(-2.0 * i for i in rejected)) if reference else (None, None)
    return TokenizedPair(name, (5, 6), chosen, rejected, *stored, win_prob, 0.5)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared", "auto"])
def test_rows_of_a_microbatch_are_the_sides_of_its_pairs(layout):
    model = tiny.tiny_model("llama")
    pairs = [pair("a"), pair("b", (7, 8, 9, 10), (11, 12, 13), win_prob=0.75)]
    logps = pair_logps(model, pairs, layout)
    for side, policy, reference in (
        ("chosen", logps.policy_chosen, logps.reference_chosen),
        ("rejected", logps.policy_rejected, logps.reference_rejected),
    ):
        for row, one in enumerate(pairs):
            tokens = getattr(one, side)
            alone = completion_logps(model, [TokenGroup(one.context, (tokens,))], layout="padded")
            torch.testing.assert_close(policy.total[row], alone.total[0])
            torch.testing.assert_close(policy.mask, reference.mask)  # so that a loss can subtract token by token
            assert policy.length[row] == reference.length[row] == len(tokens)
            assert reference.token_logps[row][reference.mask[row]].tolist() == list(getattr(one, f"reference_{side}"))
    assert logps.win_prob.tolist() == [1.0, 0.75]
    assert logps.weight.tolist() == [0.5, 0.5]
    assert logps.policy_chosen.token_logps.requires_grad


def test_without_a_reference_none_is_read():
    logps = pair_logps(tiny.tiny_model("llama"), [pair(reference=False)], needs_reference=False)
    assert logps.reference_chosen is None
    assert logps.reference_rejected is None


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (pair("x", reference=False), "pair x: chosen has 2 tokens but no reference"),
        (TokenizedPair("y", (5,), (6,), (7, 8), (-1.0,), (-1.0,), None, 1.0), "pair y: rejected has 2 tokens but 1"),
    ],
)
def test_a_pair_whose_reference_does_not_fit_is_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        pair_logps(tiny.tiny_model("llama"), [pair(), bad])


def test_an_empty_side_has_log_prob_zero():
    logps = pair_logps(tiny.tiny_model("llama"), [pair(rejected=())])
    assert logps.policy_rejected.total.tolist() == [0.0]
    assert logps.reference_rejected.total.tolist() == [0.0]


def pairs_of_two_prompts() -> list[TokenizedPair]:
    completions = [(10, 11, 12), (10, 11), (13,), (14, 15, 16, 17)]
    combinations = [(a, b) for i, a in enumerate(completions) for b in completions[i + 1 :]]
    return [
        TokenizedPair(f"{context}-{i}", context, *sides, None, None, None, 1.0)
        for context in [(1, 5, 6), (1, 7)]
        for i, sides in enumerate(combinations)
    ]


def test_a_completion_of_several_pairs_is_computed_once():
    found = group_by_context(pairs_of_two_prompts())
    groups, chosen, rejected = found.groups, found.chosen, found.rejected
    assert [len(group.completions) for group in groups] == [4, 4]
    flat = [c for group in groups for c in group.completions]
    for pair, row, other in zip(pairs_of_two_prompts(), chosen, rejected, strict=True):
        assert (flat[row], flat[other]) == (pair.chosen, pair.rejected)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_pairs_that_share_completions_have_the_values_and_gradients_of_pairs_alone(layout):
    pairs = pairs_of_two_prompts()
    gradients = []
    for batches in ([pairs], [[pair] for pair in pairs]):
        model = tiny.tiny_model("llama").requires_grad_(True)
        total = torch.zeros(())
        for batch in batches:
            logps = pair_logps(model, batch, layout, needs_reference=False)
            total = total + (logps.policy_chosen.total - 2 * logps.policy_rejected.total).sum()
        total.backward()
        gradients.append(torch.cat([total.detach()[None], *(p.grad.flatten() for p in model.parameters())]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def test_pairs_of_a_prompt_follow_each_other_and_share_its_budget():
    prompts = [index % 5 for index in range(20)]
    lengths = [(100, 1, 1)] * 20
    plan = plan_steps(lengths, 20, 1, 3, 108, prompts=prompts)
    assert sorted(pair for step in plan for batch in step for pair in batch) == list(range(20))
    assert [[prompts[pair] for pair in batch] for batch in plan[0]] == [[n] * 4 for n in range(5)]
    order = [prompts[pair] for step in plan_steps(lengths, 4, 1, 3, 10_000, prompts=prompts) for pair in step[0]]
    assert sorted(order[::4]) == list(range(5))
    assert order[::4] != list(range(5))
