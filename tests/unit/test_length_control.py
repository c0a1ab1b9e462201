"""Length-controlled win rate: what AlpacaEval's own procedure gives, planted effects, the regularization rows."""

import csv
from math import nan

import numpy as np
import pytest

from prefloop.errors import DataError
from prefloop.evaluate.length_control import COLUMNS, length_controlled_win_rate
from prefloop.evaluate.win_rate import win_rate


def sigmoid(scores):
    return 1 / (1 + np.exp(-scores))


def alpaca_like(seed, bias, quality, n=805):
    """Preferences in [0, 1] for n prompts, and regularization rows of two gamed baselines."""
    g = np.random.default_rng(seed)
    difficulty = g.normal(0, 1.2, n)
    baseline = g.lognormal(7.4, 0.6, n).round()
    length = np.maximum(1, baseline * g.lognormal(0, 0.5, n) + 400).round()
    gap = (baseline - length) / np.std(baseline - length, ddof=1)
    preference = sigmoid(quality - bias * np.tanh(gap) + difficulty + g.normal(0, 2, n)).round(6)
    [g.normal(0, 1, n) for _ in range(2)]
    gamed = np.concatenate([np.abs(g.normal(1, 0.6, n)), -np.abs(g.normal(1, 0.6, n))])
    rows = {
        "preference": sigmoid(-0.9 * np.tanh(gamed) + g.normal(0, 1.5, 2 * n)),
        "std_delta_len": gamed,
        "instruction_difficulty": np.concatenate([difficulty, difficulty]),
    }
    return preference, length, baseline, difficulty, rows


# Made once with scikit-learn 1.9.1 driven as AlpacaEval does (tatsu-lab/alpaca_eval, metrics/glm_winrate.py, 1020da2):
# LogisticRegressionCV, penalty l1, liblinear, no intercept, GroupKFold(5), its log loss of probabilities, weights 0.1
# for the regularization rows. In order: with difficulty and rows, with difficulty, with neither.
ORACLE = {
    (0, 0.3, -2): (22.7589, 23.6261, 24.5890),
    (1, 1, -2): (23.7449, 23.5953, 23.5688),
    (2, 3, -2): (27.1157, 23.8341, 24.2733),
    (3, 0.3, 0): (49.3125, 50.7043, 50.0),
    (5, 3, 0): (52.3840, 50.1158, 49.8442),
    (6, 0.3, 1): (63.4422, 64.5917, 64.2620),
    (8, 3, 1): (64.7973, 63.4646, 62.9553),
}


@pytest.mark.parametrize("setting", ORACLE)
def test_what_scikit_learn_gives_when_driven_as_alpaca_eval_does(setting):
    preference, length, baseline, difficulty, rows = alpaca_like(*setting)
    found = [
        length_controlled_win_rate(preference, length, baseline, difficulty, rows).value,
        length_controlled_win_rate(preference, length, baseline, difficulty).value,
        length_controlled_win_rate(preference, length, baseline).value,
    ]
    assert found == pytest.approx(ORACLE[setting], abs=0.03)


def test_rows_as_a_csv_file_gives_them(tmp_path):
    preference, length, baseline, difficulty, rows = alpaca_like(1, 1, -2)
    path = tmp_path / "df_gamed.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, "not_gamed_baseline"])
        writer.writerows([*(repr(float(rows[c][i])) for c in COLUMNS), "False"] for i in range(len(rows["preference"])))
        writer.writerow(["", "0.5", "0.1", "False"])  # one that was not judged
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    from_file = length_controlled_win_rate(preference, length, baseline, difficulty, read)
    assert from_file == length_controlled_win_rate(preference, length, baseline, difficulty, rows)
    assert "1610 regularization rows" in from_file.estimator


def planted(generator, n, *, bias, quality=-0.4, slope=0.8, longer=0.7):
    """Wins and losses of a policy whose completions are mostly longer, and its true win rate at equal length."""
    difficulty = generator.normal(0, 1, n)
    gap = generator.normal(-longer, 1, n)  # baseline minus policy
    score = quality - bias * np.tanh(gap / gap.std(ddof=1)) + slope * difficulty
    won = (generator.random(n) < sigmoid(score)).astype(float)
    points, weights = np.polynomial.hermite_e.hermegauss(40)  # the mean over a standard normal difficulty
    return won, -gap, np.zeros(n), difficulty, 100 * sigmoid(quality + slope * points) @ weights / weights.sum()


def test_a_planted_effect_of_length_is_taken_out():
    won, length, baseline, difficulty, truth = planted(np.random.default_rng(1), 6000, bias=1.5)
    found = length_controlled_win_rate(won, length, baseline, difficulty)
    assert win_rate(won, resamples=50).value > truth + 10
    assert found.value == pytest.approx(truth, abs=2.0)
    assert found.low < truth < found.high


