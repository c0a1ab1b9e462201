import pytest

from prefloop.components import build
from prefloop.errors import ConfigError, DataError
from prefloop.judge.given import Given as GivenScores
from prefloop.prompts.dataset import read_prompts
from prefloop.protocols import RoundContext
from prefloop.recipe import Spec
from prefloop.rows import Candidate, Message, PolicyRef
from prefloop.sample.given import Given
from tiny import write_jsonl

POLICY = PolicyRef("p", "0", 0)
CONTEXT = RoundContext(0, 1, POLICY, POLICY)
USER = {"role": "user", "content": "hello"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, (("a", 1.0), ("b", 0.0))),
        ({"prompt": [USER], "chosen": [answer("a")], "rejected": [answer("b")]}, (("a", 1.0), ("b", 0.0))),
        ({"chosen": [USER, answer("a")], "rejected": [USER, answer("b")]}, (("a", 1.0), ("b", 0.0))),
        (
            {"prompt": "q", "completions": ["a", "b", "c"], "scores": [3, None, 1.5]},
            (("a", 3.0), ("b", None), ("c", 1.5)),
        ),
        ({"prompt": "q", "completion": "a", "label": True}, (("a", 1.0),)),
        ({"prompt": [USER], "completion": [answer("a")], "label": False}, (("a", 0.0),)),
        ({"prompt": "q", "completion": "a", "label": 1}, ()),
        ({"prompt": "q", "completion": "a", "label": None}, ()),
        ({"prompt": "q"}, ()),
        ({"prompt": "q", "chosen": "a"}, ()),
    ],
)
def test_rows_bring_their_completions(tmp_path, row, expected):
    (prompt,) = read_prompts(str(write_jsonl(tmp_path / "p.jsonl", [row]))).prompts
    assert prompt.candidates == tuple(Candidate(text, score) for text, score in expected)
    if "prompt" not in row:
        assert prompt.messages == (Message("user", "hello"),)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "q", "completions": ["a"], "scores": [1, 2]}, "as many numbers"),
        ({"prompt": "q", "completions": ["a"]}, "as many numbers"),
        ({"prompt": "q", "completions": ["a"], "scores": ["x"]}, r"scores\[0\]"),
        ({"prompt": "q", "completions": ["a"], "scores": [float("nan")]}, r"scores\[0\]"),
        ({"prompt": "q", "completions": [3], "scores": [1]}, r"completions\[0\]"),
        ({"prompt": "q", "completion": 3, "label": False}, "completion"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "chosen"),
        ({"chosen": [answer("a")], "rejected": [answer("b")]}, "no common prompt"),
        ({"prompt": "q", "chosen": [USER, answer("a")], "rejected": [answer("b")]}, "several turns"),
    ],
)
def test_columns_that_do_not_fit_are_refused_by_line(tmp_path, row, words):
    with pytest.raises(DataError, match=words) as error:
        read_prompts(str(write_jsonl(tmp_path / "p.jsonl", [row])))
    assert "p.jsonl:1" in str(error.value)


def test_given_completions_keep_the_given_scores(tmp_path):
    rows = [{"prompt": "q", "completions": ["a", "b", "c"], "scores": [3, None, 1]}]
    prompts = read_prompts(str(write_jsonl(tmp_path / "p.jsonl", rows))).prompts
    (group,) = Given()(prompts, CONTEXT)
    assert [c.text for c in group.completions] == ["a", "b", "c"]
    assert {c.token_ids for c in group.completions} == {None}
    (verdict,) = GivenScores()([group], CONTEXT)
    assert verdict.scores == (3.0, None, 1.0)
    assert verdict.notes == (None, "the data hold no score for it", None)
    assert [c.text for c in Given(completions=2)(prompts, CONTEXT)[0].completions] == ["a", "b"]


def test_labelled_rows_of_one_prompt_are_put_together(tmp_path):
    rows = [
        {"prompt": "q", "completion": "bad", "label": False},
        {"prompt": "q", "completion": "good", "label": True},
        {"prompt": "r", "completion": "fine", "label": True},
        {"prompt": "q", "completion": "good", "label": True},
        {"prompt": "q", "completion": "good", "label": False},
        {"prompt": "q", "completion": "better", "label": True},
    ]
    found = read_prompts(str(write_jsonl(tmp_path / "p.jsonl", rows)))
    first, second = found.prompts
    expected = (("bad", 0.0), ("good", 1.0), ("good", 0.0), ("better", 1.0))
    assert first.candidates == tuple(Candidate(*pair) for pair in expected)
    assert second.candidates == (Candidate("fine", 1.0),)
    assert (first.gold, second.gold) == ("good", "fine")
    assert found.dropped == ()


def test_a_bad_completion_is_no_gold_answer_but_another_column_may_hold_one(tmp_path):
    bad = {"completion": "bad", "label": False}
    rows = [{"prompt": "q", **bad}, {"prompt": "r", **bad, "answer": "right"}, {"prompt": "s", **bad, "label": "bad"}]
    found = read_prompts(str(write_jsonl(tmp_path / "p.jsonl", rows)))
    assert [prompt.gold for prompt in found.prompts] == [None, "right", "bad"]


def test_a_prompt_without_completions_is_named(tmp_path):
    prompts = read_prompts(str(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "q"}]))).prompts
    with pytest.raises(DataError, match=r"p\.jsonl:1: no completions"):
        Given()(prompts, CONTEXT)


def test_what_has_no_meaning_for_given_completions_is_refused():
    with pytest.raises(ConfigError, match="unknown key for kind given"):
        build("sampler", Spec.model_validate({"kind": "given", "temperature": 0.5}))
    with pytest.raises(ConfigError, match=r"sampler\.completions"):
        Given(completions=-1)
