import pytest

from prefloop.components import build
from prefloop.errors import ConfigError, DataError
from prefloop.prompts.domains import Domains
from prefloop.protocols import Allotment
from prefloop.recipe import Spec
from prefloop.rows import VERBATIM, Message, Prompt


def prompts(*origins: str | None) -> list[Prompt]:
    return [
        Prompt(f"{i:016x}", (Message(VERBATIM, str(i)),), None, "train", f"f:{i}", origin=origin)
        for i, origin in enumerate(origins)
    ]


def ask(number: int, rounds: int = 2, per_round: int | None = None, seed: int = 0) -> Allotment:
    return Allotment(number, rounds, per_round, seed, {})


def ids(found: list[Prompt]) -> set[str]:
    return {p.prompt_id for p in found}


def test_each_round_has_one_domain_in_the_order_of_first_appearance():
    found = prompts("talk", "news", "talk", "code", "news")
    rounds = [Domains()(found, ask(n, 3)) for n in range(3)]
    assert [{p.origin for p in part} for part in rounds] == [{"talk"}, {"news"}, {"code"}]
    assert [ids(part) for part in rounds] == [
        ids([found[0], found[2]]),
        ids([found[1], found[4]]),
        ids([found[3]]),
    ]


def test_a_given_order_may_leave_domains_out():
    found = prompts("talk", "news", "talk", "code")
    order = build("order", Spec.model_validate({"kind": "domains", "names": ["code", "talk"]}))
    assert [{p.origin for p in order(found, ask(n))} for n in range(2)] == [{"code"}, {"talk"}]
    assert order.order(found) == ["code", "talk"]


def test_a_round_takes_as_many_prompts_as_asked_for_drawn_by_the_seed():
    found = prompts(*["a"] * 20, *["b"] * 3)
    some = Domains()(found, ask(0, per_round=5))
    assert len(some) == 5
    assert Domains()(list(reversed(found)), ask(1, per_round=5)) == some
    assert ids(Domains()(found, ask(0, per_round=5, seed=1))) != ids(some)
    assert len(Domains()(found, ask(1, per_round=5))) == 3


@pytest.mark.parametrize(
    ("origins", "rounds", "names", "message"),
    [
        (("a", None), 2, None, r"f:1: no column `source`; name each row's domain in it"),
        (("a", "a"), 1, None, r"column `source` names 1 domain \(a\), but order\.kind domains needs two"),
        (("a", "b"), 3, None, r"2 domains \(a, b\) for 3 rounds; set rounds=2"),
        (("a", "b", "c"), 2, None, r"3 domains \(a, b, c\) for 2 rounds; set rounds=3"),
        (("a", "b"), 2, ("a", "x"), r"order\.names: no row's `source` is x; the data have a, b"),
    ],
)
def test_data_that_do_not_fit_are_refused(origins, rounds, names, message):
    with pytest.raises(DataError, match=message):
        Domains(names)(prompts(*origins), ask(0, rounds))


@pytest.mark.parametrize("names", [(), ("a",), ("a", "a")])
def test_fewer_than_two_names_are_refused(names):
    with pytest.raises(ConfigError, match=r"order\.names: must be two or more different domains"):
        Domains(names)
