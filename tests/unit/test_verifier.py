import json
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefloop.errors import ConfigError, DataError, JudgeError
from prefloop.judge.verifier import Verifier, gsm8k_number, last_number
from prefloop.protocols import RoundContext
from prefloop.rows import VERBATIM, Completion, Message, PolicyRef, Prompt, SampleGroup, prompt_id
from tiny import SHARED, needs_shared

POLICY = PolicyRef("p", "0", 0)
CONTEXT = RoundContext(seed=0, round=0, policy=POLICY, start=POLICY)


def group_of(gold, *texts, question="Q"):
    messages = (Message(VERBATIM, question),)
    prompt = Prompt(prompt_id(messages), messages, gold, "train", "data.jsonl:7")
    completions = tuple(Completion(f"c{i}", t, None, None, "stop", 0, "p") for i, t in enumerate(texts))
    return SampleGroup(prompt, completions, "p", 0, 1.0, 1.0)


def scores(judge, gold, *texts):
    (verdict,) = judge([group_of(gold, *texts)], CONTEXT)
    assert all((score is None) == (note is not None) for score, note in zip(verdict.scores, verdict.notes, strict=True))
    return verdict.scores


@needs_shared
def test_every_gsm8k_answer_is_read():
    lines = (SHARED / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 7473
    for row in rows:
        expected = row["answer"].rpartition("####")[2].strip().replace(",", "")
        assert gsm8k_number(row["answer"]) == expected
    judge = Verifier("number")
    groups = [group_of(row["answer"], row["answer"], "#### 123456.5") for row in rows]
    assert {verdict.scores for verdict in judge(groups, CONTEXT)} == {(1.0, 0.0)}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 9 + 9 = 18\n#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### -5", "-5"),
        ("####-5", "-5"),
        ("#### \N{MINUS SIGN}5", "-5"),
        ("#### +5", "5"),
        ("#### 3.50", "3.50"),
        ("#### $3.50.", "3.50"),
        ("#### 5\n#### 6", "5"),
        ("#### five", None),
        ("18", None),
        ("", None),
    ],
)
def test_the_number_after_the_mark(text, number):
    assert gsm8k_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 72.", "72"),
        ("72 of 80", "80"),
        ("it is -3", "-3"),
        ("5-3", "3"),
        ("x-3", "3"),
        ("(2)-3", "3"),
        ("-$1,000.25", "-1000.25"),
        ("$-4", "-4"),
        (".5", ".5"),
        ("100,200", "100200"),
        ("1,23", "23"),
        ("12%", "12"),
        ("no number", None),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == number


@settings(max_examples=200, deadline=None)
@given(number=st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_any_decimal_is_read_back(number):
    assert Decimal(gsm8k_number(f"because\n#### {number:,}") or "nan") == number
    assert Decimal(last_number(f"we get {number}, I think.") or "nan") == number


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("0123456789,.-+$# \nx²٣"), max_size=30))
def test_what_is_read_is_a_number(text):
    for number in (gsm8k_number(text), last_number(text)):
        assert number is None or Decimal(number).is_finite()


