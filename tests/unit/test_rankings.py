"""Rankings of completions: order, ties, and which of many are taken."""

import math

import pytest

from prefloop.errors import ConfigError
from prefloop.losses.plackett_luce import PlackettLuce
from prefloop.pair.rankings import Rankings
from prefloop.protocols import RoundContext, views_of
from prefloop.rows import VERBATIM, Completion, JudgedGroup, Message, PolicyRef, Prompt, prompt_id

POLICY = PolicyRef("p", "0", 0)
CONTEXT = RoundContext(seed=0, round=1, policy=POLICY, start=POLICY)


def judged(scores, texts=None):
    messages = (Message(VERBATIM, "Q"),)
    prompt = Prompt(prompt_id(messages), messages, None, "train", "test:1")
    texts = texts or [str(i) for i in range(len(scores))]
    completions = tuple(Completion(str(i), t, None, None, "stop", 0, "p") for i, t in enumerate(texts))
    return JudgedGroup(prompt, completions, "p", 1, 1.0, 1.0, tuple(scores), None, "j", (None,) * len(scores))


def order(builder, group):
    """Indices of the completions in their places; none where there is no ranking."""
    rows = list(builder([group], CONTEXT))
    assert len(rows) <= 1
    assert all(view.messages == group.prompt.messages for row in rows for view in row.views)
    assert all(tuple(view.name for view in row.views) == views_of(builder) for row in rows)
    return [
        int(c.completion_id) for row in rows for c in (row.chosen, row.rejected, *(v.completion for v in row.views))
    ]


@pytest.mark.parametrize(
    ("settings", "scores", "expected"),
    [
        ({}, [2, 4, 1, 3], [1, 3, 0, 2]),
        ({}, [2, 4, 1, None], []),
        ({}, [2, 4, 4, 3], []),
        ({"completions": 3}, [2, 4, 4, 3], [1, 3, 0]),
        ({"completions": 2}, [2, 9, 4, 1], [1, 3]),
        ({"completions": 3}, [5, 4, 3, 2, 1], [0, 2, 4]),
        ({"completions": 3, "min_margin": 1.0}, [5, 4.5, 3.9, 2, 1], [0, 2, 3]),
        ({"completions": 3, "min_margin": 2.0}, [5, 4.5, 3.9, 2, 1], []),
    ],
)
def test_places_go_by_score(settings, scores, expected):
    assert order(Rankings(**settings), judged(scores)) == expected


def test_the_same_content_has_one_place():
    assert order(Rankings(completions=3), judged([4, 3, 2], ["a", "a", "b"])) == []
    assert order(Rankings(completions=2), judged([4, 3, 2], ["a", "a", "b"])) == [0, 2]


@pytest.mark.parametrize("completions", [2, 3, 4, 6])
def test_it_makes_what_the_loss_of_the_same_length_reads(completions):
    assert views_of(Rankings(completions)) == views_of(PlackettLuce(completions=completions))
    assert len(views_of(Rankings(completions))) == completions - 2


def test_margin_is_that_of_the_first_two_places():
    (row,) = Rankings(completions=3)([judged([5, 3, 9])], CONTEXT)
    assert (row.chosen_score, row.rejected_score, row.margin) == (9, 5, 4)


def test_the_views_of_the_class_are_those_of_its_defaults():
    assert Rankings.views == Rankings().views
    assert PlackettLuce.views == PlackettLuce().views


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"completions": 1}, "≥ 2, got 1"),
        ({"min_margin": -0.1}, "≥ 0, got -0.1"),
        ({"min_margin": math.nan}, "≥ 0, got nan"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Rankings(**settings)
