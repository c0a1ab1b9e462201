"""TSO's pairs: the ladder, its correction by a judge and by people, and the choice of pools by shape."""

import dataclasses
import json
import math
import random
from itertools import product

import pytest

from prefloop.components import key_of
from prefloop.errors import ConfigError, DataError
from prefloop.pair._moments import excess_kurtosis, skewness
from prefloop.pair.model_matrix import ModelMatrix
from prefloop.pair.versus_gold import VersusGold
from prefloop.protocols import RoundContext
from prefloop.rows import GOLD, VERBATIM, Completion, JudgedGroup, Message, PolicyRef, Prompt, gold_completion
from tiny import write_jsonl

OLD, MIDDLE, NEW = (PolicyRef(name, name, number) for number, name in enumerate(("old", "middle", "new"), -1))
CONTEXT = RoundContext(0, 2, NEW, OLD, (OLD, MIDDLE, NEW))
RUNG = {"small": 0, "old": 1, "middle": 2, "new": 3, GOLD: 4}
LADDER = ModelMatrix(correction="none")


def group(sources, scores=None, gold="human", texts=None, name="q"):
    """Completions by `sources`, with their scores; the gold answer stands last where there are scores, as in a run."""
    prompt = Prompt(f"id of {name}", (Message(VERBATIM, name),), gold, "train", "here:1")
    texts = texts or [f"{source} {i}" for i, source in enumerate(sources)]
    completions = [
        Completion(f"{name}/{i}", text, (1,), (-1.0,), "stop", i, source)
        for i, (text, source) in enumerate(zip(texts, sources, strict=True))
    ]
    known = scores is not None
    scores = list(scores) if known else [None] * len(completions)
    if known and gold is not None:
        completions.append(gold_completion(prompt))
    notes = tuple("no verdict" if score is None else None for score in scores)
    return JudgedGroup(prompt, tuple(completions), "new", 2, 1.0, 1.0, tuple(scores), None, "j", notes)


def sides(builder, *groups, context=CONTEXT):
    """Return (source of chosen, source of rejected) of each pair."""
    return [(p.chosen.source, p.rejected.source) for p in builder(groups, context)]


def texts(builder, *groups):
    return [(p.chosen.text, p.rejected.text, p.flipped) for p in builder(groups, CONTEXT)]


# The ladder


def test_human_and_newest_are_chosen_against_every_rung_below():
    assert sides(LADDER, group(["small", "new", "old", "middle"])) == [
        (GOLD, "new"),
        (GOLD, "middle"),
        (GOLD, "old"),
        (GOLD, "small"),
        ("new", "middle"),
        ("new", "old"),
        ("new", "small"),
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"chosen_rungs": 0}, [(GOLD, "new"), (GOLD, "old"), (GOLD, "small")]),
        ({"human": False}, [("new", "old"), ("new", "small")]),
        ({"human": False, "chosen_rungs": 2}, [("new", "old"), ("new", "small")]),
        ({"human": False, "chosen_rungs": 3}, [("new", "old"), ("new", "small"), ("old", "small")]),
        ({"human": False, "chosen_rungs": 99}, [("new", "old"), ("new", "small"), ("old", "small")]),
    ],
)
def test_the_settings_say_who_can_be_chosen(settings, expected):
    assert sides(dataclasses.replace(LADDER, **settings), group(["new", "old", "small"])) == expected


def test_a_version_that_was_not_promoted_last_keeps_its_rung():
    context = dataclasses.replace(CONTEXT, policy=OLD)  # start_from: initial
    assert sides(LADDER, group(["old", "new"]), context=context)[-1] == ("new", "old")


def test_a_policy_that_no_round_promoted_is_the_newest():
    context = dataclasses.replace(CONTEXT, policy=PolicyRef("x", "x", 3))
    assert sides(LADDER, group(["new", "x"]), context=context)[-1] == ("x", "new")


def test_a_policy_that_was_promoted_twice_stands_where_it_was_last():
    context = dataclasses.replace(CONTEXT, policy=OLD, versions=(OLD, NEW, OLD))
    assert sides(LADDER, group(["old", "new"]), context=context)[-1] == ("old", "new")


def test_the_first_round_is_spin():
    context = RoundContext(0, 2, OLD, OLD, (OLD,))
    groups = [group(["old", "old"], name="a"), group(["old"], gold=None, name="b")]
    ours, spin = list(LADDER(groups, context)), list(VersusGold()(groups, context))
    assert {dataclasses.replace(p, builder="versus_gold") for p in ours} == set(spin)
    assert len(spin) == 2


