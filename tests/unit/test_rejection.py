import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest

from prefloop.components import build
from prefloop.errors import ConfigError
from prefloop.launch import read_recipe
from prefloop.pair.rejection import Rejection
from prefloop.protocols import RoundContext
from prefloop.recipe import Spec
from prefloop.rows import VERBATIM, Completion, JudgedGroup, Message, PolicyRef, Prompt, digest_of, prompt_id

POLICY = PolicyRef("p", "0", 0)
CRITICAL = {1: 10.83, 2: 13.82, 5: 20.52, 9: 27.88}
"""Chi-square's 0.1 % point, by degrees of freedom."""


def context(seed=0, turn=0):
    return RoundContext(seed=seed, round=turn, policy=POLICY, start=POLICY)


def judged(scores, texts=None, question="Q", win_prob=None):
    messages = (Message(VERBATIM, question),)
    prompt = Prompt(prompt_id(messages), messages, None, "train", "test:1")
    texts = texts or [f"text {i}" for i in range(len(scores))]
    completions = tuple(Completion(f"{question}{i}", t, None, None, "stop", 0, "p") for i, t in enumerate(texts))
    notes = tuple("no verdict" if score is None else None for score in scores)
    return JudgedGroup(prompt, completions, "p", 3, 1.0, 1.0, tuple(scores), win_prob, "j", notes)


def indices(builder, group, **where):
    place = {completion.completion_id: index for index, completion in enumerate(group.completions)}
    pairs = builder([group], context(**where))
    return [(place[p.chosen.completion_id], place[p.rejected.completion_id]) for p in pairs]


def accepted(group, seed, **fields):
    """Who was accepted: where no two scores are equal, everybody plays in a tournament."""
    games = indices(Rejection(pairing="tournament", **fields), group, seed=seed)
    return tuple(sorted({player for game in games for player in game}))


def chi_square(counts, law):
    total = sum(counts.values())
    assert set(counts) <= set(law)
    return sum((counts[k] - total * p) ** 2 / (total * p) for k, p in law.items())


def exact_law(scores, beta, k):
    """The law of the accepted set, by enumerating every order of the pool and every outcome of every visit."""
    law: Counter = Counter()

    def visit(order, position, taken, top, weight):
        if len(taken) == k:
            law[tuple(sorted(taken))] += weight
        elif position == len(order):
            left = [i for i in order if i not in taken]
            visit(left, 0, taken, max(scores[i] for i in left), weight)
        else:
            chance = math.exp((scores[order[position]] - top) / beta)
            visit(order, position + 1, [*taken, order[position]], top, weight * chance)
            if chance < 1 and weight > 1e-9:
                visit(order, position + 1, taken, top, weight * (1 - chance))

    orders = list(itertools.permutations(range(len(scores))))
    for order in orders:
        visit(list(order), 0, [], max(scores), 1 / len(orders))
    return law


def test_beta_0_accepts_the_k_best():
    group = judged([0.3, 2.0, -1.0, 1.0, 0.5, None])
    assert {accepted(group, seed, beta=0.0, accept=3) for seed in range(50)} == {(1, 3, 4)}
    assert {accepted(group, seed, beta=1e-6, accept=3) for seed in range(50)} == {(1, 3, 4)}


@pytest.mark.parametrize("beta", [1e9, math.inf])
def test_a_large_beta_accepts_any_k_alike(beta):
    group = judged([0.0, 1.0, 2.0, 3.0, 4.0])
    counts = Counter(accepted(group, seed, beta=beta, accept=2) for seed in range(3000))
    law = dict.fromkeys(itertools.combinations(range(5), 2), Fraction(1, 10))
    assert chi_square(counts, law) < CRITICAL[9]


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_accepted_sets_follow_the_algorithms_exact_law(beta):
    scores = [0.0, 0.4, 0.9, 1.0]
    law = exact_law(scores, beta, 2)
    assert sum(law.values()) == pytest.approx(1, abs=1e-6)
    counts = Counter(accepted(judged(scores), seed, beta=beta, accept=2) for seed in range(4000))
    assert chi_square(counts, law) < CRITICAL[5]


def test_accepted_completions_follow_the_tilted_law():
    rewards, shares, beta = (0.0, 1.0, 2.0), (200, 120, 80), 0.8
    kinds = [kind for kind, share in enumerate(shares) for _ in range(share)]
    group = judged([rewards[kind] + index * 1e-9 for index, kind in enumerate(kinds)])
    counts = Counter(kinds[i] for seed in range(800) for i in accepted(group, seed, beta=beta, accept=4))
    weights = [share * math.exp(reward / beta) for share, reward in zip(shares, rewards, strict=True)]
    assert chi_square(counts, {kind: w / sum(weights) for kind, w in enumerate(weights)}) < CRITICAL[2]


def test_the_best_is_accepted_in_the_first_pass():
    group = judged([-50.0, -51.0, 0.0, -52.0])
    sets = Counter(accepted(group, seed, beta=0.5, accept=2) for seed in range(300))
    assert all(2 in players for players in sets)
    assert sets[(0, 2)] > 250, "the second pass begins with a new best"


