import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefloop.components import build
from prefloop.errors import ConfigError
from prefloop.launch import read_recipe
from prefloop.pair.ranked import Ranked
from prefloop.protocols import RoundContext
from prefloop.rows import VERBATIM, Completion, JudgedGroup, Message, PolicyRef, Prompt, digest_of, prompt_id

POLICY = PolicyRef("p", "0", 0)
RULES = ("best_vs_worst", "best_vs_random", "above_margin")


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
    pairs = builder([group], context(**where))
    return [(group.completions.index(p.chosen), group.completions.index(p.rejected)) for p in pairs]


def test_best_vs_worst_takes_the_largest_margin():
    assert indices(Ranked(), judged([0.5, 2.0, None, -1.0, 1.0])) == [(1, 3)]


def test_ties_go_by_index():
    assert indices(Ranked(), judged([1.0, 0.0, 1.0, 0.0])) == [(0, 1)]
    assert indices(Ranked(rule="above_margin"), judged([1.0, 0.0, 1.0])) == [(0, 1), (2, 1)]


@pytest.mark.parametrize("rule", ["best_vs_worst", "best_vs_random", "above_margin"])
@pytest.mark.parametrize("scores", [[], [1.0], [1.0, 1.0], [None, None], [None, 1.0], [1.0, None, 1.0]])
def test_no_difference_no_pair(rule, scores):
    assert indices(Ranked(rule=rule), judged(scores)) == []


@pytest.mark.parametrize("rule", ["best_vs_worst", "best_vs_random", "above_margin"])
def test_a_margin_must_exceed_min_margin(rule):
    assert indices(Ranked(rule=rule, min_margin=1.0), judged([2.0, 1.0])) == []
    assert indices(Ranked(rule=rule, min_margin=0.9), judged([2.0, 1.0])) == [(0, 1)]


def test_above_margin_takes_every_clear_pair_largest_first():
    group = judged([0.0, 3.0, 1.0, 1.5])
    assert indices(Ranked(rule="above_margin"), group) == [(1, 0), (1, 2), (1, 3), (3, 0), (2, 0), (3, 2)]
    assert indices(Ranked(rule="above_margin", min_margin=1.0), group) == [(1, 0), (1, 2), (1, 3), (3, 0)]
    assert indices(Ranked(rule="above_margin", max_pairs=2), group) == [(1, 0), (1, 2)]


def test_best_vs_random_keeps_the_best_and_draws_every_loser():
    group = judged([1.0, 3.0, 2.9, None, 0.0])
    builder = Ranked(rule="best_vs_random", min_margin=0.5)
    drawn = Counter(rejected for seed in range(200) for _, rejected in indices(builder, group, seed=seed))
    assert set(drawn) == {0, 4}
    assert 60 < drawn[0] < 140
    assert {chosen for seed in range(20) for chosen, _ in indices(builder, group, seed=seed)} == {1}


def test_the_draw_depends_on_seed_round_and_prompt_only():
    builder = Ranked(rule="best_vs_random")
    groups = [judged([5.0, 1.0, 2.0, 3.0, 4.0], question=f"Q{i}") for i in range(20)]

    def draws(order, **where):
        return {p.prompt.prompt_id: p.rejected.completion_id[-1] for p in builder(order, context(**where))}

    assert draws(groups) == draws(groups[::-1]) == {k: v for g in groups for k, v in draws([g]).items()}
    assert draws(groups) != draws(groups, seed=1)
    assert draws(groups) != draws(groups, turn=1)
    assert len(set(draws(groups).values())) > 1


def test_rules_on_four_rewards():
    """RLHFlow's pair rules on one vector: max_min, max_random over three losers; a vector of ties makes no row."""
    group = judged([0.2, 1.5, -0.7, 0.9])
    assert indices(Ranked(), group) == [(1, 2)]
    drawn = {indices(Ranked(rule="best_vs_random"), group, seed=seed)[0] for seed in range(60)}
    assert drawn == {(1, 0), (1, 2), (1, 3)}
    assert all(indices(Ranked(rule=rule), judged([0.4] * 4)) == [] for rule in RULES)