def test_without_an_effect_of_length_it_is_the_win_rate():
    won, length, baseline, difficulty, truth = planted(np.random.default_rng(2), 6000, bias=0.0)
    found = length_controlled_win_rate(won, length, baseline, difficulty)
    assert found.value == pytest.approx(win_rate(won, resamples=50).value, abs=1.0)
    assert found.value == pytest.approx(truth, abs=2.0)


def test_its_interval_covers():
    generator, hits = np.random.default_rng(3), []
    for _ in range(150):
        won, length, baseline, difficulty, truth = planted(generator, 200, bias=1.0)
        found = length_controlled_win_rate(won, length, baseline, difficulty)
        hits.append(found.low <= truth <= found.high)
    assert 92 <= 100 * np.mean(hits) <= 97.5


def test_leaving_out_the_regularization_shows():
    # A policy that pads every answer: its difference in length hardly varies, so tanh is the same everywhere and its
    # effect looks like quality. The gamed baselines, same quality and other lengths, tell the two apart.
    generator = np.random.default_rng(4)
    n, bias, quality = 805, 1.2, -1.0
    gap = generator.normal(-6, 1, n)  # in standard deviations: tanh of it is −1
    won = (generator.random(n) < sigmoid(quality - bias * np.tanh(gap / gap.std(ddof=1)))).astype(float)
    gamed = np.concatenate([generator.normal(-1.5, 1, n), generator.normal(1.5, 1, n)])
    judged = (generator.random(2 * n) < sigmoid(-bias * np.tanh(gamed))).astype(float)
    rows = {"preference": judged, "std_delta_len": gamed}
    truth = 100 * sigmoid(quality)
    anchored = length_controlled_win_rate(won, -gap, np.zeros(n), regularization_rows=rows)
    alone = length_controlled_win_rate(won, -gap, np.zeros(n))
    assert win_rate(won, resamples=50).value == pytest.approx(100 * sigmoid(quality + bias), abs=5)
    assert anchored.value == pytest.approx(truth, abs=6)
    assert abs(alone.value - truth) > 15
    assert anchored.low < truth < anchored.high


def test_the_baseline_against_itself_is_half():
    same = np.arange(30.0)
    found = length_controlled_win_rate(np.full(30, 0.5), same, same, np.linspace(-1, 1, 30))
    assert (found.value, found.n, found.unit) == (50.0, 30, "%")


def test_neither_the_unit_of_length_nor_exchanging_the_policies_matters():
    preference, length, baseline, difficulty, _ = alpaca_like(5, 3, 0)
    found = length_controlled_win_rate(preference, length, baseline, difficulty)
    in_words = length_controlled_win_rate(preference, length / 5, baseline / 5, difficulty)
    assert in_words.value == pytest.approx(found.value, abs=1e-6)
    other = length_controlled_win_rate(1 - preference, baseline, length, -difficulty)
    assert other.value == pytest.approx(100 - found.value, abs=0.01)
    assert other.low == pytest.approx(100 - found.high, abs=0.01)


def test_all_won_stays_inside_the_range():
    found = length_controlled_win_rate(np.ones(25), np.arange(25.0), np.full(25, 12.0))
    assert 99 < found.value <= found.high == 100
    assert found.low == pytest.approx(100 * 25 / (25 + 1.959964**2))  # Wilson's for 25 of 25
    lost = length_controlled_win_rate(np.zeros(25), np.arange(25.0), np.full(25, 12.0))
    assert (lost.low, lost.high) == (0.0, pytest.approx(100 - found.low))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5, nan], [1, 2], [2, 2]), "nan for comparison 1"),
        (([1.5, 1.0], [1, 2], [2, 2]), r"must be in \[0, 1\]"),
        (([0.5, 1.0], [1, 2, 3], [2, 2]), r"length needs one number for each of 2 preferences, got \(3,\)"),
        (([0.5, 1.0], [1, 2], [2, nan]), "baseline_length must be finite, got nan for prompt 1"),
        (([0.5, 1.0], [3, 4], [1, 2]), "every completion is 2 longer than the baseline's"),
        (([0.5, 1.0], [1, 4], [1, 2], None, {"preference": [1.0]}), "std_delta_len"),
        (([0.5, 1.0], [1, 4], [1, 2], [0, 1], {"preference": [1.0], "std_delta_len": [1]}), "instruction_difficulty"),
        (([0.5, 1.0], [1, 4], [1, 2], None, {"preference": [1.0], "std_delta_len": [1, 2]}), "differ in length"),
        (([0.5, 1.0], [1, 4], [1, 2], None, [{"preference": "x", "std_delta_len": "1"}]), "needs? numbers"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        length_controlled_win_rate(*arguments)


def test_few_prompts_are_said_to_be_few():
    found = length_controlled_win_rate([0.9, 0.8, 0.3, 0.2], [9, 8, 3, 2], [5, 5, 5, 5])
    assert "only 4 prompts" in found.estimator