def random_groups(seed, count=60):
    draw = random.Random(seed)
    for number in range(count):
        sources = [draw.choice(["small", "old", "middle", "new"]) for _ in range(draw.randrange(6))]
        scores = [draw.choice([None, 0.0, 1.0, draw.random()]) for _ in range(len(sources) + 1)]
        spoken = [draw.choice(["a", "b", "human", f"text {i}"]) for i in range(len(sources))]
        yield group(sources, scores, texts=spoken, name=f"q{number}")


@pytest.mark.parametrize("rungs", [0, 1, 2, 5])
def test_before_correction_no_rung_meets_itself_and_none_is_chosen_over_a_higher_one(rungs):
    groups = list(random_groups(rungs))
    found = list(ModelMatrix(correction="none", chosen_rungs=rungs)(groups, CONTEXT))
    assert len(found) > 20
    for pair in found:
        assert RUNG[pair.chosen.source] > RUNG[pair.rejected.source]
        assert pair.chosen.text != pair.rejected.text
        assert not pair.flipped


def test_the_pairs_are_all_that_the_ladder_allows():
    """Against brute force: every two texts, each on the highest rung on which it stands."""
    for some in random_groups(7):
        highest: dict[str, int] = {}
        for completion in some.completions:
            highest[completion.text] = max(highest.get(completion.text, -1), RUNG[completion.source])
        allowed = {
            (one, other)
            for one, other in product(highest, highest)
            if highest[one] > highest[other] and highest[one] >= RUNG["new"]
        }
        assert {(p.chosen.text, p.rejected.text) for p in LADDER([some], CONTEXT)} == allowed


def test_one_text_on_two_rungs_counts_on_the_higher_one():
    assert texts(LADDER, group(["new", "old", "old"], texts=["a", "a", "b"])) == [
        ("human", "a", False),
        ("human", "b", False),
        ("a", "b", False),
    ]


# The judge's correction

JUDGED = ModelMatrix()


@pytest.mark.parametrize(
    ("tie_margin", "newer", "older", "expected"),
    [
        (0.0, 2.0, 1.0, [("new 0", "old 1", 1.0, False)]),
        (0.0, 1.0, 2.0, [("old 1", "new 0", 1.0, True)]),
        (0.0, 1.0, 1.0, []),
        (0.0, None, 1.0, []),
        (0.0, 1.0, None, []),
        (0.5, 1.5, 1.0, []),
        (0.5, 1.0, 1.5, []),
        (0.5, 1.0, 1.75, [("old 1", "new 0", 0.75, True)]),
    ],
)
def test_the_judge_flips_and_drops(tie_margin, newer, older, expected):
    builder = ModelMatrix(tie_margin=tie_margin, human=False)
    pairs = builder([group(["new", "old"], [newer, older], gold=None)], CONTEXT)
    assert [(p.chosen.text, p.rejected.text, p.margin, p.flipped) for p in pairs] == expected


def test_a_flip_exchanges_everything_that_belongs_to_a_side():
    win_prob = ((0.5, 0.2, 0.6), (0.8, 0.5, 0.7), (0.4, 0.3, 0.5))
    one = dataclasses.replace(group(["new", "old"], [1.0, 3.0, 2.0]), win_prob=win_prob)
    found = {(p.chosen.source, p.rejected.source): p for p in JUDGED([one], CONTEXT)}
    assert {key: (p.chosen_score, p.rejected_score, p.win_prob, p.flipped) for key, p in found.items()} == {
        (GOLD, "new"): (2.0, 1.0, 0.4, False),
        ("old", GOLD): (3.0, 2.0, 0.7, True),
        ("old", "new"): (3.0, 1.0, 0.8, True),
    }


def test_correction_keeps_the_pairs_of_the_ladder_that_have_an_order():
    groups = list(random_groups(3))
    before = {frozenset((p.chosen, p.rejected)) for p in LADDER(groups, CONTEXT)}
    after = list(JUDGED(groups, CONTEXT))
    assert {frozenset((p.chosen, p.rejected)) for p in after} < before
    assert all(p.chosen_score > p.rejected_score for p in after)
    assert {p.flipped for p in after} == {True, False}


