"""Completions without a rival: which are good or bad, what they are mismatched with, and how often they win."""

import math
import random

import pytest

from prefloop.components import build
from prefloop.errors import ConfigError, DataError
from prefloop.pair.unpaired import Unpaired
from prefloop.pair.win_rates import WinRates
from prefloop.protocols import RoundContext, views_of
from prefloop.recipe import Spec
from prefloop.rows import ABSENT, VERBATIM, Completion, JudgedGroup, Message, PolicyRef, Prompt, prompt_id

POLICY = PolicyRef("p", "0", 0)
CONTEXT = RoundContext(seed=0, round=1, policy=POLICY, start=POLICY)


def judged(scores, texts=None, question="Q", win_prob=None):
    messages = (Message(VERBATIM, question),)
    prompt = Prompt(prompt_id(messages), messages, None, "train", "test:1")
    texts = texts or [f"{question} {i}" for i in range(len(scores))]
    completions = tuple(Completion(f"{question}/{i}", t, None, None, "stop", 0, "p") for i, t in enumerate(texts))
    notes = tuple("no verdict" if score is None else None for score in scores)
    return JudgedGroup(prompt, completions, "p", 1, 1.0, 1.0, tuple(scores), win_prob, "j", notes)


def sides(builder, *groups):
    """(index of the completion in its group, whether it is good) of every row."""
    rows = list(builder(groups, CONTEXT))
    assert all((row.chosen == ABSENT) != (row.rejected == ABSENT) for row in rows)
    assert all((row.chosen_score is None) != (row.rejected_score is None) for row in rows)
    found = [(row.rejected, False) if row.chosen == ABSENT else (row.chosen, True) for row in rows]
    return [(int(completion.completion_id.rpartition("/")[2]), good) for completion, good in found]


@pytest.mark.parametrize(
    ("settings", "scores", "expected"),
    [
        ({}, [1.0, 0.0, None, 1.0], [(0, True), (1, False), (3, True)]),
        ({"threshold": 3.0}, [5, 3, 1, 4], [(0, True), (2, False), (3, True)]),
        ({}, [0.5, 0.5], []),
        ({"rule": "rank"}, [2, 9, None, 1], [(1, True), (3, False)]),
        ({"rule": "rank", "best": 2}, [2, 9, 5, 1], [(1, True), (2, True), (3, False)]),
        ({"rule": "rank", "best": 2, "worst": 2}, [1, 2, 3], [(0, False), (2, True)]),
        ({"rule": "rank", "best": 2, "worst": 2}, [1, 2], []),
        ({"rule": "rank"}, [4, 4, 4], []),
        ({"rule": "rank"}, [7], []),
        ({"rule": "rank"}, [None], []),
        ({"rule": "rank", "best": 2}, [4, 4, 1], [(0, True), (1, True), (2, False)]),
        ({"rule": "rank", "best": 2}, [4, 1, 1], [(0, True)]),
    ],
)
def test_scores_say_what_is_good_and_what_is_bad(settings, scores, expected):
    assert sides(Unpaired(**settings, mismatched=False), judged(scores)) == expected


def test_equal_contents_come_once_on_a_side_and_may_come_on_both():
    """Two people may label the same answer differently; the same label twice says nothing new."""
    group = judged([1, 1, 0, 0], texts=["a", "a", "a", "b"])
    assert sides(Unpaired(mismatched=False), group) == [(0, True), (2, False), (3, False)]
    assert sides(Unpaired(rule="rank", mismatched=False), judged([3, 2, 1], ["a", "a", "b"])) == [
        (0, True),
        (2, False),
    ]


def many_groups(draw):
    return [judged([draw.choice([0, 1, 0.5]) for _ in range(draw.randint(0, 4))], question=f"Q{i}") for i in range(12)]


