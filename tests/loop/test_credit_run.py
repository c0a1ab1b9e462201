"""`prefloop credit` on a run: the round's policy against the reference that its loss had."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from prefloop.artifact import load_artifact
from prefloop.cli import app
from prefloop.commands.credit import Asked, credit
from prefloop.errors import ConfigError, DataError
from prefloop.inputs import embedded_policy
from prefloop.launch import read_recipe
from prefloop.loop import run
from prefloop.rows import JudgedGroup, PreferencePair, TokenizedPair

SMALL = ["rounds=2", "prompts_per_round=8", "sampler.max_new_tokens=10", "evaluate.prompts=20", "gate.kind=always"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two rounds, the second with the first's policy as its reference."""
    root = tmp_path_factory.mktemp("run") / "dpo"
    recipe, origins = read_recipe("iterative_dpo", [*SMALL, "reference=previous", "threads=1", "loss.beta=0.2"])
    run(recipe, root, origins=origins)
    return root


@pytest.mark.parametrize("number", [0, 1])
def test_the_reference_is_the_one_of_the_training(finished, number):
    """Live log-probs of the reference are those that 4-batches stored; the pairs are the round's, ids as they were."""
    found, groups = credit(Asked(finished, round=number, limit=5))
    assert found["beta"] == 0.2
    assert found["beta_from"] == "loss.beta of dpo"
    assert found["reference"]["name"] == ("the run's first policy" if number == 0 else "the policy of round 0")
    folder = finished / f"round-{number:03d}"
    stored = {row.chosen: row for row in load_artifact(folder / "4-batches", TokenizedPair)}
    pairs = {pair.chosen.text: pair for pair in load_artifact(folder / "3-pairs", PreferencePair)}
    assert len(groups) == 5
    for group in groups:
        chosen, rejected = group.completions
        row = stored[tuple(token.token for token in chosen.tokens)]
        assert tuple(token.token for token in rejected.tokens) == row.rejected
        assert [token.reference_logp for token in chosen.tokens] == pytest.approx(row.reference_chosen, abs=2e-3)
        assert [token.reference_logp for token in rejected.tokens] == pytest.approx(row.reference_rejected, abs=2e-3)
        assert (chosen.score, rejected.score) == (
            pairs[chosen.text].chosen_score,
            pairs[chosen.text].rejected_score,
        )


def test_the_rounds_policy_is_looked_at(finished):
    """Held-out completions carry their sampler's log-probs: those of the round's own policy."""
    found, groups = credit(Asked(finished, of="holdout", round=1, limit=4))
    summary = json.loads((finished / "summary.json").read_text())
    assert found["policy"]["digest"] == summary["rounds"][1]["policy"]["digest"]
    judged = load_artifact(finished / "round-001" / "6-report" / "2-judged", JudgedGroup)
    sampled = {g.completions[0].text: g.completions[0].sampler_logps for g in judged}
    for group in groups:
        own, start = group.completions
        assert (own.name, start.name) == ("this policy's", "the first policy's")
        assert [token.policy_logp for token in own.tokens] == pytest.approx(sampled[own.text], abs=2e-3)


def test_the_mean_reward_of_the_references_draws_estimates_a_divergence(finished):
    """Eq. 16. In round 0 the reference is the run's first policy, whose held-out completions are draws."""
    found, groups = credit(Asked(finished, of="holdout", round=0, limit=20))
    means = {
        name: [c.reward for group in groups for c in group.completions if c.name == name]
        for name in ("this policy's", "the first policy's")
    }
    for key, name in (("policy_draws", "this policy's"), ("reference_draws", "the first policy's")):
        at = found["estimates"][key]
        assert at["value"] == pytest.approx(sum(means[name]) / len(means[name]))
        assert at["n"] == len(means[name]) == 20
        assert at["low"] <= at["value"] <= at["high"]
    # In round 1 the reference is another policy, none of whose draws are shown; pairs are chosen, not drawn.
    assert credit(Asked(finished, of="holdout", round=1))[0]["estimates"].keys() == {"policy_draws"}
    assert credit(Asked(finished, round=0))[0]["estimates"] == {}


def test_the_command_writes_its_page_into_the_run_and_changes_nothing_else(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != "credit.html"}
    shown = CliRunner().invoke(app, ["credit", str(finished), "--limit", "2"])
    assert shown.exit_code == 0, shown.output
    assert "pairs as their labels do" in shown.output
    assert (finished / "credit.html").is_file()
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != "credit.html"} == before


def test_another_reference_and_other_texts(finished, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "Once upon a time", "completion": " there was a cat."}) + "\n")
    found, groups = credit(Asked(finished, reference=str(embedded_policy()), data=str(data), round=1))
    assert found["source"] == str(data)
    assert found["beta"] == 0.2
    assert [one.text for group in groups for one in group.completions] == [" there was a cat."]


def test_what_a_run_cannot_show_is_refused(finished, tmp_path):
    with pytest.raises(ConfigError, match=r"no finished round 7; it has 0, 1"):
        credit(Asked(finished, round=7))
    copy = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(copy / "round-001" / "3-pairs")
    with pytest.raises(DataError, match="no pairs"):
        credit(Asked(copy, round=1))
    shutil.rmtree(copy / "round-001" / "4-batches")
    with pytest.raises(DataError, match="not finished"):
        credit(Asked(copy, round=1))
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps({**summary, "rounds": []}))
    with pytest.raises(DataError, match="no finished round"):
        credit(Asked(copy))
    (copy / "summary.json").write_text(json.dumps({**summary, "trains": "reward_model"}))
    with pytest.raises(ConfigError, match="reward model"):
        credit(Asked(copy))
