import pytest

from prefloop.errors import ConfigError
from prefloop.pair.dynamic_labels import DynamicLabels
from prefloop.pair.versus_gold import VersusGold
from prefloop.protocols import RoundContext
from prefloop.rows import (
    GOLD,
    VERBATIM,
    Completion,
    JudgedGroup,
    Message,
    PolicyRef,
    Prompt,
    digest_of,
    gold_completion,
)

POLICY = PolicyRef("p", "0", 0)
CONTEXT = RoundContext(0, 2, POLICY, POLICY)


def group(human, *own, texts=None, gold="human", win_prob=None):
    """Own answers with their scores; the gold one stands last, as the judge stage puts it."""
    prompt = Prompt("id", (Message(VERBATIM, "q"),), gold, "train", "here:1")
    texts = texts or [f"own {i}" for i in range(len(own))]
    completions = [Completion(f"c{i}", text, (1,), (-1.0,), "stop", i, "p") for i, text in enumerate(texts)]
    scores = list(own)
    if gold is not None:
        completions.append(gold_completion(prompt))
        scores.append(human)
    notes = tuple("no verdict" if score is None else None for score in scores)
    return JudgedGroup(prompt, tuple(completions), "p", 2, 1.0, 1.0, tuple(scores), win_prob, "j", notes)


def labels(builder, one):
    """Return (chosen, rejected, margin, flipped) of each pair."""
    return [(p.chosen.text, p.rejected.text, p.margin, p.flipped) for p in builder([one], CONTEXT)]


HUMAN, OWN = ("human", "own 0"), ("own 0", "human")


@pytest.mark.parametrize(
    ("ties", "tie_margin", "human", "own", "expected"),
    [
        ("keep_human", 0.0, 2.0, 1.0, [(*HUMAN, 1.0, False)]),
        ("keep_human", 0.0, 1.0, 2.0, [(*OWN, 1.0, True)]),
        ("keep_human", 0.0, 1.0, 1.0, [(*HUMAN, 0.0, False)]),
        ("drop", 0.0, 2.0, 1.0, [(*HUMAN, 1.0, False)]),
        ("drop", 0.0, 1.0, 2.0, [(*OWN, 1.0, True)]),
        ("drop", 0.0, 1.0, 1.0, []),
        ("keep_human", 0.5, 1.0, 1.5, [(*HUMAN, 0.0, False)]),
        ("keep_human", 0.5, 1.5, 1.0, [(*HUMAN, 0.5, False)]),
        ("keep_human", 0.5, 1.0, 1.75, [(*OWN, 0.75, True)]),
        ("drop", 0.5, 1.0, 1.5, []),
        ("drop", 0.5, 1.5, 1.0, []),
        ("drop", 0.5, 1.75, 1.0, [(*HUMAN, 0.75, False)]),
        ("keep_human", 0.0, None, 1.0, []),
        ("keep_human", 0.0, 1.0, None, []),
        ("keep_human", 0.0, None, None, []),
    ],
)
def test_the_judge_decides_each_pair(ties, tie_margin, human, own, expected):
    assert labels(DynamicLabels(ties=ties, tie_margin=tie_margin), group(human, own)) == expected


@pytest.mark.parametrize(
    ("human", "own", "margin"), [(1.0, 2.0, 0.0), (2.0, 1.0, 1.0), (1.0, 1.0, 0.0), (None, 1.0, 0.0), (None, None, 0.0)]
)
def test_the_warm_up_prefers_the_human_whatever_the_scores(human, own, margin):
    assert labels(DynamicLabels(prefer="human", ties="drop"), group(human, own)) == [(*HUMAN, margin, False)]


def test_every_own_answer_meets_the_human_one():
    one = group(1.0, 0.0, None, 2.0, 1.0)
    assert labels(DynamicLabels(), one) == [
        ("human", "own 0", 1.0, False),
        ("own 2", "human", 1.0, True),
        ("human", "own 3", 0.0, False),
    ]


def test_a_judge_that_always_prefers_the_human_gives_the_pairs_of_spin_and_its_opposite_swaps_them_all():
    own = (0.0, -1.0, -2.0)
    spin = {(p.chosen, p.rejected) for p in VersusGold()([group(1.0, *own)], CONTEXT)}
    always_human = list(DynamicLabels()([group(1.0, *own)], CONTEXT))
    always_own = list(DynamicLabels()([group(-3.0, *own)], CONTEXT))
    assert {(p.chosen, p.rejected) for p in always_human} == spin
    assert {(p.rejected, p.chosen) for p in always_own} == spin
    assert {p.flipped for p in always_human} == {False}
    assert {p.flipped for p in always_own} == {True}


def test_a_group_without_a_human_answer_makes_no_pair():
    assert labels(DynamicLabels(), group(None, 1.0, 2.0, gold=None)) == []
    assert labels(DynamicLabels(), group(1.0)) == []
    assert list(DynamicLabels()([], CONTEXT)) == []


def test_the_human_text_and_a_repeated_text_teach_nothing_new():
    one = group(1.0, 0.0, 0.0, 5.0, None, 0.0, texts=["a", "a", "human", "b", "b"])
    assert [(p.chosen.text, p.rejected.text) for p in DynamicLabels()([one], CONTEXT)] == [
        ("human", "a"),
        ("human", "b"),
    ]


def test_a_pair_says_where_both_sides_come_from():
    win_prob = ((0.5, 0.9), (0.1, 0.5))
    (pair,) = DynamicLabels()([group(1.0, 3.0, win_prob=win_prob)], CONTEXT)
    assert (pair.chosen.source, pair.rejected.source) == ("p", GOLD)
    assert (pair.chosen.token_ids, pair.rejected.token_ids) == ((1,), None)
    assert (pair.chosen_score, pair.rejected_score, pair.margin, pair.win_prob) == (3.0, 1.0, 2.0, 0.9)
    assert pair.pair_id == digest_of(pair.chosen.completion_id, pair.rejected.completion_id)
    assert (pair.weight, pair.builder, pair.round) == (1.0, "dynamic_labels", 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ties": "own"}, "ties: must be keep_human or drop, got 'own'"),
        ({"prefer": "own"}, "prefer: must be score or human, got 'own'"),
        ({"tie_margin": -1.0}, r"tie_margin: must be a number ≥ 0, got -1\.0"),
        ({"tie_margin": float("nan")}, "tie_margin: must be"),
        ({"tie_margin": float("inf")}, "tie_margin: must be"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        DynamicLabels(**fields)
