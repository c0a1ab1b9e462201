"""Every recipe that works runs on the embedded model from its name alone, made small."""

import itertools
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
    summary = call("spin", tmp_path, "rounds=3")
    made: list[list[str]] = []
    for number in range(3):
        pairs = list(load_artifact(tmp_path / f"round-00{number}" / "3-pairs", PreferencePair))
        assert {p.chosen.source for p in pairs} == {GOLD}
        assert all(p.chosen.text == p.prompt.gold for p in pairs)
        made.append([p.pair_id for p in pairs])
        trained = [p.pair_id for p in load_artifact(tmp_path / f"round-00{number}" / "4-batches", TokenizedPair)]
        assert sorted(trained) == sorted(itertools.chain(*made[-2:]))
        # Replayed pairs too are measured against this round's start.
        assert first_loss(tmp_path, number) == pytest.approx(math.log(2), abs=1e-5)
    judged = next(iter(load_artifact(tmp_path / "round-000" / "2-judged", JudgedGroup)))
    assert (judged.judge, judged.scores) == ("unscored", (None,))
    first_step = json.loads((tmp_path / "round-000" / "5-policy" / "key.json").read_text())
    assert first_step["settings"]["loss"]["beta"] == 0.1
    assert not any("eval_judge" in warning for warning in summary["warnings"])


def first_loss(root: Path, number: int) -> float:
    return next(iter(load_artifact(root / f"round-00{number}" / "5-policy", StepLog))).loss


def references(root: Path, rounds: int) -> list[str]:
    """The digest of each round's reference."""
    keys = [root / f"round-00{number}" / "4-batches" / "key.json" for number in range(rounds)]
    return [json.loads(key.read_text())["inputs"]["reference"] for key in keys]


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
    summary = call("curry_dpo", tmp_path / "out", *data, *more, settings=GIVEN)
    ladders = []
    for number in range(3):
        pairs = list(load_artifact(tmp_path / "out" / f"round-00{number}" / "3-pairs", PreferencePair))
        ladders.append({(p.chosen.text.split()[0], p.rejected.text.split()[0]) for p in pairs})
        assert first_loss(tmp_path / "out", number) == pytest.approx(math.log(2), abs=1e-5)
    assert ladders == [{("happy", "sad")}, {("happy", "small")}, {("happy", "good")}]
    policies = [summary["policy_start"], *(entry["policy"] for entry in summary["rounds"])]
    assert references(tmp_path / "out", 3) == [policy["digest"] for policy in policies[:3]]
    assert len({policy["digest"] for policy in policies}) == 4


def test_curry_dpo_by_log_prob_takes_the_likeliest_choices_first(tmp_path):
    data = ["policy=embedded", f"prompts={rated_prompts(tmp_path / 'rated.jsonl')}", "prompts.holdout=0.5"]
    more = ["eval_judge=lexicon", "prompts_per_round=null", "rounds=3", "pair_builder.by=logp"]
    call("curry_dpo", tmp_path / "out", *data, *more, settings=GIVEN)
    model = AutoModelForCausalLM.from_pretrained(embedded_policy()).eval()
    gaps: dict[str, list[float]] = {}
    for number in range(3):
        for pair in load_artifact(tmp_path / "out" / f"round-00{number}" / "4-batches", TokenizedPair):
            scores = [plain_logp(model, pair.context, tokens) for tokens in (pair.chosen, pair.rejected)]
            gaps.setdefault(str(pair.context), []).append(scores[0] - scores[1])
    assert gaps
    assert all(len(found) == 3 and found == sorted(found, reverse=True) for found in gaps.values())
    assert len({round(found[0], 3) for found in gaps.values()}) > 1


