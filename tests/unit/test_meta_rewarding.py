"""Meta-Rewarding's pairs: length control for the actor, best against worst judgement for the judge."""

import random
from dataclasses import replace

import pytest

from prefloop.errors import ConfigError
from prefloop.pair.meta_rewarding import MetaRewarding
from prefloop.pair.ranked import Ranked
from prefloop.protocols import RoundContext
from prefloop.rows import VERBATIM, Completion, JudgedGroup, Judgement, Message, PolicyRef, Prompt, prompt_id

POLICY = PolicyRef("p", "0", 0)
CONTEXT = RoundContext(seed=0, round=1, policy=POLICY, start=POLICY)
QUESTION = (Message("user", "Grade this."),)


def completion(name, text, finish="stop"):
    return Completion(name, text, (5, 2), (-1.0, -1.0), finish, 0, "p")


def judged(scores, lengths, judgements=()):
    messages = (Message(VERBATIM, f"Q {scores} {lengths}"),)
    prompt = Prompt(prompt_id(messages), messages, "gold", "train", "here:1")
    texts = [str(i) * length for i, length in enumerate(lengths)]
    made = tuple(completion(f"{i}", text) for i, text in enumerate(texts))
    notes = tuple("none" if score is None else None for score in scores)
    return JudgedGroup(prompt, made, "p", 1, 1.0, 1.0, tuple(scores), None, "j", notes, tuple(judgements))


def sides(group, **fields):
    return [(p.chosen.completion_id, p.rejected.completion_id) for p in MetaRewarding(**fields)([group], CONTEXT)]


def random_groups():
    draw = random.Random(0)
    for _ in range(200):
        count = draw.randrange(2, 8)
        yield judged(
            [draw.choice([None, draw.randrange(6), draw.random() * 5]) for _ in range(count)],
            [draw.randrange(1, 30) for _ in range(count)],
        )


def test_without_a_band_it_is_best_against_worst():
    groups = [g for g in random_groups() if len({s for s in g.scores if s is not None}) == len(g.scores)]
    assert len(groups) > 30
    ours, plain = MetaRewarding(rho=0.0)(groups, CONTEXT), Ranked()(groups, CONTEXT)
    assert [(p.chosen, p.rejected, p.margin) for p in ours] == [(p.chosen, p.rejected, p.margin) for p in plain]


def test_with_the_whole_band_it_is_shortest_against_longest():
    made = 0
    for group in random_groups():
        known = [i for i, score in enumerate(group.scores) if score is not None]
        length = [len(c.text) for c in group.completions]
        if len({length[i] for i in known}) < len(known) or len(known) < 2:
            continue
        shortest, longest = min(known, key=length.__getitem__), max(known, key=length.__getitem__)
        right = [(str(shortest), str(longest))] if group.scores[shortest] > group.scores[longest] else []
        assert sides(group, rho=1.0) == right
        made += len(right)
    assert made > 20


def test_the_bands_are_a_share_of_the_range_of_scores():
    #      S_max 5, S_min 1: with ρ = 0.25 the bands are [4, 5] and [1, 2]
    group = judged([5.0, 4.0, 3.9, 2.1, 2.0, 1.0], [9, 3, 1, 20, 12, 4])
    assert sides(group, rho=0.25) == [("1", "4")]
    assert sides(group, rho=0.2) == [("0", "5")]
    (pair,) = MetaRewarding(rho=0.25)([group], CONTEXT)
    assert (pair.chosen_score, pair.rejected_score, pair.margin, pair.round) == (4.0, 2.0, 2.0, 1)
    assert pair.prompt == group.prompt


def test_equal_lengths_go_by_score_then_by_place_and_equal_texts_make_no_pair():
    assert sides(judged([5.0, 4.9, 5.0, 1.0, 1.1, 1.0], [2, 2, 2, 4, 4, 4]), rho=0.1) == [("0", "3")]
    same = judged([5.0, 1.0], [1, 1])
    same = JudgedGroup(**{**fields_of(same), "completions": (completion("a", "x"), completion("b", "x"))})
    assert sides(same) == []
    assert sides(judged([None, None], [1, 2])) == sides(judged([3.0, 3.0], [1, 2])) == []


