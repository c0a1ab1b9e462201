"""What data must hold is looked at for the rounds that are planned, and for no prompt that no round takes."""

from contextlib import suppress

import pytest

from prefloop.data_needs import check_data
from prefloop.errors import DataError
from prefloop.launch import read_recipe
from prefloop.rows import VERBATIM, Candidate, Message, PolicyRef, Prompt

POLICY = PolicyRef("p", "0", -1)
HELD_OUT = Prompt("held", (Message(VERBATIM, "held"),), None, "holdout", "f:0")


def prompt(number: int, *scores: float | None, origin: str | None = None) -> Prompt:
    candidates = tuple(Candidate(f"text {i}", score) for i, score in enumerate(scores))
    messages = (Message(VERBATIM, str(number)),)
    return Prompt(f"{number:016x}", messages, None, "train", f"f:{number}", candidates=candidates, origin=origin)


def check(name: str, prompts: list[Prompt], *settings: str) -> None:
    recipe, _ = read_recipe(name, ["policy=p", "prompts=q", "eval_judge=lexicon", *settings])
    check_data(recipe, POLICY, tuple(prompts), [HELD_OUT])


def test_a_row_that_no_round_takes_stops_nothing():
    prompts = [prompt(i, 1.0, 0.0) for i in range(9)] + [prompt(9)]
    taken = []
    for rounds in range(1, 11):
        with suppress(DataError):
            check("ofs_dpo", prompts, f"rounds={rounds}", "prompts_per_round=1")
            taken.append(rounds)
    assert taken == list(range(1, len(taken) + 1)), "from the round on that takes it, every longer run is refused"
    assert 1 <= len(taken) < 10
    with pytest.raises(DataError, match="f:9: no completions"):
        check("ofs_dpo", prompts, "rounds=1", "prompts_per_round=null")


def test_a_later_round_is_looked_at_too():
    rated, tied = [prompt(i, 1.0, 0.0, origin="a") for i in range(5)], [prompt(i, 1.0, 1.0, origin="b") for i in (5, 6)]
    check("cofs_dpo", [*rated, *(prompt(i, 0.0, 2.0, origin="b") for i in (5, 6))])
    with pytest.raises(DataError, match=r"no pairs in round 1 .*Of 2 prompts 0 have no ratings and 2 rate all .*alike"):
        check("cofs_dpo", [*rated, *tied])


def test_with_another_judge_ratings_are_not_asked_for():
    unrated = [prompt(i, None, None) for i in range(5)]
    check("curry_dpo", unrated, "judge=lexicon")
    with pytest.raises(DataError, match="Of 5 prompts 5 have no ratings"):
        check("curry_dpo", unrated)


def test_one_pair_among_many_prompts_is_enough():
    check("dpo", [*(prompt(i, 1.0, 1.0) for i in range(200)), prompt(200, 1.0, 0.0)])
    check("curry_dpo", [prompt(0, 3.0, 2.0, 1.0), *(prompt(i, 1.0, 0.0) for i in range(1, 9))], "rounds=2")
    with pytest.raises(DataError, match=r"no pairs in round 2 .*more than 3 completions.* set rounds=2, or give"):
        check("curry_dpo", [prompt(0, 3.0, 2.0, 1.0), *(prompt(i, 1.0, 0.0) for i in range(1, 9))])
