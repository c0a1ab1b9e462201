"""The pair rule of policy-gradient trainers, beside what tests/contract asks of every one."""

from dataclasses import replace

import pytest

from prefloop.errors import ConfigError, DataError
from prefloop.pair.rollouts import Rollouts
from prefloop.protocols import RoundContext
from prefloop.rows import ABSENT, VERBATIM, Completion, JudgedGroup, Message, PolicyRef, Prompt, gold_completion
from prefloop.sample.hf import Hf

CONTEXT = RoundContext(0, 1, PolicyRef("p", "0", 0), PolicyRef("p", "0", -1))


def completion(index: int, text: str, ids: tuple[int, ...], finish: str = "stop") -> Completion:
    return Completion(f"c{index}", text, ids, (-1.0,) * len(ids), finish, index, "p")


def group(*found: tuple[Completion, float | None]) -> JudgedGroup:
    prompt = Prompt("x", (Message(VERBATIM, "x"),), "gold", "train", "t")
    completions, scores = zip(*found, strict=True)
    return JudgedGroup(prompt, completions, "p", 1, 1.0, 1.0, scores, None, "j", (None,) * len(scores))


def test_every_scored_completion_is_a_row_and_the_same_tokens_drawn_twice_are_one_of_weight_two():
    one = group(
        (completion(0, "a", (5, 2)), 1.0),
        (completion(1, "b", (6,), "length"), 0.5),
        (completion(2, "a", (5, 2)), 1.0),
        (completion(3, "a", (7, 8)), 1.0),  # the same text in other tokens is another draw
        (completion(4, "c", (9,)), None),
    )
    pairs = list(Rollouts()([one], CONTEXT))
    found = [(p.chosen.completion_id, p.weight, p.chosen_score) for p in pairs]
    assert found == [("c0", 2.0, 1.0), ("c1", 1.0, 0.5), ("c3", 1.0, 1.0)]
    assert all(p.rejected == ABSENT for p in pairs)
    cut = list(Rollouts(unfinished=-10.0)([one], CONTEXT))
    assert [p.chosen_score for p in cut] == [1.0, -10.0, 1.0]


def test_small_groups_and_gold_answers_are_left_out():
    two = group((completion(0, "a", (5,)), 1.0), (completion(1, "b", (6,)), None))
    assert len(list(Rollouts()([two], CONTEXT))) == 1
    assert list(Rollouts(min_group=2)([two], CONTEXT)) == []
    gold = gold_completion(two.prompt)
    assert list(Rollouts()([group((gold, 1.0))], CONTEXT)) == []


def test_completions_without_sampler_logps_are_refused():
    bare = replace(completion(0, "a", (5,)), sampler_logps=None)
    with pytest.raises(DataError, match=r"no sampler log-probs; draw completions with sampler\.kind=hf"):
        list(Rollouts()([group((bare, 1.0))], CONTEXT))


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (Hf(temperature=0.7), r"sampler\.temperature: 0\.7"),
        (Hf(top_p=0.9), r"sampler\.top_p: 0\.9"),
        (Hf(top_k=40), r"sampler\.top_k: 40"),
        (Hf(completions=1), r"sampler\.completions: 1, but pair_builder\.min_group is 2"),
    ],
)
def test_a_sampler_that_does_not_draw_from_the_policy_itself_is_refused(sampler, message):
    Rollouts(min_group=2).check_sampler(Hf())
    with pytest.raises(ConfigError, match=message):
        Rollouts(min_group=2).check_sampler(sampler)


@pytest.mark.parametrize("fields", [{"min_group": 0}, {"unfinished": float("nan")}])
def test_bad_settings_are_refused(fields):
    with pytest.raises(ConfigError, match=rf"pair_builder\.{next(iter(fields))}"):
        Rollouts(**fields)
