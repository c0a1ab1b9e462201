"""The 3D diagnosis in a run: a round that degrades, and the remedy that the next one takes."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from prefloop import cli
from prefloop.artifact import load_artifact
from prefloop.errors import ConfigError
from prefloop.evaluate.displacement import Scored
from prefloop.launch import read_recipe
from prefloop.loop import run
from prefloop.models import causal_lm
from prefloop.models.logps import TokenGroup, completion_logps
from prefloop.rows import StepLog, TokenizedPair

RECKLESS = [
    "prompts.limit=130",
    "order.kind=shuffled",
    "prompts_per_round=32",
    "eval_sampler.max_new_tokens=12",
    "train.pairs_per_step=8",
    "train.epochs=1",
    "train.learning_rate=1e-2",
    "evaluate.prompts=20",
    "rounds=2",
    "gate.kind=always",
]


def call(root: Path, *more: str) -> dict[str, Any]:
    recipe, origins = read_recipe("sdpo", [*RECKLESS, *more])
    return run(recipe, root, origins=origins)


@pytest.fixture(scope="module")
def untreated(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("untreated")
    return root, call(root)


@pytest.fixture(scope="module")
def treated(untreated, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("treated") / "run"
    shutil.copytree(untreated[0], root)
    shutil.rmtree(root / "round-001")
    return root, call(root, "train.remedy=auto")


def chosen_change(summary: dict[str, Any], number: int) -> float:
    return summary["rounds"][number]["displacement"]["logps"]["chosen"]["change"]["value"]


def test_a_reckless_round_degrades_and_the_summary_says_so(untreated):
    root, summary = untreated
    found = summary["rounds"][0]["displacement"]
    assert found["names_degradation"]
    assert "Try train.remedy=auto" in found["try"]
    assert found["remedy"] is None
    assert json.loads((root / "summary.json").read_text())["rounds"][0]["displacement"] == found
    assert {"chosen", "rejected", "held_out_chosen", "held_out_rejected", "start_samples"} == set(found["logps"])
    assert 0 <= found["unseen"]["value"] <= 1
    assert found["entropy"]["value"] > 0


def test_the_log_probs_are_those_of_the_policies_before_and_after(untreated):
    root, summary = untreated
    rows = list(load_artifact(root / "round-001" / "6-report" / "5-displacement", Scored))
    pairs = {p.pair_id: p for p in load_artifact(root / "round-001" / "4-batches", TokenizedPair)}
    row = next(r for r in rows if r.kind == "rejected")
    group = TokenGroup(pairs[row.item].context, (pairs[row.item].rejected,))
    for number, stored in ((0, row.before), (1, row.after)):
        model = causal_lm.load(str(root / summary["rounds"][number]["policy"]["path"])).model
        assert completion_logps(model, [group]).total.item() == pytest.approx(stored, abs=1e-3)
    # Round 1's reference is the policy that it starts from, whose log-probs are stored with the pairs.
    assert row.before == pytest.approx(sum(pairs[row.item].reference_rejected), abs=1e-3)


def test_the_remedy_is_taken_in_the_next_round_and_lessens_the_fall(untreated, treated):
    root, summary = treated
    key = json.loads((root / "round-001" / "5-policy" / "manifest.json").read_text())["settings"]
    assert (key["loss"]["kind"], key["loss"]["beta"], key["loss"]["gamma"]) == ("dpo_sft", 0.1, 0.01)
    assert "remedy" not in key
    assert summary["rounds"][0] == untreated[1]["rounds"][0]
    assert "loss dpo_sft" in summary["rounds"][1]["displacement"]["remedy"]
    assert chosen_change(summary, 1) > chosen_change(untreated[1], 1) + 0.05
    last = list(load_artifact(root / "round-001" / "5-policy", StepLog))[-1]
    assert last.chosen_gradient == pytest.approx(last.rejected_gradient + key["loss"]["gamma"], rel=1e-5)


def test_a_rerun_decides_the_same_from_what_is_stored(treated):
    root, summary = treated
    before = {p: p.stat().st_mtime_ns for p in root.glob("round-*/**/*.parquet")}
    diagnosis = root / "round-001" / "6-report" / "5-displacement"
    shutil.rmtree(diagnosis)
    again = call(root, "train.remedy=auto")
    assert again["rounds"][1]["displacement"] == summary["rounds"][1]["displacement"]
    made_again = {p for p in root.glob("round-*/**/*.parquet") if before[p] != p.stat().st_mtime_ns}
    assert made_again == {diagnosis / "part-00000.parquet"}


def test_show_and_the_report_say_it(treated, monkeypatch, capsys):
    root, summary = treated
    monkeypatch.setattr(sys, "argv", ["prefloop", "show", str(root)])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out
    page = (root / "report.html").read_text(encoding="utf-8")
    for entry in summary["rounds"]:
        assert entry["displacement"]["says"] in shown
    assert "Remedy in this round: loss dpo_sft" in shown
    for text in ("Where the likelihood went", "Gradient weight", "Unseen samples", "Remedy in this round"):
        assert text in page


def test_a_loss_without_a_remedy_refuses_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.remedy: auto, but loss\.kind dpop has no remedy"):
        call(tmp_path / "out", "train.remedy=auto", "loss.kind=dpop")
    with pytest.raises(ConfigError, match=r"loss\.kind simpo has no remedy"):
        call(tmp_path / "out", "train.remedy=auto", "per_round={loss: [dpo, simpo]}")
    assert not (tmp_path / "out").exists()
