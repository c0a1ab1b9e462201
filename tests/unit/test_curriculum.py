import itertools
import random

import pytest

from prefloop.errors import ConfigError
from prefloop.judge import given as judge
from prefloop.pair.curriculum import Curriculum
from prefloop.protocols import RoundContext
from prefloop.rows import VERBATIM, Candidate, Completion, JudgedGroup, Message, PolicyRef, Prompt
from prefloop.sample import given as sampler
from prefloop.stages import NamedJudge, judge_part

POLICY = PolicyRef("p", "0", 0)


def group(name: str, scores: dict[str, float | None]) -> JudgedGroup:
    prompt = Prompt(name, (Message(VERBATIM, name),), None, "train", "here:1")
    completions = tuple(Completion(f"{name}{t}", t, None, None, "stop", 0, "given") for t in scores)
    notes = (None,) * len(scores)
    return JudgedGroup(prompt, completions, "p", 0, 1.0, 1.0, tuple(scores.values()), None, "given", notes)


def pairs(builder: Curriculum, groups: list[JudgedGroup], number: int) -> list[tuple[str, str]]:
    return [(p.chosen.text, p.rejected.text) for p in builder(groups, RoundContext(0, number, POLICY, POLICY))]


def test_four_ratings_give_the_papers_three_pairs_in_its_order():
    rated = group("x", {"R2": 4.0, "R4": 1.0, "R1": 5.0, "R3": 2.0})
    found = [pairs(Curriculum(), [rated], number) for number in range(4)]
    assert found == [[("R1", "R4")], [("R1", "R3")], [("R1", "R2")], [("R1", "R4")]]


def test_ties_with_the_best_and_missing_scores_make_no_pair():
    rated = group("x", {"a": 5.0, "b": 5.0, "c": None, "d": 1.0})
    assert [pairs(Curriculum(), [rated], number) for number in range(2)] == [[("a", "d")], []]


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_the_order_of_the_data_does_not_matter(order):
    scores = {"a": 3.0, "b": 3.0, "c": 1.0}
    assert pairs(Curriculum(), [group("x", {t: scores[t] for t in order})], 0) == [("a", "c")]


@pytest.mark.parametrize("scope", ["prompt", "global"])
def test_ties_go_the_same_way_in_whatever_order_the_data_list_the_completions(scope):
    """As a run has them: ids of given completions are made from their place."""
    ratings = {"a": 5.0, "b": 5.0, "c": 2.0, "d": 2.0, "e": 1.0}
    builder, found = Curriculum(steps=3, scope=scope), set()
    for order in itertools.permutations(ratings):
        candidates = tuple(Candidate(text, ratings[text]) for text in order)
        prompts = [
            Prompt(n, (Message(VERBATIM, n),), None, "train", "here:1", candidates=candidates) for n in ("x", "y")
        ]
        rounds = []
        for number in range(3):
            context = RoundContext(0, number, POLICY, POLICY)
            samples = sampler.Given()(prompts, context)
            judged = judge_part(samples, NamedJudge(judge.Given(), "given"), context)
            rounds.append(tuple((p.prompt.prompt_id, p.chosen.text, p.rejected.text) for p in builder(judged, context)))
        found.add(tuple(rounds))
    (rounds,) = found
    assert [pair[1:] for pair in rounds[0]] == [("a", "e")] * 2
    assert [pair[2] for pair in itertools.chain(*rounds)].count("c") == 2


def test_of_a_text_that_is_rated_twice_the_better_rating_counts():
    prompt = Prompt("x", (Message(VERBATIM, "x"),), None, "train", "here:1")
    for scores in ((1.0, 4.0, 2.0), (4.0, 1.0, 2.0)):
        completions = tuple(Completion(f"c{i}", t, None, None, "stop", 0, "given") for i, t in enumerate("aab"))
        twice = JudgedGroup(prompt, completions, "p", 0, 1.0, 1.0, scores, None, "j", (None,) * 3)
        (pair,) = Curriculum()([twice], RoundContext(0, 0, POLICY, POLICY))
        assert (pair.chosen.text, pair.chosen_score, pair.margin) == ("a", 4.0, 2.0)


def test_gaps_of_a_prompt_never_grow_and_only_its_best_is_chosen():
    draw = random.Random(2)
    for number in range(50):
        rated = group(f"x{number}", {t: float(draw.randrange(6)) for t in "abcdef"})
        rounds = [list(Curriculum(steps=9)([rated], RoundContext(0, n, POLICY, POLICY))) for n in range(9)]
        gaps = [p.margin for pairs in rounds for p in pairs]
        assert gaps == sorted(gaps, reverse=True)
        assert {p.chosen_score for pairs in rounds for p in pairs} <= {max(rated.scores)}
        assert len(gaps) == sum(score < max(rated.scores) for score in rated.scores)


def test_global_buckets_hold_every_pair_once_and_gaps_fall():
    draw = random.Random(1)
    groups = [group(f"x{i}", {t: float(draw.randrange(9)) for t in "abcd"}) for i in range(20)]
    builder = Curriculum(steps=4, scope="global")
    buckets = [list(builder(groups, RoundContext(0, number, POLICY, POLICY))) for number in range(4)]
    gaps = [p.margin for bucket in buckets for p in bucket]
    assert gaps == sorted(gaps, reverse=True)
    everything = [p.pair_id for bucket in buckets for p in bucket]
    ladders = [p.pair_id for n in range(3) for p in Curriculum()(groups, RoundContext(0, n, POLICY, POLICY))]
    assert sorted(everything) == sorted(ladders)
    assert max(map(len, buckets)) - min(map(len, buckets)) <= 1


def test_one_bucket_is_every_pair():
    rated = group("x", {"R1": 5.0, "R2": 4.0, "R3": 2.0})
    assert pairs(Curriculum(steps=1, scope="global"), [rated], 7) == [("R1", "R3"), ("R1", "R2")]


def test_steps_must_be_positive():
    with pytest.raises(ConfigError, match=r"pair_builder\.steps"):
        Curriculum(steps=0)


def test_by_log_prob_the_likeliest_choice_comes_first_whatever_the_rating_gap():
    """Card, section 6: easy is a large gap in log-prob under the reference; the best rated is chosen all the same."""
    rated = group("x", {"R1": 5.0, "R2": 4.0, "R3": 2.0, "R4": 1.0})
    logps = {"xR1": -10.0, "xR2": -30.0, "xR3": -12.0, "xR4": -9.0}
    builder = Curriculum(by="logp")
    for shift in (0.0, 7.5):  # a constant on all log-probs of a prompt is no gap
        known = {name: value + shift for name, value in logps.items()}
        found = [
            (p.chosen.text, p.rejected.text)
            for number in range(3)
            for p in builder([rated], RoundContext(0, number, POLICY, POLICY, logps=known))
        ]
        assert found == [("R1", "R2"), ("R1", "R3"), ("R1", "R4")]


def test_by_log_prob_over_all_prompts():
    groups = [group(name, {"a": 2.0, "b": 1.0}) for name in "xyz"]
    logps = {"xa": -1.0, "xb": -2.0, "ya": -1.0, "yb": -9.0, "za": -5.0, "zb": -1.0}
    builder = Curriculum(by="logp", scope="global")
    found = [
        p.prompt.prompt_id
        for number in range(3)
        for p in builder(groups, RoundContext(0, number, POLICY, POLICY, logps=logps))
    ]
    assert found == ["y", "x", "z"]