def test_without_the_judge_scores_do_not_count():
    (pair,) = ModelMatrix(correction="none", human=False)([group(["new", "old"], [0.0, 9.0], gold=None)], CONTEXT)
    assert (pair.chosen.source, pair.chosen_score, pair.rejected_score, pair.margin) == ("new", None, None, 0.0)


@pytest.mark.parametrize(
    ("settings", "scores", "gold"),
    [
        ({}, True, True),
        ({"correction": "none"}, False, True),
        ({"correction": "none", "select_by": "skew"}, True, True),
        ({"human": False}, True, False),
    ],
)
def test_what_it_needs_depends_on_the_settings(settings, scores, gold):
    builder = ModelMatrix(**settings)
    assert (builder.needs_scores, builder.needs_gold) == (scores, gold)


# People's corrections

TWO = group(["new", "old"], [2.0, 1.0], gold=None)


def corrected(path, rows, *groups, **settings):
    builder = ModelMatrix(human=False, corrections=str(write_jsonl(path, rows)), **settings)
    return list(builder(groups or [TWO], CONTEXT))


def row(left, right, verdict, **more):
    return {"prompt_id": TWO.prompt.prompt_id, "left": left, "right": right, "verdict": verdict, **more}


@pytest.mark.parametrize("correction", ["none", "judge"])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row("new 0", "old 1", "left")], [("new 0", "old 1", False)]),
        ([row("new 0", "old 1", "right", by="somebody")], [("old 1", "new 0", True)]),
        ([row("old 1", "new 0", "left")], [("old 1", "new 0", True)]),
        ([row("old 1", "new 0", "right")], [("new 0", "old 1", False)]),
        ([row("new 0", "old 1", "tie")], []),
        ([row("old 1", "new 0", "both_bad")], []),
        ([], [("new 0", "old 1", False)]),
    ],
)
def test_people_have_the_last_word(tmp_path, rows, expected, correction):
    found = corrected(tmp_path / "c.jsonl", rows, correction=correction)
    assert [(p.chosen.text, p.rejected.text, p.flipped) for p in found] == expected


def test_people_overrule_the_judge(tmp_path):
    judged_other_way = group(["new", "old"], [1.0, 2.0], gold=None)
    (pair,) = corrected(tmp_path / "c.jsonl", [row("new 0", "old 1", "left")], judged_other_way)
    assert (pair.chosen.text, pair.flipped, pair.chosen_score, pair.margin) == ("new 0", False, 1.0, 0.0)
    tied = group(["new", "old"], [None, None], gold=None)
    (pair,) = corrected(tmp_path / "d.jsonl", [row("new 0", "old 1", "right")], tied)
    assert (pair.chosen.text, pair.flipped) == ("old 1", True)


def test_flipping_twice_gives_the_pairs_back(tmp_path):
    groups = list(random_groups(5))

    def flipped_once(path, pairs):
        rows = [{"pair_id": pair.pair_id, "verdict": "right"} for pair in pairs]
        return list(ModelMatrix(correction="none", corrections=str(write_jsonl(path, rows)))(groups, CONTEXT))

    straight = list(LADDER(groups, CONTEXT))
    once = flipped_once(tmp_path / "once.jsonl", straight)
    twice = flipped_once(tmp_path / "twice.jsonl", once)
    assert all(pair.flipped for pair in once)
    assert [(p.chosen, p.rejected) for p in once] == [(p.rejected, p.chosen) for p in straight]
    assert twice == straight


def test_a_pair_id_of_a_flipped_pair_names_its_own_sides(tmp_path):
    judged_other_way = group(["new", "old"], [1.0, 2.0], gold=None)
    (shown,) = ModelMatrix(human=False)([judged_other_way], CONTEXT)
    kept = corrected(tmp_path / "a.jsonl", [{"pair_id": shown.pair_id, "verdict": "left"}], judged_other_way)
    assert kept == [shown]
    (back,) = corrected(tmp_path / "b.jsonl", [{"pair_id": shown.pair_id, "verdict": "right"}], judged_other_way)
    assert (back.chosen, back.rejected, back.flipped) == (shown.rejected, shown.chosen, False)


def test_pairs_that_are_not_there_are_named(tmp_path):
    rows = [row("new 0", "old 1", "left"), {"pair_id": "0123", "verdict": "tie"}, row("new 0", "gone", "left")]
    with pytest.raises(DataError, match=r"no pair 0123 \(line 2\), of prompt id of q \(line 3\); .*per_round"):
        corrected(tmp_path / "c.jsonl", rows)


