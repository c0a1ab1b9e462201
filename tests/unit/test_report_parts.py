"""Parts of the report and of `prefloop show`: examples by outcome, marks, the frontier, provenance."""

import time
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from prefloop.cli import app
from prefloop.evaluate.report import provenance
from prefloop.evaluate.report_examples import outcomes_of, samples
from prefloop.evaluate.report_frontier import frontier_chart, frontier_points
from prefloop.evaluate.report_origins import origin_table
from prefloop.evaluate.text_marks import likeness, marked
from prefloop.rows import Metric
from synthetic_run import SyntheticRun


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    run = SyntheticRun(tmp_path_factory.mktemp("runs") / "demo")
    run.begin(reference="previous", prompts={"path": "mine.jsonl", "holdout": 0.2}, versions={"torch": "2.13.0"})
    run.round(0, 0.4)
    run.round(1, 0.5)
    run.round(2, 0.3, accepted=False)
    run.summary |= {"state": "done", "verdict": "2 of 3 rounds were accepted."}
    run.save()
    return run, CliRunner().invoke(app, ["show", str(run.root), "--examples", "4"])


def groups(run, scores, text="one two three four five"):
    found = [run.group(prompt, 0.0, 0, 1) for prompt in run.holdout[: len(scores)]]
    done = zip(found, scores, strict=True)
    return [replace(g, scores=(s,), completions=(replace(g.completions[0], text=text),)) for g, s in done]


def test_examples_are_those_that_gained_lost_and_changed_most(tmp_path):
    run = SyntheticRun(tmp_path / "demo")
    before = groups(run, [0.0] * 20)
    after = groups(run, [(i - 6) / 10 for i in range(20)])
    texts = {3: "six seven eight nine ten", 9: "one two three four ten"}
    after = [
        replace(g, completions=(replace(g.completions[0], text=texts.get(i, g.completions[0].text)),))
        for i, g in enumerate(after)
    ]
    found = samples(before, after)
    gains = {name: sorted(round(s.gain, 1) for s in found if name in s.outcomes) for name in ("gained", "lost")}
    assert gains == {"gained": [1.0, 1.1, 1.2, 1.3], "lost": [-0.6, -0.5, -0.4, -0.3]}
    changed = [s.after for s in found if "changed" in s.outcomes]
    assert sorted(changed) == sorted(texts.values())  # those that did not change are not said to have
    assert len({s.prompt for s in found}) == len(found)
    assert [(name, n) for name, _, n in outcomes_of(found)] == [
        ("gained", 4),
        ("lost", 4),
        ("changed", 2),
        ("blind", 4),
    ]
    both = [s for s in found if len(s.outcomes) > 1]
    assert [s.outcomes for s in both] == [("lost", "changed")]
    assert both[0].titles == ["Lost most", "Changed most"]


def test_a_missing_score_is_neither_gained_nor_lost(tmp_path):
    run = SyntheticRun(tmp_path / "demo")
    found = samples(groups(run, [0.0, 0.0]), groups(run, [None, 1.0]))
    assert [s.outcomes for s in found] == [("gained",), ("blind",)]
    assert samples([], []) == []


def test_marks_are_the_words_that_differ():
    found = marked("Tom had a red ball .", "Tom had a big red ball !")
    assert found.before == (("Tom had a ", False), ("red ball ", False), (".", True))
    assert found.after == (("Tom had a ", False), ("big ", True), ("red ball ", False), ("!", True))
    same = marked("no difference", "no difference")
    assert not same.marks
    assert same.alike == 1.0


@pytest.mark.parametrize(
    "texts", [("a b\n\n c  d", "a  x\n c d "), ("", "a b"), ("", ""), ("ein Wort", "zwei Wörter\n")]
)
def test_the_parts_are_the_whole_text(texts):
    found = marked(*texts)
    assert tuple("".join(text for text, _ in side) for side in (found.before, found.after)) == texts


def test_of_texts_with_little_in_common_the_longer_words_that_the_other_lacks_are_marked():
    found = marked("He was sad . The rain fell on Anna", "They laughed with Anna, and played in sunshine")
    assert found.alike < 0.25
    assert [t.strip() for t, differs in found.before if differs] == ["rain fell"]
    assert [t.strip() for t, differs in found.after if differs] == ["They laughed with", "played", "sunshine"]