def fields_of(group):
    return {name: getattr(group, name) for name in JudgedGroup.__slots__}


def judgement(index, text, score, rating, messages=QUESTION):
    return Judgement(index, messages, completion(f"j-{index}-{text}", text), score, rating)


def judge_pairs(group, **fields):
    return [p for p in MetaRewarding(**fields)([group], CONTEXT) if p.builder == "meta_rewarding/judge"]


STEADY = [judgement(0, "a 3", 3.0, 2.0), judgement(0, "b 3", 3.0, -2.0)]
TORN = [judgement(1, "c 5", 5.0, -0.5), judgement(1, "d 0", 0.0, 0.5), judgement(1, "e 2", 2.0, 0.1)]
GROUP = judged([3.0, 2.3], [5, 5], [*STEADY, *TORN])


def test_the_judge_learns_from_the_completion_that_it_is_least_sure_of():
    (pair,) = judge_pairs(GROUP)
    assert (pair.chosen.text, pair.rejected.text, pair.margin) == ("d 0", "c 5", 1.0)
    assert (pair.chosen_score, pair.rejected_score) == (0.5, -0.5)
    assert pair.prompt.messages == QUESTION
    assert pair.prompt.prompt_id == prompt_id(QUESTION)
    assert pair.prompt.gold is None
    assert pair.chosen.token_ids == (5, 2)
    both = judge_pairs(GROUP, judged="all")
    assert [p.chosen.text for p in both] == ["a 3", "d 0"]
    assert len({p.pair_id for p in both}) == 2


@pytest.mark.parametrize("shift", [-7.0, 1.5, 1000.0])
def test_a_constant_on_all_ratings_changes_no_pair(shift):
    moved = [replace(j, rating=j.rating + shift) for j in [*STEADY, *TORN]]
    for fields in ({}, {"judged": "all"}):
        found = judge_pairs(judged([3.0, 2.3], [5, 5], moved), **fields)
        before = judge_pairs(GROUP, **fields)
        assert [(p.chosen, p.rejected) for p in found] == [(p.chosen, p.rejected) for p in before]
        assert [p.margin for p in found] == pytest.approx([p.margin for p in before])


def test_judgements_make_pairs_only_where_asked_rated_and_short_enough():
    assert len(list(MetaRewarding()([GROUP], CONTEXT))) == 2
    assert judge_pairs(GROUP, judge_pairs=False) == []
    assert judge_pairs(GROUP, longest_judgement=2) == []
    assert len(judge_pairs(GROUP, longest_judgement=3)) == 1
    unrated = [judgement(0, "a", 5.0, None), judgement(0, "b", 1.0, None)]
    assert judge_pairs(judged([3.0, 2.0], [5, 5], unrated)) == []
    assert judge_pairs(judged([3.0, 2.0], [5, 5], [judgement(0, "a", 5.0, 1.0), judgement(0, "b", 1.0, 1.0)])) == []
    assert judge_pairs(judged([3.0, 2.0], [5, 5], [judgement(0, "a", 5.0, 1.0), judgement(0, "a", 5.0, 0.0)])) == []


def test_answers_to_two_wordings_of_the_question_are_not_compared():
    other = (Message("user", "Grade this as JSON."),)
    mixed = [judgement(0, "a", 5.0, 2.0), judgement(0, "b", 1.0, -2.0, other), judgement(0, "c", 2.0, -1.0)]
    (pair,) = judge_pairs(judged([3.0, 2.0], [5, 5], mixed))
    assert (pair.chosen.text, pair.rejected.text) == ("a", "c")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rho": -0.1}, r"pair_builder\.rho"),
        ({"rho": float("nan")}, r"pair_builder\.rho"),
        ({"judged": "some"}, r"pair_builder\.judged"),
        ({"longest_judgement": 0}, r"pair_builder\.longest_judgement"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        MetaRewarding(**fields)
