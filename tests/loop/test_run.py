"""The loop on the embedded model and on tiny ones of other architectures, in process."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefloop import cli
from prefloop.artifact import load_artifact
from prefloop.errors import ConfigError
from prefloop.launch import read_recipe
from prefloop.loop import run
from prefloop.rows import JudgedGroup, PreferencePair, Prompt, SampleGroup, TokenizedPair
from tiny import save_tiny_policy, write_jsonl

SMALL = [
    "prompts_per_round=24",
    "prompts_per_part=8",
    "sampler.completions=3",
    "sampler.max_new_tokens=12",
    "train.pairs_per_step=6",
    "evaluate.prompts=24",
    "gate.kind=always",
]


def call(root: Path, *more: str) -> dict[str, Any]:
    recipe, origins = read_recipe("iterative_dpo", [*SMALL, *more])
    return run(recipe, root, origins=origins)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("run")
    return root, call(root, "rounds=2")


def test_the_final_folder_is_a_plain_transformers_model(finished):
    root, summary = finished
    folder = root / summary["rounds"][-1]["policy"]["path"]
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] == ids.shape[1] + 5


def test_the_tree_shows_the_algorithm(finished):
    root, _ = finished
    stages = sorted(p.name for p in (root / "round-001").iterdir())
    assert stages == ["0-prompts", "1-samples", "2-judged", "3-pairs", "4-batches", "5-policy", "6-report"]
    assert sorted(p.name for p in root.iterdir() if not p.name.startswith(".")) == [
        "prompts",
        "recipe.yaml",
        "report.html",
        "round-000",
        "round-001",
        "start",
        "summary.json",
    ]


def test_the_summary_counts_every_stage(finished):
    root, summary = finished
    assert summary == json.loads((root / "summary.json").read_text())
    first = summary["rounds"][0]
    assert first["facts"]["samples"]["completions"] == 24 * 3
    assert first["facts"]["pairs"]["groups"] == 24
    assert first["tokens"]["samples"] <= 24 * 3 * 12
    assert {"judge_score", "win_rate_vs_start", "win_rate_vs_best", "kl_policy_start", "length"} <= set(
        first["metrics"]
    )
    assert set(first["seconds"]) >= {"samples", "judged", "batches", "policy"}


def test_rounds_take_successive_slices_and_never_held_out_prompts(finished):
    root, _ = finished
    everything = {p.prompt_id: p.split for p in load_artifact(root / "prompts", Prompt)}
    rounds = [{p.prompt_id for p in load_artifact(root / f"round-00{i}" / "0-prompts", Prompt)} for i in (0, 1)]
    assert [len(r) for r in rounds] == [24, 24]
    assert not rounds[0] & rounds[1]
    assert {everything[i] for i in rounds[0] | rounds[1]} == {"train"}
    held_out = {g.prompt.prompt_id for g in load_artifact(root / "start" / "1-samples", SampleGroup)}
    assert {everything[i] for i in held_out} == {"holdout"}


def test_pairs_hold_best_and_worst_and_the_ids_that_were_sampled(finished):
    root, _ = finished
    judged = {g.prompt.prompt_id: g for g in load_artifact(root / "round-000" / "2-judged", JudgedGroup)}
    pairs = {p.pair_id: p for p in load_artifact(root / "round-000" / "3-pairs", PreferencePair)}
    assert pairs
    for pair in pairs.values():
        scores = judged[pair.prompt.prompt_id].scores
        assert (pair.chosen_score, pair.rejected_score) == (max(scores), min(scores))
    for row in load_artifact(root / "round-000" / "4-batches", TokenizedPair):
        assert row.chosen == pairs[row.pair_id].chosen.token_ids
        assert len(row.reference_chosen) == len(row.chosen)
        # The reference is the sampling policy: its log-probs are those that the sampler saw.
        assert row.reference_rejected == pytest.approx(pairs[row.pair_id].rejected.sampler_logps, abs=1e-3)


def test_running_again_changes_nothing(finished):
    root, summary = finished
    before = {p: p.stat().st_mtime_ns for p in root.glob("round-*/*/*.parquet")}
    assert call(root, "rounds=2") == summary
    assert {p: p.stat().st_mtime_ns for p in root.glob("round-*/*/*.parquet")} == before


def test_more_rounds_go_on_from_what_is_there(finished, tmp_path):
    root, summary = finished
    shutil.copytree(root, tmp_path / "copy")
    longer = call(tmp_path / "copy", "rounds=3")
    assert longer["rounds"][:2] == summary["rounds"]
    assert len(longer["rounds"]) == 3


def test_a_refused_round_is_rolled_back(tmp_path):
    summary = call(tmp_path, "rounds=2", "gate.kind=gate", "gate.threshold=99")
    assert [entry["accepted"] for entry in summary["rounds"]] == [False, False]
    assert summary["policy_best"]["round"] == -1
    second = next(iter(load_artifact(tmp_path / "round-001" / "1-samples", SampleGroup)))
    assert second.policy == summary["policy_start"]["digest"]


def test_one_judge_for_training_and_evaluation_is_pointed_out(finished, tmp_path):
    _, summary = finished
    assert any("eval_judge" in warning for warning in summary["warnings"])
    other = call(tmp_path, "rounds=1", "eval_judge={kind: verifier, mode: regex, pattern: happy}")
    assert not any("eval_judge" in warning for warning in other["warnings"])
    assert other["eval_judge"]["kind"] == "verifier"
    assert other["start"]["metrics"]["judge_score"]["value"] <= 1


@pytest.mark.parametrize(
    "more",
    [
        ["train.lora.rank=4", "train.learning_rate=5e-3"],
        ["train.lora.rank=4", "train.learning_rate=5e-3", "round_exit=keep", "reference=adapter_off"],
        ["reference=initial", "start_from=initial"],
        ["replay=1", "start_from=best"],
        ["pair_builder.rule=above_margin", "pair_builder.min_margin=0.2"],
        ["train.gradient_checkpointing=true", "train.layout=padded", "loss.label_smoothing=0.1"],
        ["sampler.temperature=0.7", "sampler.top_p=0.9", "evaluate.completions=2"],
    ],
    ids=lambda more: more[0],
)
def test_options_of_a_two_round_run(tmp_path, more):
    summary = call(tmp_path, "rounds=2", *more)
    assert len(summary["rounds"]) == 2
    assert summary["policy_start"]["digest"] != summary["rounds"][1]["policy"]["digest"]


def test_replay_trains_on_the_pairs_of_the_round_before_too(tmp_path):
    call(tmp_path, "rounds=2", "replay=1")
    counts = [len(list(load_artifact(tmp_path / f"round-00{i}" / "3-pairs", PreferencePair))) for i in (0, 1)]
    assert load_artifact(tmp_path / "round-001" / "4-batches", TokenizedPair).rows == sum(counts)


def test_a_kept_adapter_goes_on_and_the_export_is_merged(tmp_path):
    call(tmp_path, "rounds=2", "train.lora.rank=2", "train.learning_rate=5e-3", "round_exit=keep")
    folders = [tmp_path / f"round-00{i}" / "5-policy" for i in (0, 1)]
    for folder in folders:
        assert (folder / "adapter" / "adapter_model.safetensors").exists()
        AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    first, second = ((f / "adapter" / "adapter_model.safetensors").read_bytes() for f in folders)
    assert first != second


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox", "gemma2", "gemma3_text", "gpt2"])
def test_architectures_and_conversations(tmp_path, architecture):
    policy = save_tiny_policy(tmp_path / "policy", architecture)
    rows = [{"prompt": [{"role": "user", "content": f"question {i}"}]} for i in range(64)]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", rows)
    judge = tmp_path / "judge.py"
    judge.write_text("def score(prompt, completion, gold):\n    return float(sum(map(ord, completion)) % 7)\n")
    summary = call(
        tmp_path / "out",
        *[f"policy={policy}", f"prompts={prompts}", "rounds=1", "prompts.holdout=0.5", "train.learning_rate=1e-3"],
        *["judge.kind=verifier", "judge.mode=python", f"judge.file={judge}:score"],
    )
    assert summary["rounds"][0]["metrics"]["kl_policy_start"]["value"] != 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "round-000" / "5-policy", local_files_only=True)
    assert torch.isfinite(model(torch.tensor([[1, 5, 6]])).logits).all()


@pytest.mark.parametrize("what", ["policy", "pairs"])
def test_export(finished, tmp_path, monkeypatch, what):
    root, summary = finished
    to = tmp_path / ("out" if what == "policy" else "out.jsonl")
    monkeypatch.setattr(sys, "argv", ["prefloop", "export", what, str(root), str(to)])
    if what == "policy" and summary["policy_best"]["round"] < 0:
        pytest.skip("no round was promoted in this run")
    with pytest.raises(SystemExit) as stop:
        cli.app()
    assert stop.value.code == 0
    if what == "policy":
        assert not (to / "manifest.json").exists()
        AutoModelForCausalLM.from_pretrained(to, local_files_only=True)
    else:
        rows = [json.loads(line) for line in to.read_text().splitlines()]
        assert set(rows[0]) == {"prompt", "chosen", "rejected", "margin", "round"}
        assert {row["round"] for row in rows} == {0, 1}


def test_the_samplers_log_probs_are_the_references_where_they_agree(finished):
    _, summary = finished
    facts = summary["rounds"][0]["facts"]["batches"]
    assert facts["reference_logps"] == "sampler"
    assert 0 <= facts["sampler_gap"] < 1e-3


def test_the_reference_is_computed_where_it_did_not_sample(tmp_path):
    summary = call(tmp_path, "rounds=2", "reference=initial")
    assert [r["facts"]["batches"]["reference_logps"] for r in summary["rounds"]] == ["sampler", "computed"]


def test_a_setting_can_change_from_round_to_round(tmp_path):
    call(tmp_path, "rounds=3", "per_round={loss.beta: [0.1, 0.5], train.learning_rate: [1e-4, 2e-4, 3e-4]}")
    keys = [json.loads((tmp_path / f"round-00{i}" / "5-policy" / "key.json").read_text())["settings"] for i in range(3)]
    assert [k["loss"]["beta"] for k in keys] == [0.1, 0.5, 0.5]
    assert [k["learning_rate"] for k in keys] == [1e-4, 2e-4, 3e-4]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{rounds: [1]}", "per_round: rounds cannot change"),
        ("{loss.bta: [1]}", r"loss\.bta: unknown key"),
        ("{loss.beta: []}", "has no values"),
        ("{train.epochs: [1, x]}", r"per_round, round 1: train\.epochs"),
        ("{loss.beta: [0.1, -1]}", "beta"),
    ],
)
def test_bad_schedules_are_refused_before_any_work(tmp_path, value, message):
    with pytest.raises(ConfigError, match=message):
        call(tmp_path / "out", "rounds=2", f"per_round={value}")
    assert not (tmp_path / "out").exists()
