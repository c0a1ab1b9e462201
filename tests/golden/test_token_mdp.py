"""The identities of "From r to Q*" (arXiv 2404.12358) on a tree of tokens that can be listed whole, in float64.

A state is a beginning, an action the next token, and every text has as many tokens as the tree is deep, so that the
end needs no token of its own. Rewards are drawn at random for every token, references too.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from prefloop.evaluate.credit import token_rewards
from prefloop.losses.dpo import DPO
from prefloop.tensors import CompletionLogps, PairLogps

TOKENS, DEPTH, BETA = 3, 3, 0.7
TEXTS = list(itertools.product(range(TOKENS), repeat=DEPTH))
STATES = [state for length in range(DEPTH) for state in itertools.product(range(TOKENS), repeat=length)]


def drawn(seed, scale=1.0):
    """A number for every state and token."""
    generator = torch.Generator().manual_seed(seed)
    return {s: scale * torch.randn(TOKENS, generator=generator, dtype=torch.float64) for s in STATES}


def policy_of(logits):
    return {state: values.log_softmax(-1) for state, values in logits.items()}


def optimum(reward, reference, beta=BETA):
    """Soft Q* and V* by backward induction (eq. 6, 7), with V* 0 at the end."""
    value = dict.fromkeys(TEXTS, torch.zeros((), dtype=torch.float64))
    quality = {}
    for state in reversed(STATES):
        after = torch.stack([value[(*state, token)] for token in range(TOKENS)])
        quality[state] = reward[state] + beta * reference[state] + after
        value[state] = beta * torch.logsumexp(quality[state] / beta, -1)
    return quality, value


def log_probs(policy, text):
    return [policy[text[:place]][token] for place, token in enumerate(text)]


def total(values, text):
    return sum(values[text[:place]][token] for place, token in enumerate(text))


@pytest.fixture(scope="module")
def world():
    reward, reference = drawn(1), policy_of(drawn(2))
    quality, value = optimum(reward, reference)
    policy = {state: (quality[state] - value[state]) / BETA for state in STATES}
    return reward, reference, quality, value, policy


def test_the_policy_is_the_softmax_of_soft_q(world):
    _, _, quality, value, policy = world
    for state in STATES:
        assert float(policy[state].exp().sum()) == pytest.approx(1, abs=1e-14)
        expected = (quality[state] / BETA).softmax(-1)
        assert torch.allclose(policy[state].exp(), expected, atol=1e-14, rtol=0)
    assert all(value[text] == 0 for text in TEXTS)


def test_it_is_the_best_of_all_policies_for_reward_minus_kl(world):
    """V*(s_0) is the largest Σ π(y) (r(y) − beta log π(y)/ref(y)); any other policy reaches less."""
    reward, reference, _, value, policy = world

    def reached(other):
        terms = []
        for text in TEXTS:
            logp = total(other, text)
            terms.append(logp.exp() * (total(reward, text) - BETA * (logp - total(reference, text))))
        return float(sum(terms))

    assert reached(policy) == pytest.approx(float(value[()]), abs=1e-13)
    for seed in range(20):
        nudged = {s: policy[s] + 0.1 * noise for s, noise in drawn(100 + seed).items()}
        assert reached(policy_of(nudged)) < float(value[()])


def test_a_token_reward_is_the_reward_plus_the_difference_of_values(world):
    """Eq. 10, for every token of the tree, by the function that `prefloop credit` uses."""
    reward, reference, quality, value, policy = world
    for state in STATES:
        found = token_rewards(policy[state].tolist(), reference[state].tolist(), BETA)
        for token in range(TOKENS):
            shaped = reward[state][token] + value[(*state, token)] - value[state]
            assert found[token] == pytest.approx(float(shaped), abs=1e-13)
            # The same as an advantage: Q without the reference's part, minus V.
            advantage = quality[state][token] - BETA * reference[state][token] - value[state]
            assert found[token] == pytest.approx(float(advantage), abs=1e-13)


def test_token_rewards_telescope(world):
    """Σ over a text = Σ r − V*(s_0) (eq. 8), so that V*(s_0) cancels in a pair (eq. 9); over a beginning V stays."""
    reward, reference, _, value, policy = world
    sums = {}
    for text in TEXTS:
        rewards = token_rewards(
            [float(v) for v in log_probs(policy, text)], [float(v) for v in log_probs(reference, text)], BETA
        )
        sums[text] = sum(rewards)
        assert sums[text] == pytest.approx(float(total(reward, text) - value[()]), abs=1e-13)
        for length in range(1, DEPTH):
            so_far = sum(reward[text[:place]][text[place]] for place in range(length))
            expected = float(so_far + value[text[:length]] - value[()])
            assert sum(rewards[:length]) == pytest.approx(expected, abs=1e-13)
    for one, two in itertools.combinations(TEXTS, 2):
        difference = float(total(reward, one) - total(reward, two))
        assert sums[one] - sums[two] == pytest.approx(difference, abs=1e-13)


def test_only_sums_over_whole_texts_are_identified(world):
    """Rewards shaped by a potential, or given at the end alone, have one policy and one set of token rewards."""
    reward, reference, _, _, policy = world
    generator = torch.Generator().manual_seed(3)
    potential = {state: torch.randn((), generator=generator, dtype=torch.float64) for state in STATES}
    potential |= dict.fromkeys(TEXTS, torch.zeros((), dtype=torch.float64))
    shaped = {
        state: reward[state] + torch.stack([potential[(*state, token)] for token in range(TOKENS)]) - potential[state]
        for state in STATES
    }
    last = {
        state: torch.stack([total(reward, (*state, token)) for token in range(TOKENS)])
        if len(state) == DEPTH - 1
        else torch.zeros(TOKENS, dtype=torch.float64)
        for state in STATES
    }
    for other in (shaped, last):
        assert max(float((other[s] - reward[s]).abs().max()) for s in STATES) > 0.1
        quality, value = optimum(other, reference)
        for state in STATES:
            assert torch.allclose((quality[state] - value[state]) / BETA, policy[state], atol=1e-13, rtol=0)


def pairs_of(policy: dict[tuple[int, ...], Tensor], reference) -> PairLogps:
    """Every ordered pair of different texts."""
    rows = torch.tensor(list(itertools.permutations(range(len(TEXTS)), 2)))

    def side(values, place):
        logps = torch.stack([torch.stack(log_probs(values, text)) for text in TEXTS])[rows[:, place]]
        return CompletionLogps(logps, torch.ones_like(logps, dtype=torch.bool))

    ones = torch.ones(len(rows), dtype=torch.float64)
    return PairLogps(side(policy, 0), side(policy, 1), side(reference, 0), side(reference, 1), ones, ones)


def expected_dpo(logits, reference, reward):
    """The DPO loss over all pairs, each as often as a Bradley-Terry rater with reward Σ r chooses it."""
    loss = DPO(beta=BETA)(pairs_of(policy_of(logits), reference)).loss
    sums = [total(reward, text) for text in TEXTS]
    gaps = torch.stack([one - other for one, other in itertools.permutations(sums, 2)])
    return (torch.sigmoid(gaps) * loss).mean()


def test_the_optimum_of_dpo_has_the_advantage_as_its_token_rewards(world):
    """Trained on preferences over whole texts alone, from the reference on, every token's log-ratio is found."""
    reward, reference, _, _, policy = world
    logits = {state: values.clone().requires_grad_() for state, values in reference.items()}
    optimizer = torch.optim.LBFGS(
        logits.values(), max_iter=400, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = expected_dpo(logits, reference, reward)
        loss.backward()
        return loss

    optimizer.step(closure)
    trained = policy_of({state: values.detach() for state, values in logits.items()})
    gaps = [float((trained[state] - policy[state]).abs().max()) for state in STATES]
    assert max(gaps) < 1e-5
    started = [float((reference[state] - policy[state]).abs().max()) for state in STATES]
    assert max(started) > 0.5


def test_the_loss_of_dpo_is_flat_at_the_optimum_and_nowhere_near(world):
    reward, reference, _, _, policy = world
    for shift, flat in ((0.0, True), (0.05, False)):
        logits = {state: (policy[state] + shift * noise).requires_grad_() for state, noise in drawn(7).items()}
        expected_dpo(logits, reference, reward).backward()
        steepest = max(float(values.grad.abs().max()) for values in logits.values())
        assert (steepest < 1e-13) == flat


def test_search_with_reward_and_value_is_search_by_likelihood(world):
    """Eq. 12 = eq. 13 for beginnings of every length, and so for beams of every width."""
    reward, reference, _, value, policy = world

    def guided(start):
        steps = sum(reward[start[:i]][t] + BETA * reference[start[:i]][t] for i, t in enumerate(start))
        return float(steps + value[start])

    def likelihood(start):
        return float(BETA * sum(policy[start[:i]][t] for i, t in enumerate(start)))

    for length in range(1, DEPTH + 1):
        starts = list(itertools.product(range(TOKENS), repeat=length))
        assert max(starts, key=guided) == max(starts, key=likelihood)
        apart = {round(guided(s) - likelihood(s), 10) for s in starts}
        assert apart == {round(float(value[()]), 10)}
    for width in (1, 2, 5, TOKENS**DEPTH):
        assert searched(guided, width) == searched(likelihood, width)
    assert searched(likelihood, TOKENS**DEPTH)[0] == max(TEXTS, key=lambda text: float(total(policy, text)))


def searched(score, width):
    beam = [()]
    for _ in range(DEPTH):
        beam = sorted(((*s, t) for s in beam for t in range(TOKENS)), key=score, reverse=True)[:width]
    return beam


def test_every_class_of_rewards_has_a_member_that_is_a_log_ratio(world):
    """Theorem 1: beta log π* − beta log π_ref as a reward prefers as r does, and V*(s_0) = 0 and one optimum."""
    reward, reference, _, _, policy = world
    member = {state: BETA * (policy[state] - reference[state]) for state in STATES}
    quality, value = optimum(member, reference)
    assert all(abs(float(value[state])) < 1e-13 for state in STATES)
    for state in STATES:
        assert torch.allclose((quality[state] - value[state]) / BETA, policy[state], atol=1e-13, rtol=0)
    for one, two in itertools.combinations(TEXTS, 2):
        liked = float(torch.sigmoid(total(reward, one) - total(reward, two)))
        assert float(torch.sigmoid(total(member, one) - total(member, two))) == pytest.approx(liked, abs=1e-13)


def test_on_the_references_texts_the_reward_is_minus_a_divergence(world):
    """Eq. 16, exactly and by draws: E_ref[beta log π/ref] = −beta KL(ref ‖ π) ≤ 0, though single texts may be above."""
    _, reference, _, _, policy = world
    probabilities = torch.stack([total(reference, text) for text in TEXTS]).exp()
    sums = torch.stack([BETA * (total(policy, text) - total(reference, text)) for text in TEXTS])
    by_state = 0.0
    for state in STATES:
        reached = float(sum(reference[state[:i]][t] for i, t in enumerate(state)).exp()) if state else 1.0
        by_state += reached * float((reference[state].exp() * (reference[state] - policy[state])).sum())
    exact = float((probabilities * sums).sum())
    assert exact == pytest.approx(-BETA * by_state, abs=1e-13)
    assert exact < 0 < float(sums.max())
    generator = torch.Generator().manual_seed(11)
    values = sums[torch.multinomial(probabilities, 4000, replacement=True, generator=generator)]
    error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean()) - exact) < 4 * error
    assert float(values.mean()) < -3 * error


def test_proxy_tuning_from_the_reference_is_the_optimum_and_elsewhere_only_its_product(world):
    """Eq. 14: base = reference and beta 1 gives π*. From another base the product is not that base's own optimum."""
    reward, reference, _, _, policy = world
    base = policy_of(drawn(5))
    same, steered = (policy_of({s: start[s] + policy[s] - reference[s] for s in STATES}) for start in (reference, base))
    quality, value = optimum(reward, base)
    own = {state: (quality[state] - value[state]) / BETA for state in STATES}
    for state in STATES:
        assert torch.allclose(same[state], policy[state], atol=1e-13, rtol=0)
    # At the last token there is no later value, so the two agree there.
    last = [state for state in STATES if len(state) == DEPTH - 1]
    assert all(torch.allclose(steered[state], own[state], atol=1e-13, rtol=0) for state in last)
    assert not torch.allclose(steered[()], own[()], atol=1e-3)