def test_two_lines_that_disagree_on_one_pair_are_refused(tmp_path):
    (pair,) = ModelMatrix(human=False)([TWO], CONTEXT)
    rows = [row("new 0", "old 1", "left"), {"pair_id": pair.pair_id, "verdict": "right"}]
    with pytest.raises(DataError, match="lines 1 and 2 disagree"):
        corrected(tmp_path / "c.jsonl", rows)
    agreeing = [rows[0], {"pair_id": pair.pair_id, "verdict": "left"}]
    assert corrected(tmp_path / "d.jsonl", agreeing) == [pair]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"c\.jsonl:2: not JSON"),
        ("[1]", r"c\.jsonl:2: must be an object, got list"),
        ('{"pair_id": "x", "verdict": "better"}', r"c\.jsonl:2: verdict must be one of left, .* got 'better'"),
        ('{"pair_id": "x", "verdict": ["tie"]}', r"c\.jsonl:2: verdict must be one of"),
        ('{"pair_id": 7, "verdict": "tie"}', r"c\.jsonl:2: pair_id must be a string, got 7"),
        ('{"prompt_id": "x", "left": "a", "verdict": "tie"}', r"c\.jsonl:2: right must be a string, got None"),
        ('{"prompt_id": "x", "left": "a", "right": "a", "verdict": "tie"}', r"c\.jsonl:2: left and right are the same"),
        ('{"pair_id": "known", "verdict": "tie"}', r"c\.jsonl:2: judges the pair of line 1 again"),
        ("[" * 100_000, r"c\.jsonl:2: not JSON"),
    ],
)
def test_a_bad_line_is_refused_when_the_run_is_built(tmp_path, line, message):
    path = tmp_path / "c.jsonl"
    path.write_text(f'{{"pair_id": "known", "verdict": "left"}}\n{line}\n')
    with pytest.raises(DataError, match=message):
        ModelMatrix(corrections=str(path))


def test_one_pair_judged_in_both_orders_of_its_texts_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", [row("a", "b", "left"), row("b", "a", "right")])
    with pytest.raises(DataError, match="line 1 again"):
        ModelMatrix(corrections=str(path))


