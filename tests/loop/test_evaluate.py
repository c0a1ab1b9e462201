"""`prefloop evaluate`: a policy on held-out prompts, by its run's own recipe or by settings that are given."""

import json

import pytest
from typer.testing import CliRunner

from prefloop.cli import app
from prefloop.commands.evaluate import evaluate
from prefloop.errors import ConfigError
from prefloop.inputs import embedded_policy
from prefloop.launch import read_policy, read_recipe
from prefloop.loop import run

SMALL = ["rounds=1", "prompts_per_round=8", "sampler.max_new_tokens=10", "evaluate.prompts=20", "gate.kind=always"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("run") / "spin"
    recipe, origins = read_recipe("spin", SMALL)
    return root, run(recipe, root, origins=origins)


def test_a_run_is_measured_as_it_measured_itself(finished, tmp_path):
    root, summary = finished
    best = summary["rounds"][0]["metrics"] if summary["policy_best"]["round"] == 0 else summary["start"]["metrics"]
    (row,) = evaluate(read_policy(root, []), tmp_path / "out")
    assert row.revisions is None
    assert row.found.metrics["judge_score"].value == pytest.approx(best["judge_score"]["value"])
    of_round = read_policy(root / "round-000" / "5-policy", [])
    (row,) = evaluate(of_round, tmp_path / "round")
    assert row.found.metrics["judge_score"].value == summary["rounds"][0]["metrics"]["judge_score"]["value"]


def test_revisions_stand_beside_each_other_and_a_second_call_draws_nothing(finished, tmp_path):
    recipe = read_policy(finished[0], [])
    rows = evaluate(recipe, tmp_path, [0, 1])
    assert [row.revisions for row in rows] == [0, 1]
    assert "win_rate_vs_start" in rows[1].found.metrics
    assert "win_rate_vs_best" not in rows[1].found.metrics
    drawn = tmp_path / "revisions-1" / "1-samples" / "part-00000.parquet"
    before = drawn.stat().st_mtime_ns
    again = evaluate(recipe, tmp_path, [0, 1])
    assert [row.found for row in again] == [row.found for row in rows]
    assert drawn.stat().st_mtime_ns == before
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    assert stored["rows"][1]["metrics"]["judge_score"]["value"] == rows[1].found.metrics["judge_score"].value


def test_a_policy_outside_a_run_needs_prompts_and_a_judge(tmp_path):
    recipe = read_policy(embedded_policy(), ["prompts=embedded", *SMALL[2:4]])
    with pytest.raises(ConfigError, match="judge: not set"):
        evaluate(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_a_row_for_each_number(finished, tmp_path):
    found = CliRunner().invoke(app, ["evaluate", str(finished[0]), "--revisions", "0,2", "--out", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert "revised 0 times" in found.output
    assert "revised 2 times" in found.output


@pytest.mark.parametrize(("option", "words"), [("0,many", "--revisions"), ("-1", "sampler.revisions")])
def test_a_number_that_is_none_is_refused(finished, tmp_path, option, words):
    found = CliRunner().invoke(app, ["evaluate", str(finished[0]), "--revisions", option, "--out", str(tmp_path)])
    assert isinstance(found.exception, ConfigError)
    assert words in str(found.exception)


def test_beams_stand_beside_each_other(finished, tmp_path):
    recipe = read_policy(finished[0], ["sampler.max_new_tokens=6"])
    rows = evaluate(recipe, tmp_path, beams=[1, 3])
    assert [(row.beams, row.revisions, row.label) for row in rows] == [(1, None, "1 beam"), (3, None, "3 beams")]
    assert "win_rate_vs_start" in rows[1].found.metrics
    assert rows[1].found.metrics["length"].value <= 6
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["beams"] for row in stored["rows"]] == [1, 3]
    # One beam is greedy decoding.
    greedy = read_policy(finished[0], ["sampler.max_new_tokens=6", "sampler.temperature=0"])
    (own,) = evaluate(greedy, tmp_path / "greedy")
    for name in ("judge_score", "length", "repetition"):
        assert own.found.metrics[name].value == pytest.approx(rows[0].found.metrics[name].value)


def test_the_command_prints_a_row_for_each_number_of_beams(finished, tmp_path):
    words = ["evaluate", str(finished[0]), "sampler.max_new_tokens=4", "--beams", "1,2", "--out", str(tmp_path)]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert "win % vs 1 beam" in found.output
    assert "2 beams" in found.output


@pytest.mark.parametrize(
    ("settings", "numbers", "words"),
    [
        ([], {"beams": [1], "revisions": [0]}, "vary one at a time"),
        ([], {"beams": [2, 2]}, "has a number twice"),
        ([], {"beams": [0]}, "sampler.beams"),
        (["eval_sampler.kind=best_of_n"], {"beams": [1]}, "cannot search"),
        (["eval_sampler.kind=guided"], {}, "eval_sampler.reference: not set"),
    ],
)
def test_what_cannot_be_varied_is_refused_before_any_work(finished, tmp_path, settings, numbers, words):
    with pytest.raises(ConfigError, match=words):
        evaluate(read_policy(finished[0], settings), tmp_path / "out", **numbers)
    assert not (tmp_path / "out").exists()