@pytest.mark.parametrize("seed", range(5))
def test_every_completion_is_shown_once_under_another_prompt(seed):
    groups = many_groups(random.Random(seed))
    rows = list(Unpaired()(groups, CONTEXT))
    plain = list(Unpaired(mismatched=False)(groups, CONTEXT))
    assert [(row.pair_id, row.chosen, row.rejected) for row in rows] == [
        (row.pair_id, row.chosen, row.rejected) for row in plain
    ]
    own = [row.rejected if row.chosen == ABSENT else row.chosen for row in rows]
    shown = []
    for row in rows:
        (view,) = row.views
        assert view.name == "mismatched"
        assert view.messages == row.prompt.messages
        assert not view.completion.text.startswith(f"{row.prompt.text} ")
        shown.append(view.completion.completion_id)
    assert sorted(shown) == sorted(completion.completion_id for completion in own)
    assert list(Unpaired()(iter(groups), CONTEXT)) == rows


@pytest.mark.parametrize("counts", [(1,), (2, 1), (3, 2)])
def test_a_round_that_cannot_be_mismatched_is_refused(counts):
    groups = [judged([1] * count, question=f"Q{i}") for i, count in enumerate(counts)]
    with pytest.raises(DataError, match=r"pair_builder\.mismatched: \d of the round's \d completions"):
        list(Unpaired()(groups, CONTEXT))
    assert len(list(Unpaired(mismatched=False)(groups, CONTEXT))) == sum(counts)


def test_half_of_a_round_may_be_of_one_prompt_and_a_round_without_rows_has_none():
    groups = [judged([1, 1], question="A"), judged([0], question="B"), judged([1], question="C")]
    assert [row.views[0].completion.text for row in Unpaired()(groups, CONTEXT)] == ["B 0", "C 0", "A 0", "A 1"]
    assert list(Unpaired()([], CONTEXT)) == []


def test_it_says_which_views_it_makes():
    assert views_of(Unpaired()) == ("mismatched",)
    assert views_of(Unpaired(mismatched=False)) == ()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rule": "mean"}, "threshold"),
        ({"threshold": math.nan}, "must be a number, got nan"),
        ({"best": 0}, r"pair_builder\.best .*≥ 1, got 0"),
        ({"worst": -1}, r"pair_builder\.worst .*≥ 1, got -1"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        build("pair_builder", Spec.model_validate({"kind": "unpaired", **settings}))


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def test_win_rates_count_every_completion_of_the_prompt_and_itself_as_half():
    """The authors' code: P_ij = σ(s_i − s_j), P(y_i beats π) = 1/K·Σ_j P_ij with P_ii = ½."""
    scores = [1.0, -0.5, 2.0]
    rates = WinRates().rates(judged([*scores[:2], None, scores[2]]))
    expected = [sum(sigmoid(mine - theirs) for theirs in scores) / 3 for mine in scores]
    assert list(rates) == [0, 1, 3]
    assert list(rates.values()) == pytest.approx(expected, rel=1e-12)
    assert sum(rates.values()) == pytest.approx(1.5)


def test_win_rates_go_to_the_side_that_they_belong_to():
    group = judged([1.0, -0.5, 2.0])
    rates = WinRates(scale=2.0).rates(group)
    best, worst = WinRates(scale=2.0)([group], CONTEXT)
    assert (best.chosen, best.win_prob) == (group.completions[2], rates[2])
    assert (worst.rejected, worst.win_prob) == (group.completions[1], 1 - rates[1])
    every = list(WinRates(keep="all")([group], CONTEXT))
    assert [(row.chosen != ABSENT, row.win_prob > 0.5) for row in every] == [(True, True), (False, True), (True, True)]


def test_a_judge_that_compares_is_believed_and_scores_are_then_not_read():
    wins = ((0.5, 0.9, 0.2), (0.1, 0.5, 0.3), (0.8, 0.7, 0.5))
    rates = WinRates().rates(judged([3.0, 2.0, 1.0], win_prob=wins))
    assert list(rates.values()) == pytest.approx([1.6 / 3, 0.9 / 3, 2.0 / 3])


@pytest.mark.parametrize("scores", [[], [1.0], [2.0, 2.0], [None, 1.0]])
def test_without_a_difference_there_are_no_win_rates_to_learn(scores):
    for keep in ("best_and_worst", "all"):
        assert sides(WinRates(keep), judged(scores)) == []


@pytest.mark.parametrize(("settings", "words"), [({"keep": "some"}, "best_and_worst"), ({"scale": 0.0}, "> 0, got 0")])
def test_impossible_settings_of_win_rates_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        build("pair_builder", Spec.model_validate({"kind": "win_rates", **settings}))
