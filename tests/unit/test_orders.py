import itertools

import pytest

from prefloop.errors import DataError
from prefloop.prompts.easy_first import EasyFirst, accuracy
from prefloop.prompts.shuffled import Shuffled
from prefloop.protocols import Allotment
from prefloop.rows import VERBATIM, Message, Prompt


def prompts(*origins: str | None) -> list[Prompt]:
    return [
        Prompt(f"{i:016x}", (Message(VERBATIM, str(i)),), None, "train", f"f:{i}", origin=origin)
        for i, origin in enumerate(origins)
    ]


def ask(number: int, rounds: int = 2, per_round: int | None = None, **margins: float) -> Allotment:
    return Allotment(number, rounds, per_round, 0, {f"{int(k[1:]):016x}": v for k, v in margins.items()})


def test_slices_follow_each_other_and_begin_again():
    found = prompts(*[None] * 5)
    rounds = [[p.prompt_id for p in Shuffled()(found, ask(n, per_round=2))] for n in range(5)]
    assert sorted(itertools.chain(*rounds)) == sorted([p.prompt_id for p in found] * 2)
    assert rounds[0] != [found[0].prompt_id, found[1].prompt_id]
    assert Shuffled()(list(reversed(found)), ask(0, per_round=2)) == Shuffled()(found, ask(0, per_round=2))


def test_without_a_number_every_round_has_all_prompts():
    found = prompts(*[None] * 4)
    assert {len(Shuffled()(found, ask(n))) for n in range(3)} == {4}


def test_sources_go_by_falling_share_of_easy_pairs():
    found = prompts("hard", "easy", "hard", "easy", "easy")
    margins = {"p0": -3.0, "p1": 1.0, "p2": 5.0, "p3": 2.0, "p4": -1.0}
    assert accuracy([found[1], found[3], found[4]], ask(0, **margins).margins) == pytest.approx(2 / 3)
    assert [[p.origin for p in EasyFirst()(found, ask(n, **margins))] for n in (0, 1)] == [["easy"] * 3, ["hard"] * 2]


def test_equal_sources_go_by_name_whatever_the_order_of_rows():
    found = prompts("b", "a")
    margins = {"p0": 1.0, "p1": 1.0}
    assert EasyFirst()(found, ask(0, **margins))[0].origin == "a"
    assert EasyFirst()(found[::-1], ask(0, **margins))[0].origin == "a"


@pytest.mark.parametrize("rounds", [1, 2, 3, 7])
def test_margin_shares_use_every_prompt_once_and_margins_fall(rounds):
    found = prompts(*[None] * 20)
    margins = {f"p{i}": float((7 * i) % 13) for i in range(20)}
    shares = [EasyFirst(by="margin")(found, ask(n, rounds, **margins)) for n in range(rounds)]
    flat = [p for share in shares for p in share]
    assert sorted(p.prompt_id for p in flat) == [p.prompt_id for p in found]
    values = [ask(0, **margins).margins[p.prompt_id] for p in flat]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("by", ["source", "margin"])
def test_a_round_takes_as_many_prompts_of_its_share_as_asked_for(by):
    found = prompts(*["a", "b"] * 10)
    margins = {f"p{i}": float(i) for i in range(20)}
    for number in (0, 1):
        share = EasyFirst(by=by)(found, ask(number, **margins))
        some = EasyFirst(by=by)(found, ask(number, per_round=4, **margins))
        assert (len(share), len(some)) == (10, 4)
        assert [p for p in share if p in some] == some
        assert some != share[:4], "drawn, not the first ones"
        assert EasyFirst(by=by)(found, ask(number, per_round=40, **margins)) == share


def test_missing_sources_are_named():
    with pytest.raises(DataError, match="f:0: no column `source`"):
        EasyFirst()(prompts(None), ask(0, p0=1.0))
    with pytest.raises(DataError, match=r"2 sources \(a, b\) for 3 rounds; set rounds=2"):
        EasyFirst()(prompts("a", "b"), ask(0, 3, p0=1.0, p1=1.0))