def test_right_chains_meet_wrong_ones_up_to_ten_a_question():
    """Iterative RPO's pairs: rewards 1 and 0; a question that is all right or all wrong makes none."""
    recipe, _ = read_recipe("iterative_rpo", ["policy=p", "prompts=q", "judge={kind: verifier, mode: number}"])
    builder = build("pair_builder", recipe.pair_builder)
    for right in range(6):
        scores = [1.0] * right + [0.0] * (5 - right)
        pairs = indices(builder, judged(scores))
        assert len(pairs) == min(10, right * (5 - right))
        assert all((scores[chosen], scores[rejected]) == (1.0, 0.0) for chosen, rejected in pairs)
    many = indices(builder, judged([1.0, 0.0] * 15))
    assert len(set(many)) == len(many) == 10


def test_the_same_text_never_pairs_with_itself():
    scores, texts = [3.0, 2.0, 1.0], ["a", "b", "a"]
    assert indices(Ranked(), judged(scores, texts)) == [(0, 1)]
    assert indices(Ranked(), judged([1.0, 0.0], ["a", "a"])) == []
    assert indices(Ranked(rule="above_margin"), judged(scores, texts)) == [(0, 1), (1, 2)]
    assert indices(Ranked(drop_identical=False), judged(scores, texts)) == [(0, 2)]


def test_the_same_two_texts_pair_once():
    group = judged([2.0, 2.0, 0.0], ["a", "a", "b"])
    assert indices(Ranked(rule="above_margin"), group) == [(0, 2)]
    assert indices(Ranked(rule="above_margin", drop_identical=False), group) == [(0, 2), (1, 2)]


def test_a_pair_says_where_it_comes_from():
    win_prob = ((0.5, 0.1), (0.9, 0.5))
    group = judged([1.0, 3.0], win_prob=win_prob)
    (pair,) = Ranked()([group], context())
    assert pair.chosen is group.completions[1]
    assert pair.pair_id == digest_of("Q1", "Q0")
    assert (pair.chosen_score, pair.rejected_score, pair.margin, pair.win_prob) == (3.0, 1.0, 2.0, 0.9)
    assert (pair.weight, pair.builder, pair.round, pair.flipped) == (1.0, "ranked/best_vs_worst", 3, False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rule": "worst"}, r"rule: must be best_vs_worst, .* got 'worst'"),
        ({"min_margin": -0.1}, r"min_margin: must be a number ≥ 0, got -0\.1"),
        ({"min_margin": float("nan")}, "min_margin: must be"),
        ({"min_margin": float("inf")}, "min_margin: must be"),
        ({"rule": "above_margin", "max_pairs": 0}, "max_pairs: must be ≥ 1, got 0"),
        ({"max_pairs": 3}, "max_pairs: best_vs_worst makes one pair"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Ranked(**fields)


@settings(max_examples=150, deadline=None)
@given(
    scores=st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.floats(-5, 5)), max_size=6),
    rule=st.sampled_from(["best_vs_worst", "best_vs_random", "above_margin"]),
    margin=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 10),
)
def test_rules_agree_with_a_plain_count(scores, rule, margin, seed):
    texts = [random.Random(seed + i).choice("abc") for i in range(len(scores))]
    group = judged(scores, texts)
    known = [i for i, score in enumerate(scores) if score is not None]
    usable = {
        (i, j)
        for i in known
        for j in known
        if scores[i] - scores[j] > margin and scores[i] > scores[j] and texts[i] != texts[j]
    }
    pairs = indices(Ranked(rule=rule, min_margin=margin), group, seed=seed)
    assert set(pairs) <= usable
    if rule == "above_margin":
        assert {(texts[i], texts[j]) for i, j in pairs} == {(texts[i], texts[j]) for i, j in usable}
    else:
        assert len(pairs) == min(1, len(usable))
    if pairs and rule == "best_vs_worst":
        assert scores[pairs[0][0]] - scores[pairs[0][1]] == max(scores[i] - scores[j] for i, j in usable)
    if pairs and rule == "best_vs_random":
        assert scores[pairs[0][0]] == max(scores[i] for i, _ in usable)