def test_nothing_is_rejected_where_there_are_no_more_than_k():
    group = judged([1.0, -9.0, 3.0])
    assert {accepted(group, seed, accept=k) for seed in range(20) for k in (3, 8)} == {(0, 1, 2)}


@pytest.mark.parametrize("pairing", ["first_round", "tournament"])
@pytest.mark.parametrize("scores", [[], [1.0], [1.0, 1.0, 1.0], [None, None], [None, 1.0]])
def test_no_difference_no_pair(pairing, scores):
    assert indices(Rejection(pairing=pairing), judged(scores)) == []


def test_the_first_round_pairs_two_by_two_and_the_tournament_goes_on():
    for count in (2, 5, 7, 8):
        group = judged([float(i * i) for i in range(count)])
        for seed in range(20):
            first = indices(Rejection(), group, seed=seed)
            games = indices(Rejection(pairing="tournament"), group, seed=seed)
            assert len({player for game in first for player in game}) == 2 * len(first) == count - count % 2
            assert games[: len(first)] == first
            assert sorted(loser for _, loser in games) == list(range(count - 1)), "everybody but the best loses once"
            assert all(winner > loser for winner, loser in games)


def test_who_plays_whom_is_drawn():
    group = judged([4.0, 3.0, 2.0, 1.0])
    builder = Rejection(beta=0.0, accept=4)
    counts = Counter(tuple(sorted(indices(builder, group, seed=seed))) for seed in range(900))
    draws = [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]
    assert chi_square(counts, dict.fromkeys(draws, 1 / 3)) < CRITICAL[2]


def test_a_tie_makes_no_pair_and_one_of_the_two_goes_on():
    group = judged([1.0, 1.0, 0.0, 0.0])
    for seed in range(50):
        games = indices(Rejection(pairing="tournament"), group, seed=seed)
        assert 1 <= len(games) <= 2
        assert all(winner in (0, 1) and loser in (2, 3) for winner, loser in games)
    assert {len(indices(Rejection(), group, seed=seed)) for seed in range(50)} == {0, 2}


def test_equal_scores_at_the_edge_are_drawn():
    group = judged([2.0, 1.0, 1.0])
    drawn = Counter(indices(Rejection(beta=0.0, accept=2), group, seed=seed)[0] for seed in range(400))
    assert chi_square(drawn, {(0, 1): 0.5, (0, 2): 0.5}) < CRITICAL[1]


def test_completions_of_one_content_count_once_and_unscored_ones_never():
    group = judged([None, 1.0, 5.0, 0.0, None], ["a", "a", "a", "b", "c"])
    assert {tuple(indices(Rejection(accept=k), group, seed=s)) for s in range(20) for k in (2, 8)} == {((1, 3),)}


def test_the_draw_depends_on_seed_round_and_prompt_only():
    groups = [judged([float(k * (i + 3) % 11) for k in range(10)], question=f"Q{i}") for i in range(20)]
    builder = Rejection(beta=3.0, accept=4)

    def draws(order, **where):
        found: dict[str, list[str]] = {}
        for pair in builder(order, context(**where)):
            found.setdefault(pair.prompt.prompt_id, []).append(pair.pair_id)
        return found

    assert draws(groups) == draws(groups[::-1]) == {k: v for g in groups for k, v in draws([g]).items()}
    assert draws(groups) != draws(groups, seed=1)
    assert draws(groups) != draws(groups, turn=1)
    same_scores = [judged([float(k) for k in range(10)], question=f"Q{i}") for i in range(20)]
    assert len({accepted(group, 0, beta=3.0, accept=4) for group in same_scores}) > 1


def test_scores_of_any_size_are_taken():
    group = judged([-1e308, 1e308, 0.0, 1e-300])
    for beta in (0.0, 1e-300, 0.5, 1e300):
        assert accepted(group, 0, beta=beta, accept=4) == (0, 1, 2, 3)


def test_a_pair_says_where_it_comes_from():
    win_prob = ((0.5, 0.1), (0.9, 0.5))
    group = judged([1.0, 3.0], win_prob=win_prob)
    (pair,) = Rejection()([group], context())
    assert pair.chosen is group.completions[1]
    assert pair.pair_id == digest_of("Q1", "Q0")
    assert (pair.chosen_score, pair.rejected_score, pair.margin, pair.win_prob) == (3.0, 1.0, 2.0, 0.9)
    assert (pair.weight, pair.builder, pair.round, pair.flipped) == (1.0, "rejection/first_round", 3, False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": -0.1}, r"pair_builder\.beta .*must be a number ≥ 0, got -0\.1"),
        ({"beta": math.nan}, r"pair_builder\.beta .*got nan"),
        ({"accept": 1}, r"pair_builder\.accept .*must be ≥ 2, got 1"),
        ({"pairing": "league"}, r"pair_builder\.pairing.* first_round or tournament, got 'league'"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Rejection(**fields)


@pytest.mark.parametrize("more", [[], ["policy=p", "prompts=q"]], ids=["embedded", "own"])
def test_the_recipe_draws_more_completions_than_it_accepts(more):
    recipe, _ = read_recipe("rso", more)
    builder = build("pair_builder", recipe.pair_builder)
    assert builder.accept < build("sampler", recipe.sampler).completions
    assert build("loss", recipe.loss).beta == build("loss", Spec(kind="hinge")).beta
