"""A reward model from pairs in one command, read by transformers and by our judge, and PPO that learns from it."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prefloop.artifact import load_artifact
from prefloop.errors import ConfigError, Interrupted
from prefloop.evaluate.reward_table import reward_table
from prefloop.judge.reward_model import RewardModel
from prefloop.launch import read_recipe
from prefloop.loop import run
from prefloop.models.reward_head import exchange_ids
from prefloop.models.value_head import FILE
from prefloop.rows import VERBATIM, Completion, JudgedGroup, Message, PreferencePair, Prompt, StepLog, TokenizedPair
from tiny import byte_tokenizer

SMALL = [
    "prompts.limit=105",
    "train.pairs_per_step=24",
    "eval_sampler.max_new_tokens=8",
    "evaluate.completions=2",
    "evaluate.prompts=20",
    "train.epochs=1",
    "rounds=1",
    "threads=1",
]


def call(name: str, root: Path, *settings: str, **more: Any) -> dict[str, Any]:
    recipe, origins = read_recipe(name, settings)
    return run(recipe, root, origins=origins, **more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("reward")
    return root, call("reward_model", root, *SMALL)


def test_the_run_ends_in_a_folder_a_summary_and_a_report(trained):
    root, summary = trained
    assert (summary["state"], summary["trains"]) == ("done", "reward_model")
    (entry,) = summary["rounds"]
    expected = {"accuracy", "accuracy_length", "accuracy_over_length", "reward_margin", "best_of_n_gain"}
    assert expected <= set(entry["metrics"])
    assert entry["accepted"] == (entry["metrics"]["accuracy"]["low"] > 50)
    assert summary["verdict"].startswith("The reward model of round 0 orders")
    assert summary["verdict"] in json.loads((root / "summary.json").read_text())["verdict"]
    assert "loss:" not in (root / "recipe.yaml").read_text()
    assert "accuracy" in (root / "report.html").read_text()
    assert reward_table(summary).row_count == 1
    first = next(iter(load_artifact(root / "round-000" / "5-policy", StepLog)))
    assert 0 < first.loss < 2


def test_plain_transformers_and_our_judge_read_what_training_wrote(trained):
    root, summary = trained
    folder = root / "round-000" / "5-policy"
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    judged = load_artifact(root / "round-000" / "6-report" / "1-held-out-rewards", JudgedGroup)
    rewards = {}
    for group in list(judged):
        for completion, score in zip(group.completions, group.scores, strict=True):
            ids = tokenizer(group.prompt.text + completion.text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                assert float(model(ids).logits[0, 0]) == pytest.approx(score, abs=1e-4)
            rewards[completion.completion_id] = score
    pairs = list(load_artifact(root / "held-out" / "3-pairs", PreferencePair))
    right = [rewards[p.chosen.completion_id] > rewards[p.rejected.completion_id] for p in pairs]
    assert summary["rounds"][0]["metrics"]["accuracy"]["value"] == pytest.approx(100 * sum(right) / len(right))


def test_training_reads_the_tokens_that_the_judge_reads(trained):
    root, _ = trained
    judge = RewardModel(path=str(root / "round-000" / "5-policy"))
    pairs = {p.pair_id: p for p in load_artifact(root / "round-000" / "3-pairs", PreferencePair)}
    for row in load_artifact(root / "round-000" / "4-batches", TokenizedPair):
        pair = pairs[row.pair_id]
        assert list(row.context + row.chosen) == judge._encode(pair.prompt, pair.chosen)[0]
        assert list(row.context + row.rejected) == judge._encode(pair.prompt, pair.rejected)[0]
        assert row.chosen
        assert row.rejected


@pytest.mark.parametrize("chat", [True, False])
def test_conversations_are_encoded_as_the_judge_encodes_them(trained, tmp_path, chat):
    root, _ = trained
    model = AutoModelForSequenceClassification.from_pretrained(root / "round-000" / "5-policy", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    tokenizer = byte_tokenizer(chat)
    tokenizer.save_pretrained(tmp_path)
    for messages in ((Message("system", "Kind."), Message("user", "Hello?")), (Message(VERBATIM, "Once"),)):
        prompt = Prompt("x", messages, None, "train", "t")
        said = Completion("c", " upon a time", None, None, "stop", 0, "d")
        expected = RewardModel(path=str(tmp_path))._encode(prompt, said)[0]
        assert exchange_ids(tokenizer, prompt, said.text) == expected


def test_a_stopped_run_goes_on_to_the_same_reward_model(trained, tmp_path):
    _, summary = trained
    for stop_after in (2, 6):
        calls = itertools.count(1)
        with pytest.raises(Interrupted):
            call("reward_model", tmp_path, *SMALL, stop=lambda calls=calls, n=stop_after: next(calls) >= n)
    again = call("reward_model", tmp_path, *SMALL)
    assert again["rounds"][0]["policy"]["digest"] == summary["rounds"][0]["policy"]["digest"]
    assert again["rounds"][0]["metrics"] == summary["rounds"][0]["metrics"]


def test_an_adapter_is_merged_and_later_rounds_go_on_from_the_reward_model(tmp_path):
    settings = ["train.lora.rank=4", "rounds=2", "prompts_per_round=32", "gate.kind=always", "evaluate.completions=1"]
    summary = call("reward_model", tmp_path, *[s for s in SMALL if s[:6] not in ("rounds", "evalua")], *settings)
    assert [entry["accepted"] for entry in summary["rounds"]] == [True, True]
    fresh = [load_artifact(tmp_path / f"round-00{n}" / "5-policy", StepLog).facts["fresh_head"] for n in (0, 1)]
    assert fresh == [True, False]
    first, second = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / f"round-00{n}" / "5-policy") for n in (0, 1)
    )
    assert not first.score.weight.equal(second.score.weight)
    assert not list((tmp_path / "round-001" / "5-policy").glob("adapter*"))
    assert not (tmp_path / "start").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["loss.kind=simpo"], "loss: has no effect with trains=reward_model"),
        (["trainer.kind=update"], r"trainer\.kind: update trains a policy"),
        (["pair_builder.kind=own_samples"], "completions without a rival"),
        (["order.kind=easy_first"], "goes by a policy's margins"),
        (["gate.max_kl=0.5"], "gate: its settings are about policies"),
    ],
)
def test_what_a_reward_model_has_no_use_for_is_refused_before_any_work(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        call("reward_model", tmp_path / "out", *SMALL, *settings)
    assert not (tmp_path / "out").exists()


PPO_SMALL = [
    "prompts_per_round=8",
    "sampler.completions=2",
    "sampler.max_new_tokens=8",
    "train.pairs_per_step=8",
    "evaluate.prompts=20",
    "rounds=2",
    "threads=1",
]


def test_ppo_learns_from_the_reward_model_and_keeps_its_value_model(trained, tmp_path):
    judge = ["judge.kind=reward_model", f"judge.path={trained[0] / 'round-000' / '5-policy'}", "eval_judge=lexicon"]
    summary = call("ppo", tmp_path, *PPO_SMALL, *judge)
    values = [(tmp_path / f"round-00{n}" / "5-policy" / FILE).read_bytes() for n in (0, 1)]
    assert values[0] != values[1]
    assert summary["rounds"][1]["policy"]["digest"] != summary["rounds"][0]["policy"]["digest"]
    extra = {}
    for number in (0, 1):
        first = next(iter(load_artifact(tmp_path / f"round-00{number}" / "5-policy", StepLog)))
        extra[number] = {value.name: value.value for value in first.extra}
        assert extra[number]["ratio"] == pytest.approx(1, abs=1e-4)
    assert extra[0]["baseline"] == 0
    assert extra[1]["baseline"] != 0
    moved = summary["rounds"][0]["displacement"]
    assert "rollouts" in moved["logps"]
    assert "chosen" not in moved["logps"]
    assert not moved["names_degradation"]


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("ppo", "loss.kind=sft", r"takes loss\.kind=rollout_kl"),
        ("grpo", "trainer.kind=update", r"set trainer\.kind=ppo or group_advantage"),
        ("rloo", "sampler.temperature=0.7", r"sampler\.temperature: 0\.7"),
        ("rloo", "sampler.completions=1", r"sampler\.completions: 1, but pair_builder\.min_group"),
        ("ppo", "trainer.kind=reward_model", "trains no policy"),
    ],
)
def test_what_policy_gradients_cannot_use_is_refused_before_any_work(tmp_path, name, setting, message):
    with pytest.raises(ConfigError, match=message):
        call(name, tmp_path / "out", setting)
    assert not (tmp_path / "out").exists()
