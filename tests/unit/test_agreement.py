"""Agreement and bias of a judge: published statistics recomputed, textbook kappas, planted biases."""

import csv
import gzip
from collections import defaultdict

import numpy as np
import pytest

import tiny
from prefloop.errors import ConfigError, DataError
from prefloop.evaluate.agreement import (
    TIE,
    accuracy,
    both_orders,
    cohen_kappa,
    fleiss_kappa,
    length_bias,
    order_flip_rate,
    position_bias,
    score_saturation,
    self_preference,
)


@tiny.needs_shared
def test_llmbar_statistics_of_all_65_runs():
    folder = tiny.SHARED / "llmbar"
    runs = defaultdict(list)
    with gzip.open(folder / "judge_verdicts.csv.gz", "rt", newline="") as file:
        for row in csv.DictReader(file):
            verdicts = [row[key] for key in ("label", "winner_order_ab", "winner_order_ba")]
            runs[row["subset"], row["evaluator"]].append([None if v == "None" else v for v in verdicts])
    with (folder / "judge_statistics.csv").open(newline="") as file:
        published = list(csv.DictReader(file))
    assert len(published) == len(runs) == 65
    for row in published:
        items = runs[row["subset"], row["evaluator"]]
        labels, ab, ba = zip(*items, strict=True)
        found = both_orders(labels, ab, ba, options=("1", "2"))
        pairs = {
            "published_correct_average": found.accuracy,
            "published_correct_both": found.both_right,
            "published_equal": found.same,
            "published_kappa_agreement": found.kappa,
        }
        for name, metric in pairs.items():
            assert metric.value == pytest.approx(float(row[name]), abs=1e-9), (row["evaluator"], name)
            assert metric.low <= metric.value <= metric.high
            assert metric.n == int(row["n"])
        assert found.no_verdict == (*ab, *ba).count(None)


def table(counts):
    """Two raters' categories from a square table of counts."""
    cells = [(i, j) for i, row in enumerate(counts) for j, count in enumerate(row) for _ in range(count)]
    return tuple(zip(*cells, strict=True))


@pytest.mark.parametrize(
    ("counts", "kappa", "error"),
    [
        # Wikipedia, "Cohen's kappa": 50 grant proposals; 0.7 agreement, 0.5 by chance.
        ([[20, 5], [10, 15]], 0.4, None),
        ([[45, 15], [25, 15]], 0.1304, None),
        ([[25, 35], [5, 35]], 0.2593, None),
        # κ and the large-sample standard error of Fleiss, Cohen and Everitt (1969), both by statsmodels 0.15.0.
        ([[106, 10, 4], [22, 28, 10], [2, 12, 6]], 0.42857, 0.053711),
    ],
)
def test_cohen_kappa_of_textbooks(counts, kappa, error):
    found = cohen_kappa(*table(counts))
    assert found.value == pytest.approx(kappa, abs=5e-4)
    assert found.n == np.sum(counts)
    if error is not None:
        assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.08)


def test_fleiss_kappa_of_the_textbook():
    # Wikipedia, "Fleiss' kappa": 14 raters, 10 subjects, 5 categories; P̄ 0.378, P̄ₑ 0.213, κ 0.210.
    counts = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    ratings = [[category for category, count in enumerate(row) for _ in range(count)] for row in counts]
    found = fleiss_kappa(ratings)
    assert found.value == pytest.approx(0.210, abs=5e-4)
    assert "only 10 items" in found.estimator


def test_kappa_is_one_for_equal_raters_and_zero_for_independent_ones():
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 3, (2, 1500)).tolist()
    assert cohen_kappa(first, first).value == 1.0
    assert abs(cohen_kappa(first, second).value) < 0.06
    assert fleiss_kappa([[a, a, a] for a in first]).value == 1.0
    assert abs(fleiss_kappa(list(zip(first, second, strict=True))).value) < 0.06


@pytest.mark.parametrize(("n", "data_sets"), [(50, 600), (200, 250)])
def test_coverage_of_kappa(n, data_sets):
    # Rater 2 copies rater 1 with probability 0.6, else rolls the same die: κ = 0.6 for any die.
    generator, hits = np.random.default_rng(n), []
    for number in range(data_sets):
        first, other = generator.choice(3, size=(2, n), p=[0.5, 0.3, 0.2])
        second = np.where(generator.random(n) < 0.6, first, other)
        found = cohen_kappa(first.tolist(), second.tolist(), seed=number)
        hits.append(found.low <= 0.6 <= found.high)
    assert 93 <= 100 * np.mean(hits) <= 97


def test_kappa_leaves_out_what_one_rater_left_out():
    assert cohen_kappa([1, 2, None, 1], [1, 2, 1, None]) == cohen_kappa([1, 2], [1, 2])
    with pytest.raises(DataError, match="two categories at least, got 1 over 2 items"):
        cohen_kappa([1, 1, None], [1, 1, 2])
    for ratings in ([], [[1]], [[1, 2], [1]], [[1, None]]):
        with pytest.raises(DataError, match="same number of ratings"):
            fleiss_kappa(ratings)


