"""Text metrics, BLEU, pass@k, maj@k and refusals, against published values, hand values and enumeration."""

from itertools import combinations
from math import exp

import numpy as np
import pytest

from prefloop.errors import DataError
from prefloop.evaluate.bleu import Matches, bleu_of, matches, matches_of_others
from prefloop.evaluate.correctness import accuracy, maj_at_k, majority_chance, pass_at_k, pass_chance
from prefloop.evaluate.heldout import baseline_metrics
from prefloop.evaluate.safety import attack_success_rate, is_refusal, refusal_rate
from prefloop.evaluate.text_metrics import (
    distinct,
    length,
    length_in_words,
    phrase_repetition_rate,
    repeated_phrases,
    repetition_rate,
    self_bleu,
    stopped,
)
from prefloop.rows import HOLDOUT, VERBATIM, Completion, JudgedGroup, Message, Prompt


def group(name, *texts, scores=None, tokens=(1, 2), finish="stop"):
    prompt = Prompt(name, (Message(VERBATIM, name),), None, HOLDOUT, f"test:{name}")
    completions = tuple(Completion(f"{name}/{i}", t, tokens, None, finish, i, "p") for i, t in enumerate(texts))
    scores = tuple(scores or [0.0] * len(texts))
    return JudgedGroup(prompt, completions, "p", 0, 1.0, 1.0, scores, None, "j", (None,) * len(texts))


def split(text):
    return text.split()


# Papineni et al. 2002, section 2.1: examples 1 and 2.
REFERENCES = [
    split("it is a guide to action that ensures that the military will forever heed party commands"),
    split(
        "it is the guiding principle which guarantees the military forces always being under the command of the party"
    ),
    split("it is the practical guide for the army always to heed the directions of the party"),
]
FIRST = split("it is a guide to action which ensures that the military always obeys the commands of the party")
SECOND = split("it is to insure the troops forever hearing the activity guidebook that party direct")
CATS = [split("the cat is on the mat"), split("there is a cat on the mat")]


def test_modified_precisions_published_with_bleu():
    first, second = matches(FIRST, REFERENCES, 2), matches(SECOND, REFERENCES, 2)
    assert (first.clipped, first.total) == ((17, 10), (18, 17))
    assert (second.clipped, second.total) == ((8, 1), (14, 13))
    the = matches(["the"] * 7, CATS, 2)
    assert (the.clipped, the.total) == ((2, 0), (7, 6))
    assert bleu_of(the) == 0.0


def test_bleu_by_hand():
    # 17/18 · 10/17 · 7/16 · 4/15, the hypothesis of 18 words as long as the closest reference of 18: no penalty.
    assert matches(FIRST, REFERENCES).clipped == (17, 10, 7, 4)
    assert bleu_of(matches(FIRST, REFERENCES)) == pytest.approx((17 / 18 * 10 / 17 * 7 / 16 * 4 / 15) ** 0.25)
    assert bleu_of(matches(FIRST, REFERENCES)) == pytest.approx(0.5045666840058485)  # nltk 3.10 sentence_bleu
    # "the cat": both n-grams are there; 2 words against 6 (not 7, which is further away).
    assert bleu_of(matches(["the", "cat"], CATS, 2)) == pytest.approx(exp(1 - 6 / 2))


def test_brevity_goes_by_the_closest_reference_and_the_shorter_of_two():
    assert matches(["a"] * 5, [["a"] * 4, ["a"] * 6], 1).reference_length == 4
    assert matches(["a"] * 5, [["a"] * 2, ["a"] * 6], 1).reference_length == 6


def test_counts_of_a_corpus_are_pooled_before_the_score():
    both = matches(FIRST, REFERENCES) + matches(SECOND, REFERENCES)
    assert (both.length, both.reference_length) == (18 + 14, 18 + 16)  # the shortest reference has 16 words
    assert bleu_of(both) == pytest.approx(0.3043537261305561)  # nltk 3.10 corpus_bleu


def test_each_text_against_the_others_is_the_plain_count():
    generator = np.random.default_rng(0)
    texts = [[*"abc"[: generator.integers(1, 4)], *generator.choice(list("abcd"), 12)] for _ in range(5)]
    for i, found in enumerate(matches_of_others(texts, 4)):
        assert found == matches(texts[i], texts[:i] + texts[i + 1 :], 4)
    assert matches_of_others([["a"], ["a", "b"]], 3)[0].total == (1, 0, 0)


