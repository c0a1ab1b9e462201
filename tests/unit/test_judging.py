"""What the report says of judges: planted habits are found and told, honest judges are not blamed."""

import random

import pytest

from prefloop.evaluate.agreement import TIE
from prefloop.evaluate.judging import (
    JUDGE,
    PEOPLE,
    PERSON,
    SECOND,
    Item,
    Orders,
    Scored,
    compared,
    judge_metrics,
    lines,
    notes,
    tables,
)
from prefloop.evaluate.summary import metric_json
from prefloop.rows import VERBATIM, Completion, JudgedGroup, Message, Prompt, prompt_id


def group(question, texts, scores, win_prob=None):
    messages = (Message(VERBATIM, question),)
    prompt = Prompt(prompt_id(messages), messages, None, "train", "test:1")
    made = tuple(Completion(f"{question}/{i}", t, None, None, "stop", 0, "p") for i, t in enumerate(texts))
    return JudgedGroup(prompt, made, "p", 0, 1.0, 1.0, tuple(scores), win_prob, "llm", (None,) * len(texts))


def scored(*groups):
    found = Scored()
    for one in groups:
        found.add(one)
    return found


def told(metrics, rater=JUDGE, agreement=()):
    judging = {
        rater: {"kind": "llm", "metrics": {name: metric_json(m) for name, m in metrics.items()}},
        "agreement": list(agreement),
    }
    return judging


def test_a_judge_that_goes_by_the_place_is_told():
    orders = Orders([1] * 40, [2] * 40, list(range(40)))
    found = judge_metrics(Scored(), orders, [], JUDGE, None, 0)
    assert (found["order_flips"].value, found["position_bias"].value) == (100.0, 50.0)
    said = notes(told(found))
    assert said[0].startswith("The judge goes by the place: the order shown changes the verdict in 100.0 %")
    assert said[1].startswith("The judge prefers what is shown first: +50.0 points")


def test_an_honest_judge_is_not_blamed():
    draw = random.Random(3)
    winners = [draw.choice((1, 2)) for _ in range(80)]
    orders = Orders(list(winners), list(winners), list(range(80)))
    items = [Item(str(i), (draw.randint(1, 9), 5), None, {JUDGE: w, SECOND: w}) for i, w in enumerate(winners)]
    groups = [group(str(i), ("a" * draw.randint(1, 9), "b" * 5), (w == 1, w == 2)) for i, w in enumerate(winners)]
    found = judge_metrics(scored(*groups), orders, items, JUDGE, 2.0, 0)
    assert found["order_flips"].value == 0.0
    assert found["score_saturation"].value == 0.0
    assert found["length_bias_vs_others"].value == 0.0
    assert found["length_bias"].low < 0 < found["length_bias"].high
    agreement = compared(items, 0)
    assert agreement[0]["metrics"]["kappa"]["value"] == 1.0
    assert notes(told(found, agreement=agreement)) == []


def test_lengths_full_scores_and_silence():
    groups = [
        group("long wins", ("aaaa", "b"), (5.0, 3.0)),
        group("the short one wins", ("a", "bbbb", "bbbb"), (5.0, 5.0, None)),
        group("by probability", ("aa", "b"), (5.0, 1.0), ((0.5, 0.75), (0.25, 0.5))),
        group("equal texts do not count", ("a", "a"), (5.0, 1.0)),
    ]
    found = judge_metrics(scored(*groups), Orders(), [], SECOND, 5.0, 0)
    # 100, 50 (a tie), 75 for the longer one, less 50.
    assert found["length_bias"].value == pytest.approx((50 + 0 + 25) / 3)
    assert found["length_bias"].n == 3
    assert found["answered"].value == pytest.approx(100 * (1 + 2 / 3 + 1 + 1) / 4)
    assert found["score_saturation"].value == pytest.approx(100 * (0.5 + 1 + 0.5 + 0.5) / 4)
    assert "order_flips" not in found
    full = scored(*(group(str(i), ("a", "b"), (5.0, 5.0)) for i in range(30)))
    (said,) = notes(told(judge_metrics(full, Orders(), [], SECOND, 5.0, 0), SECOND))
    assert said.startswith("The evaluation's judge gives its best score to 100.0 %")


def test_a_planted_self_preference_is_found_and_is_of_the_judge_alone():
    items = [
        Item(str(i), (4, 4), own, {JUDGE: own, SECOND: 1 if i % 2 else 2, f"{PERSON}Ana": 1})
        for i in range(40)
        for own in (1, 2)
    ]
    found = judge_metrics(Scored(), Orders(), items, JUDGE, None, 0)
    assert found["self_preference"].value == pytest.approx(50.0)  # people count through their majority only
    assert found["self_preference"].n == 40
    assert "prefers what its own model wrote" in " ".join(notes(told(found)))
    assert "self_preference" not in judge_metrics(Scored(), Orders(), items, SECOND, None, 0)
    assert "self_preference" not in judge_metrics(
        Scored(), Orders(), [Item("x", (1, 1), None, {JUDGE: 1, SECOND: 2})], JUDGE, None, 0
    )