def test_a_file_that_cannot_be_read_is_refused_when_the_run_is_built(tmp_path):
    with pytest.raises(ConfigError, match=r"pair_builder\.corrections: .*cannot be read"):
        ModelMatrix(corrections=str(tmp_path / "none.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        ModelMatrix(corrections=str(tmp_path / "latin.jsonl"))


def test_a_changed_file_of_corrections_changes_the_key(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", [row("a", "b", "left")])
    before = key_of(ModelMatrix(corrections=str(path)), "model_matrix")
    assert key_of(ModelMatrix(corrections=str(path)), "model_matrix") == before
    write_jsonl(path, [row("a", "b", "right")])
    assert key_of(ModelMatrix(corrections=str(path)), "model_matrix") != before
    json.dumps(before)


# The shape of margins


@pytest.mark.parametrize(
    ("values", "skew", "kurtosis"),
    [
        ([1, 2, 3, 4, 5], 0.0, -1.3),  # scipy's documentation; discrete uniform: −6(n² + 1) / (5(n² − 1))
        ([2, 8, 0, 4, 1, 9, 9, 0], 0.2650554122698573, None),  # scipy's documentation of skew
        ([0] * 7 + [1] * 3, 0.4 / math.sqrt(0.21), (1 - 6 * 0.21) / 0.21),  # Bernoulli(0.3), closed form
        ([-1, 1], 0.0, -2.0),
        ([0.0, 0.0, 0.0, 4.0], 2 / math.sqrt(3), 7 / 3 - 3),  # by hand: m₂ 3, m₃ 6, m₄ 21
    ],
)
def test_moments_have_known_values(values, skew, kurtosis):
    assert skewness(values) == pytest.approx(skew, abs=1e-12)
    assert skewness([-v for v in values]) == pytest.approx(-skew, abs=1e-12)
    assert skewness([5 + 3 * v for v in values]) == pytest.approx(skew, abs=1e-12)
    if kurtosis is not None:
        assert excess_kurtosis(values) == pytest.approx(kurtosis, abs=1e-12)
        assert excess_kurtosis([5 - 3 * v for v in values]) == pytest.approx(kurtosis, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "skew", "kurtosis"),
    [
        ([0.3, -1.25, 2.5, 0.0, 7.75, -0.5, 1.1], 1.4455217182839877, 0.8331482018350451),
        ([-3.0, 0.25, 0.5, 1e-3, 4.5, 4.75, -8.0, 2.0, 2.0], -0.9838821503140358, 0.3504870199903114),
        ([1e6 + 0.5, 1e6 - 2.25, 1e6 + 3.0, 1e6 + 0.75], -0.19953288127984506, -1.0),
        ([-2.5, -1.0, 0.0, 1.0, 2.5], 0.0, -1.0945303210463735),
    ],
)
def test_moments_are_those_of_scipy(values, skew, kurtosis):
    """`scipy.stats.skew` and `kurtosis` of scipy 1.17.1, `bias=True`; the third is far from 0, the last symmetric."""
    assert skewness(values) == pytest.approx(skew, rel=1e-9, abs=1e-12)
    assert excess_kurtosis(values) == pytest.approx(kurtosis, rel=1e-9)


@pytest.mark.parametrize("values", [[], [3.0], [0.1] * 7])
def test_a_sample_without_spread_has_no_shape(values):
    assert math.isnan(skewness(values))
    assert math.isnan(excess_kurtosis(values))


MARGINS = {"middle": [0, 0, 0, 4], "old": [1, 2, 3, 4], "small": [-4, 0, 0, 0]}
"""New against each source: margins skewed to the right, symmetric, skewed to the left."""


def shaped_groups():
    for number in range(4):
        # The newest scores 10, so that every margin is positive and none is flipped.
        scores = [10.0, *(-float(MARGINS[source][number]) for source in MARGINS)]
        yield group(["new", *MARGINS], scores, gold=None, name=f"q{number}")


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"select_by": "none"}, {"middle", "old", "small"}),
        ({"select_by": "skew"}, {"old"}),
        ({"select_by": "skew", "shape_target": 5.0}, {"middle"}),
        ({"select_by": "skew", "shape_target": -1.0}, {"small"}),
        ({"select_by": "skew", "shape_target": 0.6, "keep_pools": 2}, {"old", "middle"}),
        ({"select_by": "skew", "keep_pools": 9}, {"middle", "old", "small"}),
        ({"select_by": "kurtosis", "shape_target": -2.0}, {"old"}),
        ({"select_by": "kurtosis", "shape_target": 0.0}, {"middle"}),
    ],
)
def test_the_pools_nearest_to_the_target_are_kept(settings, kept):
    groups = list(shaped_groups())
    builder = ModelMatrix(human=False, **settings)
    everything = list(ModelMatrix(human=False)(groups, CONTEXT))
    found = list(builder(groups, CONTEXT))
    assert {p.rejected.source for p in found} == kept
    assert found == [p for p in everything if p.rejected.source in kept]


def test_a_pool_without_a_shape_comes_last():
    groups = [group(["new", "old", "small"], [9.0, 8.0, m], gold=None, name=f"q{m}") for m in (1.0, 2.0, 6.0)]
    builder = ModelMatrix(human=False, select_by="skew", shape_target=-99.0)
    assert {p.rejected.source for p in builder(groups, CONTEXT)} == {"small"}


# Bad input


@pytest.mark.parametrize("sources", [["new", "new"], ["small"] * 3])
def test_one_rung_and_no_human_answer_says_what_to_provide(sources):
    one = group(sources, list(range(len(sources))), gold=None)
    with pytest.raises(DataError, match=r"round 2: .*one rung.*sampler\.smaller.*prompts\.gold"):
        list(ModelMatrix(human=False)([one], CONTEXT))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chosen_rungs": -1}, r"chosen_rungs .*≥ 0"),
        ({"chosen_rungs": 0, "human": False}, r"chosen_rungs .*≥ 1 where human is false"),
        ({"correction": "people"}, "correction .*judge or none"),
        ({"tie_margin": math.nan}, "tie_margin"),
        ({"tie_margin": -0.1}, "tie_margin"),
        ({"select_by": "mean"}, "select_by .*none, skew or kurtosis"),
        ({"shape_target": math.inf}, "shape_target"),
        ({"keep_pools": 0}, "keep_pools"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=rf"pair_builder\.{message}"):
        ModelMatrix(**settings)