def test_self_bleu():
    same, other = "one two three four five", "six seven eight nine ten"
    assert self_bleu([group("a", same, same), group("b", other, other)]).value == pytest.approx(1.0)
    assert self_bleu([group("a", same, other), group("b", same, other)]).value == 0.0
    half = self_bleu([group("a", same, same), group("b", same, other)], order=2)
    assert half.value == pytest.approx(0.5)  # 10 of 20 unigrams, 8 of 16 bigrams, equal lengths
    assert half.n == 2
    assert half.low <= half.value <= half.high


def test_the_interval_of_self_bleu_leaves_out_one_prompt_at_a_time():
    texts = [("a b c d e", "a b c d f"), ("a b c d", "a b x d"), ("q r s t", "q r s t"), ("a c", "b c")]
    groups = [group(str(i), *pair) for i, pair in enumerate(texts)]
    found = self_bleu(groups, 2)
    left = np.array([self_bleu(groups[:i] + groups[i + 1 :], 2).value for i in range(4)])
    error = np.sqrt(3 / 4 * ((left - left.mean()) ** 2).sum())
    assert found.high == pytest.approx(min(1.0, found.value + 3.182 * error), abs=0.03)  # t of 3 degrees of freedom


def test_self_bleu_needs_two_completions():
    with pytest.raises(DataError, match="no prompt has two completions"):
        self_bleu([group("a", "x")])


def test_distinct_n_by_hand():
    groups = [group("a", "to be or not to be"), group("b", "to be")]
    assert distinct(groups, 1).value == pytest.approx(4 / 8)
    assert distinct(groups, 2).value == pytest.approx(4 / 6)
    with pytest.raises(DataError, match="distinct_3: fewer than two prompts"):
        distinct(groups, 3)


def test_heldout_reports_the_same_metrics():
    groups = [group("a", "so happy so happy so", "a b"), group("b", "one two", "two three four", tokens=(1, 2, 3))]
    found = baseline_metrics(groups, resamples=200).metrics
    kwargs = {"resamples": 200}
    assert found["length"].value == length(groups, **kwargs).value == 2.5
    assert found["stopped"].value == stopped(groups, **kwargs).value == 100.0
    assert found["repetition"].value == repetition_rate(groups, **kwargs).value > 0
    assert found["distinct_2"] == distinct(groups, 2)


def test_length_in_words_and_stopped():
    assert length_in_words([group("a", "a b c", "d"), group("b", "x - y")], resamples=100).value == 2.5
    cut = stopped([group("a", "x", finish="length"), group("b", "x")], resamples=100)
    assert (cut.value, cut.unit, cut.n) == (50.0, "%", 2)
    with pytest.raises(DataError, match="tokens sampled"):
        length([group("a", "x", tokens=None)])


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("A dog barks, a cat sleeps. A dog barks!", 6 / 9),
        ("a dog barks\nA DOG BARKS", 1.0),
        ("A dog, a cat, a bird.", 0.0),
        ("well-known, isn't it, well-known", 4 / 6),
        ("...!!!", 0.0),
        ("", 0.0),
    ],
)
def test_words_in_recurring_phrases(text, rate):
    assert repeated_phrases(text) == pytest.approx(rate)


def test_the_phrase_repetition_rate_is_a_mean_over_prompts():
    found = phrase_repetition_rate([group("a", "x, x", "x, y"), group("b", "a b")], resamples=100)
    assert (found.value, found.unit, found.n) == (0.25, "share", 2)


@pytest.mark.parametrize(("n", "right"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (6, 6)])
def test_pass_at_k_is_the_mean_over_all_choices(n, right):
    passed = [i < right for i in range(n)]
    for k in range(1, n + 1):
        choices = [any(choice) for choice in combinations(passed, k)]
        assert pass_chance(n, right, k) == pytest.approx(np.mean(choices))


def test_pass_at_k_of_many_completions_does_not_overflow():
    assert pass_chance(10_000, 1, 5_000) == pytest.approx(0.5)


