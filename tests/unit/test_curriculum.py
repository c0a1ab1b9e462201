import itertools
import random

import pytest

from prefloop.errors import ConfigError
from prefloop.pair.curriculum import Curriculum
from prefloop.protocols import RoundContext
from prefloop.rows import VERBATIM, Completion, JudgedGroup, Message, PolicyRef, Prompt

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
