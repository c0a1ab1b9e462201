"""The pair rule of Step-DPO on planted errors."""

import pytest

from prefloop.errors import ConfigError
from prefloop.pair.steps import Steps
from prefloop.protocols import RoundContext
from prefloop.rows import VERBATIM, Completion, JudgedGroup, Message, PolicyRef, Prompt, Solution, Step, prompt_id

POLICY = PolicyRef("p", "0", 0)
CONTEXT = RoundContext(seed=0, round=1, policy=POLICY, start=POLICY)
END = 2
MESSAGES = (Message(VERBATIM, "Q: 27+8-5=?\n"),)
PROMPT = Prompt(prompt_id(MESSAGES), MESSAGES, None, "train", "test:1")


def solved(name, *steps, first_wrong=None):
    """A completion whose token ids are its characters', with an end token."""
    text = "".join(steps)
    ids = (*map(ord, text), END)
    completion = Completion(name, text, ids, tuple(-float(i) for i in ids), "stop", 0, "p")
    return completion, Solution(tuple(Step(step, len(step)) for step in steps), first_wrong)


def group_of(scores, *solutions):
    completions = tuple(completion for completion, _ in solutions)
    cut = tuple(solution for _, solution in solutions)
    notes = (None,) * len(scores)
    return JudgedGroup(PROMPT, completions, "p", 1, 1.0, 1.0, tuple(scores), None, "j", notes, (), cut)


WRONG = solved("w", "27+8=35\n", "35-5=40\n", "40", first_wrong=2)
RIGHT = solved("r", "27+8=35\n", "35-5=30\n", "30")


def pairs_of(group, **settings):
    return list(Steps(**settings)([group], CONTEXT))


def test_the_first_wrong_step_meets_the_right_one_after_the_same_prefix():
    (pair,) = pairs_of(group_of([0.0, 1.0], WRONG, RIGHT))
    assert pair.prefix.text == "27+8=35\n"
    assert (pair.chosen.text, pair.rejected.text) == ("35-5=30\n", "35-5=40\n")
    for side, (whole, _) in ((pair.chosen, RIGHT), (pair.rejected, WRONG)):
        assert side.token_ids == whole.token_ids[8:16] == tuple(map(ord, side.text))
        assert side.sampler_logps == whole.sampler_logps[8:16]
        assert (side.finish_reason, side.source) == ("length", "p")
    assert pair.prefix.token_ids == RIGHT[0].token_ids[:8]
    assert (pair.chosen_score, pair.rejected_score, pair.margin, pair.builder) == (1.0, 0.0, 1.0, "steps")
    assert len({pair.chosen.completion_id, pair.rejected.completion_id, pair.prefix.completion_id}) == 3


def test_a_wrong_first_step_has_no_prefix_and_a_last_step_no_end_token():
    wrong = solved("w", "27+8=25\n", "20", first_wrong=1)
    (pair,) = pairs_of(group_of([0.0, 1.0], wrong, RIGHT))
    assert pair.prefix is None
    assert (pair.chosen.text, pair.rejected.text) == ("27+8=35\n", "27+8=25\n")
    wrong = solved("w", "27+8=35\n", "35-5=30\n", "29", first_wrong=3)
    (pair,) = pairs_of(group_of([0.0, 1.0], wrong, RIGHT))
    assert pair.chosen.token_ids == tuple(map(ord, "30"))
    assert END not in (*pair.prefix.token_ids, *pair.chosen.token_ids, *pair.rejected.token_ids)


@pytest.mark.parametrize(
    "other",
    [
        solved("other prefix", "27+8= 35\n", "35-5=30\n", "30"),
        solved("same step", "27+8=35\n", "35-5=40\n", "30"),
        solved("too short", "27+8=35\n"),
        solved("wrong itself", "27+8=35\n", "35-5=31\n", "30", first_wrong=2),
    ],
    ids=lambda one: one[0].completion_id,
)
def test_no_pair_without_the_same_steps_before_and_another_one_there(other):
    assert pairs_of(group_of([0.0, 1.0], WRONG, other)) == []


def test_the_same_text_before_by_other_tokens_is_no_common_prefix():
    completion, solution = RIGHT
    ids = (500, *completion.token_ids[2:])  # one token for the first two characters
    spelled = Completion("s", completion.text, ids, None, "stop", 0, "p")
    steps = (Step("27+8=35\n", 7), *solution.steps[1:])
    assert pairs_of(group_of([0.0, 1.0], WRONG, (spelled, Solution(steps)))) == []


@pytest.mark.parametrize("scores", [(0.0, 0.0), (1.0, 1.0), (0.0, None), (None, 1.0), (1.0, 0.0)])
def test_the_right_solution_needs_the_higher_score(scores):
    assert pairs_of(group_of(scores, WRONG, RIGHT)) == []


def test_groups_that_nobody_cut_and_solutions_with_no_first_wrong_step_make_none():
    assert pairs_of(group_of([0.0, 1.0], (WRONG[0], Solution(WRONG[1].steps)), RIGHT)) == []
    bare = JudgedGroup(PROMPT, (WRONG[0], RIGHT[0]), "p", 1, 1.0, 1.0, (0.0, 1.0), None, "j", (None, None))
    assert pairs_of(bare) == []
    beyond = (WRONG[0], Solution(WRONG[1].steps, first_wrong=4))
    assert pairs_of(group_of([0.0, 1.0], beyond, RIGHT)) == []


def test_every_wrong_solution_has_its_first_pair_before_any_has_a_second_and_equal_pairs_are_made_once():
    other_right = solved("r2", "27+8=35\n", "35-5 = 30\n", "30")
    same_step = solved("r3", "27+8=35\n", "35-5=30\n", "Answer 30")
    other_wrong = solved("w2", "27+8=45\n", "45-5=40\n", "40", first_wrong=1)
    same_wrong = solved("w3", "27+8=35\n", "35-5=40\n", "41", first_wrong=2)
    group = group_of([0, 0, 0, 1, 1, 1], WRONG, same_wrong, other_wrong, RIGHT, other_right, same_step)
    found = [(p.chosen.text, p.rejected.text) for p in pairs_of(group, max_pairs=None)]
    assert found == [
        ("35-5=30\n", "35-5=40\n"),
        ("27+8=35\n", "27+8=45\n"),
        ("35-5 = 30\n", "35-5=40\n"),
    ]
    assert [(p.chosen.text, p.rejected.text) for p in pairs_of(group, max_pairs=2)] == found[:2]
    assert len(pairs_of(group)) == 1


def test_max_pairs_out_of_range_is_refused():
    with pytest.raises(ConfigError, match=r"pair_builder\.max_pairs: must be ≥ 1"):
        Steps(max_pairs=0)