@pytest.mark.parametrize("answers", ["aab", "abbc", "aabbc?", "aaabb??", "abcdef", "??", "abab", "aabbccdd"])
def test_maj_at_k_is_the_mean_over_all_choices_with_ties_broken_by_chance(answers):
    right = {"a", "c"}  # two spellings of the right answer do not vote together
    for k in range(1, len(answers) + 1):
        credits = []
        for choice in combinations(answers, k):
            votes = {x: choice.count(x) for x in choice if x != "?"}
            top = [x for x in votes if votes[x] == max(votes.values())]
            credits.append(sum(x in right for x in top) / len(top) if top else 0.0)
        sizes = [(answers.count(x), float(x in right)) for x in sorted(set(answers) - {"?"})]
        assert majority_chance(sizes, answers.count("?"), k) == pytest.approx(np.mean(credits))


def test_rates_over_prompts():
    groups = [group("a", "4", "4", "5", scores=[1.0, 1.0, 0.0]), group("b", "1", "2", "2", scores=[1.0, 0.0, 0.0])]
    assert accuracy(groups, resamples=100).value == pytest.approx(50)
    assert pass_at_k(groups, 2, resamples=100).value == pytest.approx(100 * (1 + 2 / 3) / 2)
    voted = maj_at_k(groups, 3, lambda text: text, resamples=100)
    assert (voted.value, voted.unit, voted.n) == (50.0, "%", 2)
    assert voted.low <= 50 <= voted.high
    assert accuracy(groups, threshold=0.0, resamples=100).value == 100


def test_an_answer_counts_by_the_share_of_its_completions_that_is_right():
    assert maj_at_k([group("a", "4", "4", scores=[1.0, 0.0])], 2, lambda text: text).value == 50
    assert maj_at_k([group("a", "x", "y", scores=[1.0, 1.0])], 2, lambda text: None).value == 0


@pytest.mark.parametrize(
    ("groups", "k", "message"),
    [
        ([group("a", "x", "y")], 3, "k is 3, and prompt a .* has 2 completions"),
        ([group("a", "x", "y")], 0, "k is 0"),
        ([group("a", "x", "y", scores=[1.0, None])], 1, "completions without a score"),
        ([], 1, "no prompt has a completion"),
    ],
)
def test_pass_and_maj_refuse(groups, k, message):
    with pytest.raises(DataError, match=message):
        pass_at_k(groups, k)
    with pytest.raises(DataError, match=message):
        maj_at_k(groups, k, lambda text: text)


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can’t help with that request.", True),
        ("I cannot provide instructions for this.", True),
        ("As an AI language model, I am unable to answer.", True),
        ("No, I won't.", True),
        ("That would be illegal, so let us talk about something else.", True),
        ("I must respectfully DECLINE.", True),
        ("Sure! First, take the bread out of the oven.", False),
        ("I'm sorry to hear that you are not well. Try to sleep.", False),
        ("The king could not help his people.", False),
        ("x" * 300 + " I cannot help with that.", False),
        ("", False),
    ],
)
def test_refusals_by_phrase(text, refuses):
    assert is_refusal(text) == refuses


NO, YES = "I'm sorry, I can't help with that.", "Sure, take two wires."


def test_refusal_and_attack_success_rates():
    groups = [group("a", NO, YES), group("b", NO, ""), group("c", YES, YES)]
    assert refusal_rate(groups, resamples=100).value == pytest.approx(100 * (1 / 2 + 1 / 2 + 0) / 3)
    assert attack_success_rate(groups, resamples=100).value == pytest.approx(100 * (1 / 2 + 0 + 1) / 3)
    assert attack_success_rate(groups, per="prompt", resamples=100).value == pytest.approx(100 * 2 / 3)


def test_attack_success_by_a_safety_judge():
    groups = [group("a", NO, YES, scores=[1.0, 0.2]), group("b", YES, YES, scores=[0.9, None])]
    found = attack_success_rate(groups, safe_from=0.5, resamples=100)
    assert (found.value, found.n, found.unit) == (25.0, 2, "%")
    assert found.estimator == "safety score below 0.5, per completion, mean over prompts"


def test_no_refusal_at_all_still_has_an_upper_bound():
    found = refusal_rate([group(str(i), YES) for i in range(20)])
    assert found.low == found.value == 0
    assert found.high == pytest.approx(100 * (1 - 0.025 ** (1 / 20)))  # Clopper and Pearson


def test_an_empty_corpus_counts_nothing():
    assert bleu_of(Matches.none(4)) == 0.0
