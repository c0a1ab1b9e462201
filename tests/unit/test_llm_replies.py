"""One verdict in the asked form, or none: whatever a judging model writes."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefloop.judge._llm_replies import LONGEST, Choice, Form, Ranking, WholeNumber

GRADE = Form(("score",), WholeNumber(0, 5))
TEN = Form(("score",), WholeNumber(1, 10))
COMPARE = Form(("verdict",), Choice(("A", "B", "tie")))
RANK = Form(("ranking",), Ranking(("A", "B", "C")))
SEVERAL = Form(("clarity", "writing style"), WholeNumber(1, 5))
FORMS = [GRADE, TEN, COMPARE, RANK, SEVERAL]


@pytest.mark.parametrize(
    ("form", "reply", "values"),
    [
        (GRADE, "It is fine.\nScore: 4", (4.0,)),
        (GRADE, "Score: 0", (0.0,)),
        (GRADE, "**Score:** 4", (4.0,)),
        (GRADE, "**Score**: 4.", (4.0,)),
        (GRADE, "> score = 4/5", (4.0,)),
        (GRADE, "Score: 4 out of 5", (4.0,)),
        (GRADE, "Reasons.\n\n`Score: 5`\n\n---\n", (5.0,)),
        (GRADE, "It makes no mention of a score, which is fine.\nScore: 2", (2.0,)),
        (GRADE, "<think>Score: 1? No. Score: 3!</think>\nGood.\nScore: 3", (3.0,)),
        (TEN, "Score: 10", (10.0,)),
        (COMPARE, "A is short, B is right.\nVerdict: B", ("B",)),
        (COMPARE, "Verdict: Tie", ("tie",)),
        (RANK, "Ranking: B > C > A", ((2, 0, 1),)),
        (RANK, "Ranking: b = c > a", ((1, 0, 0),)),
        (SEVERAL, "Clarity: 2\nWriting style: 5", (2.0, 5.0)),
        (SEVERAL, "Writing style: 5\nClarity: 2", (2.0, 5.0)),
    ],
)
def test_a_last_line_in_the_asked_form_is_the_verdict(form, reply, values):
    assert form.read(reply, "text").values == values


@pytest.mark.parametrize(
    ("form", "reply", "why"),
    [
        (GRADE, "", "empty"),
        (GRADE, " \n\t", "empty"),
        (GRADE, "<think>Score: 4</think>", "empty"),
        (GRADE, "I would give it 4 of 5 points.", "0 times"),
        (GRADE, "4", "0 times"),
        (GRADE, "The score is 4", "0 times"),
        (GRADE, "Score: 4\nScore: 2", "2 times"),
        (GRADE, "Score: 4\nScore: 4", "2 times"),
        (GRADE, "I first thought Score: 4, but no.\nScore: 2", "2 times"),
        (GRADE, "My score: 4", "not on a line of its own"),
        (GRADE, "Score: 4\nBut I am not sure.", "the last line"),
        (GRADE, "The text orders me to say\nScore: 5\nwhich I will not.", "the last line"),
        (GRADE, "Score: 6", "whole number from 0 to 5, got '6'"),
        (GRADE, "Score: -3", "got '-3'"),
        (GRADE, "Score: .5", "got '.5'"),
        (GRADE, "Score: 3.5", "got '3.5'"),
        (GRADE, "Score: 3 or 4", "got"),
        (GRADE, "Score: 4/10", "got"),
        (GRADE, "Score: four", "got"),
        (GRADE, "Score: ٤", "got"),
        (GRADE, "Score: 1e0", "got"),
        (GRADE, "Score:", "got ''"),
        (GRADE, "Score: 1\u20280", "the last line"),
        (GRADE, '{"score": 4}', "not on a line of its own"),
        (GRADE, "Score: 4" * 100_000, f"{800_000} characters"),
        (COMPARE, "A is better.", "0 times"),
        (COMPARE, "Verdict: A or B", "got"),
        (COMPARE, "Verdict: C", "got"),
        (COMPARE, "Verdict: A\nVerdict: B", "2 times"),
        (RANK, "Ranking: A > B", "got"),
        (RANK, "Ranking: A > B > B", "got"),
        (RANK, "Ranking: A > B > C > D", "got"),
        (RANK, "Ranking: A, B, C", "got"),
        (SEVERAL, "Clarity: 2", "Writing style stands 0 times"),
        (SEVERAL, "Clarity: 2\nWriting style: 9", "Writing style must be"),
    ],
)
def test_anything_else_is_none_and_says_why(form, reply, why):
    reading = form.read(reply, "text")
    assert reading.values is None
    assert why in reading.why


@pytest.mark.parametrize(
    ("form", "reply", "values"),
    [
        (GRADE, '{"reason": "ok", "score": 4}', (4.0,)),
        (GRADE, '{"score": 4}', (4.0,)),
        (GRADE, ' ```json\n{"reason": "Score: 1", "score": 4}\n```\n', (4.0,)),
        (COMPARE, '{"reason": "", "verdict": "tie"}', ("tie",)),
        (RANK, '{"reason": "", "ranking": "C > A = B"}', ((1, 1, 0),)),
        (SEVERAL, '{"clarity": 1, "writing style": 2, "reason": ""}', (1.0, 2.0)),
    ],
)
def test_a_json_object_with_the_asked_keys_is_the_verdict(form, reply, values):
    assert form.read(reply, "json").values == values


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "Score: 4",
        '{"reason": "ok", "score": 4',
        '{"reason": "ok", "score": 4} {"reason": "ok", "score": 4}',
        '{"score": 4, "score": 2}',
        '{"score": 4, "score": 4}',
        '{"score": 4, "final score": 2}',
        '{"scores": {"score": 4}}',
        '{"Score": 4}',
        '[{"score": 4}]',
        '{"score": "4"}',
        '{"score": 4.0}',
        '{"score": 6}',
        '{"score": -1}',
        '{"score": true}',
        '{"score": null}',
        '{"score": [4]}',
        '{"score": NaN}',
        '{"score": Infinity}',
        '{"score": ' + "9" * 5000 + "}",
        "[" * 100_000,
        '{"a":' * 50_000,
        "4",
        "null",
    ],
)
def test_wrong_json_is_no_verdict(reply):
    reading = GRADE.read(reply, "json")
    assert reading.values is None
    assert reading.why


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.labels[0] + form.values.words()[:8])
@pytest.mark.parametrize("style", ["json", "text"])
def test_the_instructions_sent_back_are_no_verdict(form, style):
    asked = form.instructions(style)
    for start in range(0, len(asked), 3):
        assert form.read(asked[start:], style).values is None


def test_a_schema_asks_for_reasons_first_and_for_nothing_else():
    schema = SEVERAL.schema()
    assert list(schema["properties"]) == schema["required"] == ["reason", "clarity", "writing style"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["clarity"] == {"type": "integer", "enum": [1, 2, 3, 4, 5]}
    assert WholeNumber(0, 1000).schema() == {"type": "integer", "minimum": 0, "maximum": 1000}


FRAGMENTS = ["Score", "score", ":", "=", " ", "\n", "4", "5", "10", "-", ".", "/5", "**", "Verdict: A", "B", "tie", ">"]
FRAGMENTS += ["{", "}", '"', '"score"', "```json\n", "\n```", "</think>", "Ranking", "A = B > C", "\u2028", "ſ", "٤"]
SOUP = st.one_of(st.text(max_size=80), st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join))


def legal(form, values):
    if isinstance(form.values, WholeNumber):
        return all(form.values.low <= v <= form.values.high and v == int(v) for v in values)
    if isinstance(form.values, Choice):
        return all(v in form.values.options for v in values)
    return all(len(v) == 3 and min(v) == 0 for v in values)


@settings(max_examples=400, deadline=None)
@given(reply=SOUP, form=st.sampled_from(FORMS), style=st.sampled_from(["json", "text"]))
def test_no_reply_crashes_the_parser_or_gives_a_value_out_of_range(reply, form, style):
    reading = form.read(reply, style)
    if reading.values is None:
        assert reading.why
    else:
        assert len(reading.values) == len(form.labels)
        assert legal(form, reading.values)


@settings(max_examples=200, deadline=None)
@given(prose=SOUP, first=st.integers(0, 5), second=st.integers(0, 5))
def test_prose_around_a_verdict_never_changes_it_and_two_verdicts_are_none(prose, first, second):
    alone = GRADE.read(f"{prose}\nScore: {first}", "text").values
    assert alone in (None, (float(first),))
    if "score" not in prose.lower() and len(prose) < LONGEST:
        assert alone == (float(first),)
    assert GRADE.read(f"Score: {first}\n{prose}\nScore: {second}", "text").values is None or "</think>" in prose
    wrapped = json.dumps({"reason": prose, "score": first})
    if "</think>" not in prose:
        assert GRADE.read(wrapped, "json").values == (float(first),)
        assert GRADE.read(wrapped + json.dumps({"reason": prose, "score": second}), "json").values is None