def test_numbers_compare_as_decimals():
    judge = Verifier("number")
    texts = ["#### 18", "it is 18.00", "18 or 19", "none", "#### 18 and then 20", "0.1"]
    assert scores(judge, "9+9\n#### 18", *texts) == (1.0, 1.0, 0.0, 0.0, 1.0, 0.0)
    assert scores(judge, "0.10", *texts) == (0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    assert scores(judge, "words", "18") == (None,)


def test_exact():
    assert scores(Verifier("exact"), "Paris", "Paris", " Paris\n", "paris", "Paris!") == (1.0, 1.0, 0.0, 0.0)
    assert scores(Verifier("exact", ignore_case=True), "Paris", "PARIS") == (1.0,)
    assert scores(Verifier("exact", strip=False), "Paris", "Paris", " Paris") == (1.0, 0.0)


def test_regex_without_a_group_needs_no_gold():
    judge = Verifier("regex", pattern=r"\A(?:yes|no)\Z")
    assert scores(judge, None, "yes", " no ", "yes.", "Yes") == (1.0, 1.0, 0.0, 0.0)
    assert scores(Verifier("regex", pattern="yes", ignore_case=True), None, "oh YES") == (1.0,)
    assert scores(Verifier("regex", pattern=r"\Ayes", strip=False), None, " yes") == (0.0,)


def test_a_regex_group_must_equal_the_gold_answer():
    judge = Verifier("regex", pattern=r"answer: *(\w+)?")
    assert scores(judge, "B", "answer: B", "answer: C", "B", "answer:", "my answer: B.") == (1.0, 0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("fields", [{"mode": "exact"}, {"mode": "number"}, {"mode": "regex", "pattern": "(x)"}])
def test_gold_is_missed_by_name(fields):
    judge = Verifier(**fields)
    verdicts = judge([group_of(None, "x", "y"), group_of("x", "x")], CONTEXT)
    assert verdicts[0].scores == (None, None)
    assert verdicts[0].notes == ("data.jsonl:7: the prompt has no gold answer",) * 2
    with pytest.raises(DataError, match=r"none of 2 prompts has a gold answer .*data\.jsonl:7.* prompts\.gold"):
        judge([group_of(None, "x"), group_of(None, "y")], CONTEXT)
    assert judge([], CONTEXT) == []


USER = """
import numpy

def score(prompt, completion, gold):
    if completion == "raise":
        raise KeyError("lost")
    known = {"yes": True, "no": False, "half": 0.5, "two": 2, "unknown": None, "text": "1.0", "list": [1],
             "nan": float("nan"), "inf": float("inf"), "huge": 10**400, "numpy": numpy.float32(0.25),
             "prompt": float(len(prompt)), "gold": float(gold is None)}
    return known[completion]

constant = 3
"""


@pytest.fixture
def user(tmp_path):
    path = tmp_path / "judge_file.py"
    path.write_text(USER, encoding="utf-8")
    return path


def test_a_users_function(user):
    judge = Verifier("python", file=f"{user}:score")
    texts = ["yes", "no", "half", "two", "unknown", "numpy", "prompt", "gold"]
    assert scores(judge, None, *texts) == (1.0, 0.0, 0.5, 2.0, None, 0.25, 1.0, 1.0)


@pytest.mark.parametrize("text", ["text", "list", "nan", "inf", "huge"])
def test_a_user_function_must_return_a_finite_number(user, text):
    with pytest.raises(JudgeError, match=r"judge_file\.py: score returned .* for prompt [0-9a-f]{16} .*completion c1"):
        scores(Verifier("python", file=f"{user}:score"), None, "yes", text)


def test_a_user_function_that_raises_is_named_with_line_and_prompt(user):
    judge = Verifier("python", file=f"{user}:score")
    with pytest.raises(JudgeError, match=r"file\.py:6: score raised KeyError for prompt [0-9a-f]{16} .*: 'lost'"):
        scores(judge, None, "yes", "raise")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "other"}, r"judge\.mode: must be exact, .* got 'other'"),
        ({"mode": "regex"}, r"judge\.pattern: mode regex needs it"),
        ({"mode": "exact", "pattern": "x"}, r"judge\.pattern: only mode regex reads it"),
        ({"mode": "regex", "pattern": "("}, r"judge\.pattern: '\(' is not a regular expression"),
        ({"mode": "regex", "pattern": "(a)(b)"}, r"judge\.pattern: .* more than one group"),
        ({"mode": "python"}, r"judge\.file: mode python needs it"),
        ({"mode": "exact", "file": "x.py:f"}, r"judge\.file: only mode python reads it"),
        ({"mode": "python", "file": "none.py:f"}, r"judge\.file: none\.py cannot be read"),
        ({"mode": "number", "ignore_case": True}, r"judge\.ignore_case, .* mode number does not read"),
        ({"mode": "python", "file": "none.py:f", "strip": False}, "mode python does not read"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Verifier(**fields)


def test_a_name_that_is_no_function_is_refused(user):
    with pytest.raises(ConfigError, match="is of type int; name a function"):
        Verifier("python", file=f"{user}:constant")
