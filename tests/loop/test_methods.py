"""Every recipe that works runs on the embedded model from its name alone, made small."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefloop.artifact import load_artifact
from prefloop.errors import ConfigError, DataError
from prefloop.inputs import embedded_policy
from prefloop.launch import read_recipe
from prefloop.loop import run
from prefloop.models.adapters import load_adapter, merge_lora
from prefloop.recipe import for_round
from prefloop.recipes import available
from prefloop.rows import ABSENT, GOLD, JudgedGroup, PreferencePair, Prompt, StepLog, TokenizedPair
from tiny import write_jsonl

SMALL = [
    "prompts_per_round=16",
    "sampler.max_new_tokens=12",
    "train.pairs_per_step=8",
    "evaluate.prompts=20",
    "rounds=2",
    "gate.kind=always",
]

GIVEN = [setting.replace("sampler.max", "eval_sampler.max") for setting in SMALL]
"""The same for a recipe that reads existing completions instead of drawing them."""


def call(name: str, root: Path, *more: str, settings: list[str] = SMALL) -> dict[str, Any]:
    recipe, origins = read_recipe(name, [*settings, *more])
    return run(recipe, root, origins=origins)


@pytest.mark.parametrize("name", available())
def test_recipe_runs_on_the_embedded_model(name, tmp_path):
    recipe = read_recipe(name, [])[0]
    settings = GIVEN if recipe.sampler.kind == "given" else SMALL
    # A sum that is cut short has no answer, so that all would score alike.
    more = ["sampler.max_new_tokens=80", "prompts_per_round=48"] if recipe.policy.path == "embedded-sums" else []
    summary = call(name, tmp_path, *more, settings=settings)
    assert [entry["accepted"] for entry in summary["rounds"]] == [True, True]
    assert summary["rounds"][1]["policy"]["digest"] != summary["policy_start"]["digest"]
    assert (tmp_path / "report.html").exists()


def test_spin_pairs_human_answers_with_own_ones_and_replays_a_round(tmp_path):
    summary = call("spin", tmp_path)
    counts = []
    for number in (0, 1):
        pairs = list(load_artifact(tmp_path / f"round-00{number}" / "3-pairs", PreferencePair))
        assert {p.chosen.source for p in pairs} == {GOLD}
        assert all(p.chosen.text == p.prompt.gold for p in pairs)
        counts.append(len(pairs))
    assert load_artifact(tmp_path / "round-001" / "4-batches", TokenizedPair).rows == sum(counts)
    judged = next(iter(load_artifact(tmp_path / "round-000" / "2-judged", JudgedGroup)))
    assert (judged.judge, judged.scores) == ("unscored", (None,))
    first_step = json.loads((tmp_path / "round-000" / "5-policy" / "key.json").read_text())
    assert first_step["settings"]["loss"]["beta"] == 0.1
    assert not any("eval_judge" in warning for warning in summary["warnings"])


def test_spin_without_human_answers_refuses_before_any_work(tmp_path):
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"One day {i}"} for i in range(200)])
    with pytest.raises(DataError, match=r"prompts\.gold"):
        call("spin", tmp_path / "out", "policy=embedded", f"prompts={prompts}", "judge=lexicon")
    assert not (tmp_path / "out").exists()


def rated_prompts(path: Path) -> Path:
    words = ["happy fun", "good", "small", "sad and bad"]
    rows = [
        {"prompt": f"Day {i}: Tom was", "completions": [f" {w} {i}." for w in words], "scores": [4, 3, 2, 1]}
        for i in range(60)
    ]
    return write_jsonl(path, rows)


def test_curry_dpo_climbs_the_ladder_of_the_given_ratings(tmp_path):
    data = ["policy=embedded", f"prompts={rated_prompts(tmp_path / 'rated.jsonl')}", "prompts.holdout=0.5"]
    more = ["eval_judge=lexicon", "prompts_per_round=null", "rounds=3", "train.learning_rate=3e-4"]
    call("curry_dpo", tmp_path / "out", *data, *more, settings=GIVEN)
    ladders = []
    for number in range(3):
        pairs = list(load_artifact(tmp_path / "out" / f"round-00{number}" / "3-pairs", PreferencePair))
        ladders.append({(p.chosen.text.split()[0], p.rejected.text.split()[0]) for p in pairs})
    assert ladders == [{("happy", "sad")}, {("happy", "small")}, {("happy", "good")}]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["eval_judge=null"], "eval_judge: not set"),
        (["eval_judge=lexicon", "eval_sampler=null"], "eval_sampler: not set"),
    ],
)
def test_given_data_need_a_sampler_and_a_judge_for_the_evaluation(tmp_path, more, message):
    prompts = rated_prompts(tmp_path / "rated.jsonl")
    with pytest.raises(ConfigError, match=message):
        call("curry_dpo", tmp_path / "out", "policy=embedded", f"prompts={prompts}", *more, settings=GIVEN)
    assert not (tmp_path / "out").exists()


def pair_prompts(path: Path) -> Path:
    rows = [
        {
            "prompt": f"Day {i}: Tom was",
            "chosen": f" happy {i}. They played." if i % 2 else f" qx{i} zzv.",
            "rejected": f" vv{i} qqx." if i % 2 else f" sad {i}. He cried.",
            "source": "plain" if i % 2 else "odd",
        }
        for i in range(80)
    ]
    return write_jsonl(path, rows)


def test_sdpo_takes_the_easier_source_first_and_refers_to_the_step_before(tmp_path):
    data = ["policy=embedded", f"prompts={pair_prompts(tmp_path / 'pairs.jsonl')}", "prompts.holdout=0.4"]
    more = ["eval_judge=lexicon", "prompts_per_round=null", "train.learning_rate=3e-4"]
    summary = call("sdpo", tmp_path / "out", *data, *more, settings=GIVEN)
    for number, origin in ((0, "plain"), (1, "odd")):
        pairs = list(load_artifact(tmp_path / "out" / f"round-00{number}" / "3-pairs", PreferencePair))
        assert {p.prompt.origin for p in pairs} == {origin}
    second = json.loads((tmp_path / "out" / "round-001" / "4-batches" / "key.json").read_text())
    assert second["inputs"]["reference"] == summary["rounds"][0]["policy"]["digest"]
    for number in (0, 1):
        steps = load_artifact(tmp_path / "out" / f"round-00{number}" / "5-policy", StepLog)
        assert next(iter(steps)).loss == pytest.approx(math.log(2), abs=1e-5)


def test_a_setting_that_the_user_fixes_does_not_change_by_round():
    assert "train.learning_rate" in read_recipe("spin", [])[0].per_round
    fixed, _ = read_recipe("spin", ["train.learning_rate=1e-5"])
    assert "train.learning_rate" not in fixed.per_round
    assert "loss.beta" in fixed.per_round
    of_one_kind, _ = read_recipe("mrdpo", ["loss={kind: dpo}", "pair_builder.min_margin=0.1"])
    assert {for_round(of_one_kind, number).loss.kind for number in range(of_one_kind.rounds)} == {"dpo"}
    assert for_round(of_one_kind, 6).pair_builder.kind == "own_samples"
    both, _ = read_recipe("spin", ["train.learning_rate=1e-5", "per_round={train.learning_rate: [0.001]}"])
    assert both.per_round["train.learning_rate"] == (1e-3,)


def test_the_noise_game_needs_a_loss_with_a_reference(tmp_path):
    with pytest.raises(ConfigError, match="noise_game works on the reference"):
        call("simpo", tmp_path / "out", "trainer.kind=noise_game")
    assert not (tmp_path / "out").exists()


def test_dnpo_chooses_by_the_judge_after_its_warm_up(tmp_path):
    call("dnpo", tmp_path)
    flipped = []
    for number in (0, 1):
        pairs = list(load_artifact(tmp_path / f"round-00{number}" / "3-pairs", PreferencePair))
        assert all(GOLD in (p.chosen.source, p.rejected.source) for p in pairs)
        flipped.append(sum(p.flipped for p in pairs))
    assert flipped[0] == 0
    assert flipped[1] > 0
    steps = list(load_artifact(tmp_path / "round-001" / "5-policy", StepLog))
    assert {"saturation_before", "saturation_after"} <= {value.name for value in steps[0].extra}


def test_mrdpo_is_reborn_from_the_first_policy_on_what_the_last_one_writes(tmp_path):
    rebirth = {
        "pair_builder": [{"kind": "guided"}, {"kind": "own_samples"}],
        "loss": [{"kind": "guided"}, {"kind": "sft"}],
        "start_from": ["previous", "initial"],
        "samples_from": ["start", "previous"],
    }
    summary = call("mrdpo", tmp_path, *(f"per_round.{key}={json.dumps(value)}" for key, value in rebirth.items()))
    first, start = summary["rounds"][0]["policy"]["digest"], summary["policy_start"]["digest"]
    pairs = list(load_artifact(tmp_path / "round-000" / "3-pairs", PreferencePair))
    assert all([view.completion.text for view in p.views] == [p.prompt.gold] for p in pairs)
    assert all(GOLD not in (p.chosen.source, p.rejected.source) for p in pairs)
    reborn = list(load_artifact(tmp_path / "round-001" / "3-pairs", PreferencePair))
    assert {p.chosen.source for p in reborn} == {first}
    assert {p.rejected for p in reborn} == {ABSENT}
    policy = load_artifact(tmp_path / "round-001" / "5-policy", StepLog)
    assert policy.manifest["inputs"]["policy"] == start
    extra = {v.name for v in next(iter(load_artifact(tmp_path / "round-000" / "5-policy", StepLog))).extra}
    assert extra == {"gold_cross_entropy"}


def test_a_loss_that_reads_a_view_refuses_a_builder_that_does_not_make_it(tmp_path):
    with pytest.raises(ConfigError, match=r"guided reads gold beside the two sides .* pair_builder\.kind ranked"):
        call("iterative_dpo", tmp_path, "loss.kind=guided")
    with pytest.raises(ConfigError, match="completions without a rival"):
        call("iterative_dpo", tmp_path, "pair_builder.kind=own_samples")
    assert not list(tmp_path.iterdir())


def test_tso_with_one_policy_and_no_human_answers_refuses_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match=r"sampler\.smaller lists no models"):
        call("tso", tmp_path / "out", "pair_builder.human=false")
    assert not (tmp_path / "out").exists()


def test_srpo_scores_both_sides_after_both_drafts(tmp_path):
    call("srpo", tmp_path, "rounds=1", "prompts.limit=200", settings=GIVEN)
    batch = list(load_artifact(tmp_path / "round-000" / "4-batches", TokenizedPair))
    assert all([len(view.tokens) for view in p.views] == [len(p.chosen), len(p.rejected)] * 2 for p in batch)
    assert all(view.reference is not None for p in batch for view in p.views)
    first = next(iter(load_artifact(tmp_path / "round-000" / "5-policy", StepLog)))
    assert first.loss == pytest.approx(1 - 0.8 / 2, abs=1e-3)
    assert {v.name for v in first.extra} == {"revision_loss", "joint_loss", "revision_margin"}


def test_cofs_dpo_adds_up_the_modules_of_all_domains_and_shows_what_was_forgotten(tmp_path):
    summary = call("cofs_dpo", tmp_path, settings=GIVEN)
    facts = [load_artifact(tmp_path / f"round-00{n}" / "5-policy", StepLog).facts for n in (0, 1)]
    assert facts[0]["coefficients"] == {"domain-0": 1.0}
    assert sum(facts[1]["coefficients"].values()) == pytest.approx(1)
    assert facts[1]["memory_loss"] <= facts[1]["memory_loss_equal_shares"] + 1e-9
    origins = [{p.origin for p in load_artifact(tmp_path / f"round-00{n}" / "0-prompts", Prompt)} for n in (0, 1)]
    assert origins == [{"mood"}, {"writer"}]
    # The policy is the first one plus the weighted sum of both modules' products.
    base = AutoModelForCausalLM.from_pretrained(embedded_policy(), dtype=torch.float32)
    expected = {name: value.detach().clone() for name, value in base.state_dict().items()}
    for number, weight in enumerate(facts[1]["coefficients"].values()):
        module = load_adapter(
            AutoModelForCausalLM.from_pretrained(embedded_policy(), dtype=torch.float32),
            tmp_path / f"round-00{number}" / "5-policy" / "adapter",
            trainable=False,
        )
        for name, value in merge_lora(module).state_dict().items():
            expected[name] += weight * (value - base.state_dict()[name])
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "round-001" / "5-policy", dtype=torch.float32).state_dict()
    assert max(float((found[name] - value).abs().max()) for name, value in expected.items()) < 1e-5
    assert set(summary["rounds"][1]["by_origin"]) == {"mood", "writer"}
    assert "what was forgotten" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.lora=null", r"train\.lora\.rank"),
        ("start_from=previous", "start_from=initial"),
        ("combine.rule=given", r"combine\.coefficients: give one for each of 2 rounds"),
        ("combine.coefficients=[1, 1]", "has no effect with combine.rule=simplex"),
        ("rounds=3", "2 domains .* for 3 rounds"),
    ],
)
def test_cofs_dpo_refuses_what_cannot_be_combined_before_any_work(tmp_path, setting, words):
    with pytest.raises((ConfigError, DataError), match=words):
        call("cofs_dpo", tmp_path / "out", setting, settings=GIVEN)
    assert not (tmp_path / "out").exists()