def test_a_length_preference_against_what_others_say():
    items = [Item(str(i), (9, 1), None, {JUDGE: 1, SECOND: 1 if i % 2 else 2}) for i in range(40)]
    found = judge_metrics(Scored(), Orders(), items, JUDGE, None, 0)
    assert found["length_bias_vs_others"].value == pytest.approx(50.0)
    assert any("prefers the longer completion more than the others do" in line for line in notes(told(found)))


def test_agreement_by_hand():
    ana, ben = f"{PERSON}Ana", f"{PERSON}Ben"
    rows = [(1, 1, 1, 1), (1, 1, 2, TIE), (2, 2, 2, 2), (2, 1, 1, 1), (1, 2, TIE, 2), (2, 2, 2, 2)]
    items = []
    for number, (judge, second, one, two) in enumerate(rows):
        ratings = {JUDGE: judge, SECOND: second, ana: one, ben: two} | ({PEOPLE: one} if one == two else {})
        items.append(Item(f"prompt {number}", (1, 2), None, ratings))
    found = {tuple(entry["raters"]): entry for entry in compared(items, 0)}
    assert set(found) == {
        *((JUDGE, SECOND), (JUDGE, PEOPLE), (SECOND, PEOPLE), (ana, ben)),
        *((judge, person) for judge in (JUDGE, SECOND) for person in (ana, ben)),
        (JUDGE, SECOND, ana, ben),
    }
    pair = found[JUDGE, ana]
    assert pair["items"] == 6
    assert pair["metrics"]["same"]["value"] == pytest.approx(100 * 3 / 6)
    assert pair["metrics"]["accuracy"]["value"] == pytest.approx(100 * 3 / 5)  # a tie of the person has no side
    # Observed 1/2; chance 1/2 · 2/6 + 1/2 · 3/6.
    assert pair["metrics"]["kappa"]["value"] == pytest.approx((0.5 - 5 / 12) / (1 - 5 / 12))
    assert found[JUDGE, PEOPLE]["items"] == 4
    # Fleiss by hand: pairs that agree, of 6 in each item; shares of the categories over 24 ratings.
    agree = (6 + 1 + 6 + 3 + 1 + 6) / 6 / 6
    ones, twos, ties = 10, 12, 2
    chance = sum((count / 24) ** 2 for count in (ones, twos, ties))
    assert found[JUDGE, SECOND, ana, ben]["metrics"]["kappa"]["value"] == pytest.approx((agree - chance) / (1 - chance))


def test_one_person_is_no_majority_and_one_category_has_no_kappa():
    ana = f"{PERSON}Ana"
    items = [Item(str(i), (1, 2), None, {JUDGE: 1, ana: 1, PEOPLE: 1}) for i in range(3)]
    (entry,) = compared(items, 0)
    assert entry["raters"] == [JUDGE, ana]
    assert set(entry["metrics"]) == {"same", "accuracy"}


def test_agreement_that_is_chance_is_told_and_shown():
    draw = random.Random(0)
    items = [Item(str(i), (1, 2), None, {JUDGE: draw.choice((1, 2)), SECOND: draw.choice((1, 2))}) for i in range(30)]
    judging = {JUDGE: {"kind": "llm", "metrics": {}}, "agreement": compared(items, 0)}
    (said,) = notes(judging)
    assert said.startswith("That the judge and the evaluation's judge agree more than by chance is not shown: kappa")
    assert lines(judging)[0].startswith("the judge and the evaluation's judge on 30 pairs: same verdict ")
    shown = tables(judging)
    assert shown["rows"] == []
    assert shown["agreed"][0]["items"] == 30
    assert tables({}) is None


def test_the_samplers_log_probs_are_told():
    judging = {
        "sampler": [
            {"round": 0, "gap": 2.4e-6, "reference_logps": "sampler"},
            {"round": 1, "gap": 0.31, "reference_logps": "computed"},
            {"round": 2, "gap": None, "reference_logps": "computed"},
        ]
    }
    first, second, third = lines(judging)
    assert (
        first
        == "round 0: the samples' log-probs differ from ours by at most 2.4e-06 nats a token; used as the reference's"
    )
    assert second.endswith("at most 0.31 nats a token; computed anew")
    assert "beyond measure" in third