def test_likeness_does_not_look_at_order():
    assert likeness("a b c d", "d c b a") == 1.0
    assert likeness("a a a a", "a b") == 0.25
    assert likeness("", "a") == 0.0


def test_marking_a_loop_of_one_word_takes_no_long_time():
    began = time.process_time()
    marked("happy " * 400 + "end", "happy " * 399 + "sad " * 3)
    assert time.process_time() - began < 1.0


def metrics(score, kl):
    def metric(value, unit):
        return Metric(value, value - 0.05, value + 0.05, 40, unit)

    return {"judge_score": metric(score, "score"), "kl_policy_start": metric(kl, "nats per token")}


def test_the_frontier_of_a_run_joins_what_no_other_round_beats():
    start = {"judge_score": Metric(0.1, 0.0, 0.2, 40, "score")}
    rounds = [(0, metrics(0.5, 0.1)), (1, metrics(0.4, 0.3)), (2, metrics(0.7, 0.4)), (3, {})]
    assert [p.name for p in frontier_points(start, rounds)] == ["start", "round 0", "round 1", "round 2"]
    (chart,) = frontier_chart(start, rounds, {0: True, 1: False, 2: True})
    assert chart.legend == (("a", "accepted"), ("b", "refused"))
    path = chart.drawing.partition('<polyline points="')[2].partition('"')[0]
    assert len(path.split()) == 3  # the start, round 0 and round 2
    assert "round 1: score 0.400 [0.350, 0.450], KL 0.300 nats per token" in chart.drawing
    assert frontier_chart(start, [(0, {})], {0: True}) == []
    assert frontier_chart({}, rounds, {}) == []


def test_provenance_names_data_reference_and_versions(shown):
    run, _ = shown
    found = dict(provenance(run.root, run.summary))
    assert found["data"] == "path: mine.jsonl, holdout: 0.2"
    assert found["reference of the loss"] == "previous"
    assert found["version of torch"] == "2.13.0"
    assert "kind: lexicon" in found["judge"]


def test_show_prints_what_the_report_shows(shown):
    run, found = shown
    assert found.exit_code == 0, found.output
    for wanted in (
        "2 of 3 rounds were accepted.",
        "round 0 accepted: win_rate_vs_best",
        "round 2 refused:",
        "Metrics of round 1",
        "distinct_2",
        "Score against KL(policy ‖ start)",
        "not beaten in both",
        "Scores of held-out completions",
        "The same prompts before and after round 1",
        "Gained most",
        "Lost most",
        "Changed most",
        "Where this comes from",
        "reference of the loss    previous",
        "version of torch         2.13.0",
    ):
        assert wanted in found.output, wanted
    assert "█" in found.output
    few = CliRunner().invoke(app, ["show", str(run.root), "--examples", "0"]).output
    assert "The same prompts" not in few


def test_show_passes_no_control_codes_to_the_terminal(tmp_path):
    run = SyntheticRun(tmp_path / "demo", text="\x1b[2Jgone \x07 [bold]{0}[/bold]")
    run.begin()
    run.round(0, 0.4)
    found = CliRunner().invoke(app, ["show", str(run.root)])
    assert found.exit_code == 0
    assert "\x1b[2J" not in found.output
    assert "\x07" not in found.output
    assert "[bold]" in found.output


def by_origin(**rates):
    metric = {"low": None, "high": None, "n": 9, "unit": "%", "estimator": ""}
    return {name: {"win_rate_vs_start": metric | {"value": value}} for name, value in rates.items()}


def test_what_was_forgotten_of_a_domain_is_its_best_round_less_the_last_one():
    rounds = [
        {"round": 0, "by_origin": by_origin(mood=80.0, writer=50.0)},
        {"round": 1, "by_origin": by_origin(mood=64.5, writer=75.0)},
    ]
    table = origin_table(rounds)
    assert table["names"] == ["mood", "writer"]
    assert [value.split()[0] for value in table["forgotten"]] == ["15.5", "0.0"]
    assert origin_table([{"round": 0, "by_origin": by_origin(mood=80.0)}]) is None
    assert origin_table([{"round": 0}]) is None