def plain_logp(model, context, tokens) -> float:
    """log π(tokens | context) by transformers alone."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *tokens]])).logits[0, len(context) - 1 : -1]
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None]).sum())


def test_curry_dpo_with_a_fixed_reference_keeps_it(tmp_path):
    data = ["policy=embedded", f"prompts={rated_prompts(tmp_path / 'rated.jsonl')}", "prompts.holdout=0.5"]
    more = ["eval_judge=lexicon", "prompts_per_round=null", "reference=initial", "train.learning_rate=3e-4"]
    summary = call("curry_dpo", tmp_path / "out", *data, *more, settings=GIVEN)
    assert references(tmp_path / "out", 2) == [summary["policy_start"]["digest"]] * 2
    assert abs(first_loss(tmp_path / "out", 1) - math.log(2)) > 1e-3


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
        assert first_loss(tmp_path / "out", number) == pytest.approx(math.log(2), abs=1e-5)
    assert references(tmp_path / "out", 2)[1] == summary["rounds"][0]["policy"]["digest"]
    taken = [
        p for number in (0, 1) for p in load_artifact(tmp_path / "out" / f"round-00{number}" / "0-prompts", Prompt)
    ]
    train = [p for p in load_artifact(tmp_path / "out" / "prompts", Prompt) if p.split == "train"]
    assert sorted(p.prompt_id for p in taken) == sorted(p.prompt_id for p in train), "every pair once"
    # γ_ref of the second step is γ_θ of what the first one ended with, on the same pairs.
    ended = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "round-000" / "5-policy", dtype=torch.float32)
    started = AutoModelForCausalLM.from_pretrained(embedded_policy(), dtype=torch.float32)
    batch = list(load_artifact(tmp_path / "out" / "round-001" / "4-batches", TokenizedPair))
    stored = [sum(p.reference_chosen) - sum(p.reference_rejected) for p in batch]
    assert stored == pytest.approx([gamma(ended, p) for p in batch], abs=1e-3)
    assert stored != pytest.approx([gamma(started, p) for p in batch], abs=0.1)


@torch.inference_mode()
def gamma(model: torch.nn.Module, pair: TokenizedPair) -> float:
    """log π(chosen) − log π(rejected), from the model's own logits."""
    totals = []
    for side in (pair.chosen, pair.rejected):
        logits = model(torch.tensor([[*pair.context, *side]])).logits[0, len(pair.context) - 1 : -1]
        totals.append(float(logits.log_softmax(-1).gather(1, torch.tensor(side)[:, None]).sum()))
    return totals[0] - totals[1]


def test_one_step_of_sdpo_and_one_bucket_of_curry_dpo_are_dpo(tmp_path):
    """All recipes of one round on the same pairs, all pairs in a step, so that their order does not matter."""
    pairs = pair_prompts(tmp_path / "pairs.jsonl")
    data = ["policy=embedded", f"prompts={pairs}", "prompts.holdout=0.4", "prompts_per_round=null", "rounds=1"]
    train = {"learning_rate": 3e-4, "epochs": 3, "pairs_per_step": 64, "schedule": "constant", "warmup": 0.0}
    more = [*data, "eval_judge=lexicon", f"train={json.dumps(train)}"]
    call("dpo", tmp_path / "dpo", *more, settings=GIVEN)
    call("sdpo", tmp_path / "sdpo", *more, "order.by=margin", settings=GIVEN)
    call("curry_dpo", tmp_path / "curry", *more, "pair_builder.steps=1", settings=GIVEN)
    weights = {name: trained_weights(tmp_path / name) for name in ("dpo", "sdpo", "curry")}
    start = AutoModelForCausalLM.from_pretrained(embedded_policy(), dtype=torch.float32).state_dict()
    assert all(not value.equal(start[name]) for name, value in weights["dpo"].items())
    assert all(value.equal(weights["curry"][name]) for name, value in weights["dpo"].items())
    curves = {name: [row.loss for row in steps(tmp_path / name)] for name in weights}
    assert curves["sdpo"] == pytest.approx(curves["dpo"], rel=1e-4)
    for name, value in weights["dpo"].items():
        torch.testing.assert_close(weights["sdpo"][name], value, rtol=0, atol=3e-5, msg=name)


def steps(root: Path) -> list[StepLog]:
    return list(load_artifact(root / "round-000" / "5-policy", StepLog))


def trained_weights(root: Path, number: int = 0) -> dict[str, torch.Tensor]:
    folder = root / f"round-00{number}" / "5-policy"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


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
    extra = {v.name: v.value for v in steps(tmp_path)[0].extra}
    assert set(extra) == {"gold_cross_entropy"}
    assert first_loss(tmp_path, 0) == pytest.approx(math.log(2) + 0.1 * extra["gold_cross_entropy"], abs=1e-5)


def test_one_round_of_mrdpo_without_ground_truth_is_dpo_with_lora(tmp_path):
    lora = ["rounds=1", "train.lora={rank: 4, alpha: 8.0}", "train.learning_rate=3e-3", "train.schedule=constant"]
    same = ["train.warmup=0", "sampler.completions=2", "judge=lexicon", "loss.beta=0.1", "sampler.temperature=1"]
    call("mrdpo", tmp_path / "mrdpo", *lora, *same, "loss.gold_weight=0")
    call("iterative_dpo", tmp_path / "dpo", *lora, *same, "train.epochs=1")
    curves = [[(row.loss, row.margin) for row in steps(tmp_path / name)] for name in ("mrdpo", "dpo")]
    assert curves[0] == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in curves[1]]
    one, other = (trained_weights(tmp_path / name) for name in ("mrdpo", "dpo"))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=5e-5, msg=name)


def test_rounds_of_mrdpo_at_next_to_no_learning_rate_leave_the_policy_as_it_was(tmp_path):
    call("mrdpo", tmp_path, "train.learning_rate=1e-30", "train.lora={rank: 4, alpha: 8.0}")
    start = AutoModelForCausalLM.from_pretrained(embedded_policy(), dtype=torch.float32).state_dict()
    assert all(value.equal(start[name]) for name, value in trained_weights(tmp_path, 1).items())


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