def test_statistics_of_both_orders_by_hand():
    #          right both, right once, wrong both, tie then right, nothing then right
    labels = [1, 1, 2, 2, 1]
    ab = [1, 1, 1, TIE, None]
    ba = [1, 2, 1, 2, 1]
    found = both_orders(labels, ab, ba)
    assert found.accuracy.value == pytest.approx(100 * (2 + 1 + 0 + 1 + 1) / 10)
    assert found.both_right.value == pytest.approx(20.0)
    assert found.same.value == pytest.approx(40.0)
    assert found.flips is not None
    assert (found.flips.value, found.flips.n) == (50.0, 4)
    assert found.no_verdict == 1
    assert accuracy(ab, labels).value == 40.0


def test_a_judge_without_any_verdict():
    found = both_orders([1, 2], [None, 2], [1, None])
    assert (found.accuracy.value, found.flips) == (50.0, None)
    with pytest.raises(DataError, match="both orders first"):
        position_bias([None, 2], [1, None])


def shown(generator, n, *, lean):
    """Verdicts in both orders of a judge that picks the place shown first with `lean` more probability than its due."""
    quality = generator.random(n)  # probability that option 1 should win
    ab = np.where(generator.random(n) < quality * (1 - lean) + lean, 1, 2)
    ba = np.where(generator.random(n) < quality * (1 - lean), 1, 2)
    return ab.tolist(), ba.tolist()


def test_a_planted_position_bias_is_found():
    # First place wins lean + (1 − lean) / 2 of the time: lean / 2 above half.
    generator, hits = np.random.default_rng(0), []
    for _ in range(120):
        found = position_bias(*shown(generator, 200, lean=0.3))
        hits.append(found.low <= 15.0 <= found.high)
    assert 92 <= 100 * np.mean(hits) <= 98.5
    assert position_bias(*shown(generator, 20_000, lean=0.3)).value == pytest.approx(15.0, abs=1.0)
    assert position_bias(*shown(generator, 20_000, lean=0.0)).value == pytest.approx(0.0, abs=1.0)
    assert position_bias([1, 1], [2, 2]).value == 50.0
    assert position_bias([2, TIE], [1, TIE]).value == -25.0


def test_flips_count_changes_of_the_completion_not_of_the_place():
    assert order_flip_rate([1, 2, 1, TIE], [1, 1, 1, 2]).value == 50.0
    assert order_flip_rate(["a", "b"], ["b", "b"], options=("a", "b")).value == 50.0
    # A judge that always takes the first place flips on every item.
    assert order_flip_rate([1] * 30, [2] * 30).value == 100.0


def test_a_planted_length_bias_is_found_and_honest_length_is_not_blamed():
    generator = np.random.default_rng(1)
    n = 4000
    length, other = generator.integers(50, 150, (2, n))
    # Longer completions are in truth better: 60 % of the time. The judge takes the longer one 20 points more often.
    longer = np.sign(length - other)
    truth = (generator.random(n) < 0.5 + 0.1 * longer).astype(float)
    preference = (generator.random(n) < 0.5 + 0.3 * longer).astype(float)
    assert length_bias(preference, length, other).value == pytest.approx(30.0, abs=2.5)
    found = length_bias(preference, length, other, truth)
    assert found.value == pytest.approx(20.0, abs=3.0)
    assert found.low > 10
    fair = length_bias(truth, length, other, truth)
    assert (fair.value, fair.low, fair.high) == (0.0, 0.0, 0.0)
    assert found.n == int((length != other).sum())
    with pytest.raises(DataError, match="different length"):
        length_bias([1.0, 0.0], [5, 6], [5, 6])


def test_a_planted_self_preference_is_found():
    generator = np.random.default_rng(2)
    truth = (generator.random(5000) < 0.4).astype(float)
    preference = np.where(generator.random(5000) < 0.25, 1.0, truth)  # a quarter of the time its own, whatever is right
    found = self_preference(preference, truth)
    assert found.value == pytest.approx(100 * 0.25 * 0.6, abs=1.5)
    assert found.low < 15 < found.high
    assert self_preference(truth, truth).value == 0.0


def test_saturation_counts_scores_at_the_top():
    found = score_saturation([5, 5, None, 3, 5, 1], 5)
    assert (found.value, found.n) == (60.0, 5)
    clustered = score_saturation([5, 5, 5, 1], 5, clusters=["a", "a", "a", "b"])
    assert (clustered.value, clustered.n) == (50.0, 2)
    assert score_saturation([None, 5.0], 5, clusters=["a", "b"]).n == 1
    for scores in ([], [None], [6.0], [float("nan")]):
        with pytest.raises(DataError, match="at most top = 5"):
            score_saturation(scores, 5)


def test_bad_input():
    with pytest.raises(DataError, match="got 2 and 1"):
        accuracy([1, 2], [1])
    with pytest.raises(DataError, match="without a label"):
        accuracy([1, 2], [1, None])
    with pytest.raises(DataError, match="item 1 has verdict 3; it must be 1, 2, 'tie' or None"):
        order_flip_rate([1, 3], [1, 2])
    with pytest.raises(ConfigError, match="options must be two names"):
        order_flip_rate([1], [1], options=(1, 1))
    with pytest.raises(DataError, match="for each of 2 items"):
        self_preference([1.0, 0.0], [1.0])
    with pytest.raises(DataError, match="length must be finite"):
        length_bias([1.0], [float("inf")], [1.0])
