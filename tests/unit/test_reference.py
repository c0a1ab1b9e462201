import math
from collections import Counter
from dataclasses import replace

import pytest

from prefloop.rows import VERBATIM, Completion, Message, PreferencePair, Prompt, TokenizedPair
from prefloop.train.reference import Encoding, sampler_gap, score_reference, tokenize_pairs
from tiny import tiny_model

PROMPT = Prompt("p", (Message(VERBATIM, "ab"),), None, "train", "here:1")
ENCODING = Encoding(lambda prompt: [1, 2], lambda completion: list(completion.token_ids or ()), max_tokens=8)


def completion(ids: tuple[int, ...], source: str = "policy") -> Completion:
    return Completion(f"c{ids}", "text", ids, tuple(-0.5 for _ in ids), "stop", 0, source)


def tokenize(pairs, sampled_by=None):
    dropped: Counter[str] = Counter()
    return list(tokenize_pairs(pairs, ENCODING, dropped, sampled_by)), dict(dropped)


def pair(chosen: tuple[int, ...], rejected: tuple[int, ...], source: str = "policy") -> PreferencePair:
    return PreferencePair(
        "id", PROMPT, completion(chosen, source), completion(rejected), 1.0, 0.0, 1.0, None, 1.0, "test", 0
    )


def test_pairs_that_teach_nothing_are_dropped_with_a_reason():
    kept, dropped = tokenize(
        [pair((5,), (6,)), pair((), (6,)), pair((5,), (5,)), pair((5,) * 7, (6,)), pair((5,), (6,) * 7)]
    )
    assert [p.chosen for p in kept] == [(5,)]
    assert dropped == {
        "a side is empty": 1,
        "both sides have the same tokens": 1,
        "longer than train.max_tokens=8": 2,
    }


def test_the_length_limit_is_the_same_on_both_sides():
    assert len(tokenize([pair((5,) * 6, (6,)), pair((5,), (6,) * 6)])[0]) == 2


def test_only_log_probs_of_the_reference_itself_are_kept():
    ((kept,), _) = tokenize([pair((5, 6), (7,))], "policy")
    assert (kept.reference_chosen, kept.reference_rejected) == ((-0.5, -0.5), (-0.5,))
    ((other,), _) = tokenize([pair((5, 6), (7,), source="gold")], "policy")
    assert (other.reference_chosen, other.reference_rejected) == (None, (-0.5,))
    ((none,), _) = tokenize([pair((5, 6), (7,))])
    assert (none.reference_chosen, none.reference_rejected) == (None, None)


def test_the_gap_is_the_worst_token_and_infinite_where_one_is_missing():
    row = TokenizedPair("a", (1,), (2, 3), (4,), (-1.0, -2.0), (-3.0,), None, 1.0)
    assert sampler_gap([row], [row]) == 0
    assert sampler_gap([row], [replace(row, reference_chosen=(-1.0, -2.25))]) == pytest.approx(0.25)
    assert sampler_gap([replace(row, reference_rejected=None)], [row]) == math.inf
    assert sampler_gap([row], [replace(row, reference_chosen=(-1.0,))]) == math.inf


def test_scores_do_not_depend_on_the_batch():
    rows = [TokenizedPair(str(n), (1, 5), (6,) * n, (7,) * (9 - n), None, None, None, 1.0) for n in range(1, 9)]
    model = tiny_model("llama")
    one, many = (score_reference(model, rows, "padded", budget) for budget in (1, 10_000))
    assert sampler_gap(one, many) < 1e-5
