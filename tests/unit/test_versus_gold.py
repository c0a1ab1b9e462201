from prefloop.pair.versus_gold import VersusGold
from prefloop.protocols import RoundContext
from prefloop.rows import GOLD, VERBATIM, Completion, JudgedGroup, Message, PolicyRef, Prompt

POLICY = PolicyRef("p", "0", 0)
CONTEXT = RoundContext(0, 2, POLICY, POLICY)


def group(gold: str | None, *texts: str) -> JudgedGroup:
    prompt = Prompt("id", (Message(VERBATIM, "q"),), gold, "train", "here:1")
    own = tuple(Completion(f"c{i}", text, (1,), (-1.0,), "stop", i, "p") for i, text in enumerate(texts))
    nothing = (None,) * len(own)
    return JudgedGroup(prompt, own, "p", 2, 1.0, 1.0, nothing, None, "unscored", nothing)


def test_the_human_answer_is_chosen_against_every_own_one():
    pairs = list(VersusGold()([group("human", "one", "two")], CONTEXT))
    assert sorted((p.chosen.text, p.rejected.text) for p in pairs) == [("human", "one"), ("human", "two")]
    assert {p.chosen.source for p in pairs} == {GOLD}
    assert {p.chosen.token_ids for p in pairs} == {None}
    assert {p.round for p in pairs} == {2}


def test_an_own_answer_that_equals_the_human_one_teaches_nothing():
    assert [p.rejected.text for p in VersusGold()([group("human", "human", "two", "two")], CONTEXT)] == ["two"]


def test_a_prompt_without_a_human_answer_makes_no_pair():
    assert list(VersusGold()([group(None, "one")], CONTEXT)) == []
