"""TSO from its recipe: who is sampled, who meets whom, and what is refused."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefloop.artifact import load_artifact
from prefloop.errors import ConfigError
from prefloop.inputs import embedded_policy
from prefloop.launch import read_recipe
from prefloop.loop import run
from prefloop.models.causal_lm import folder_digest
from prefloop.rows import GOLD, JudgedGroup, PreferencePair, SampleGroup, StepLog
from tiny import save_tiny_policy, write_jsonl

SMALL = [
    "prompts_per_round=16",
    "sampler.max_new_tokens=12",
    "train.pairs_per_step=8",
    "evaluate.prompts=20",
    "gate.kind=always",
]


def call(root: Path, *more: str) -> dict[str, Any]:
    recipe, origins = read_recipe("tso", [*SMALL, *more])
    return run(recipe, root, origins=origins)


def rows(root: Path, number: int, stage: str, record: type) -> list[Any]:
    return list(load_artifact(root / f"round-00{number}" / stage, record))


def test_versions_join_the_matrix_as_they_are_promoted(tmp_path):
    summary = call(tmp_path, "rounds=3", "loss.clip_chosen=0.01", "loss.clip_rejected=0.01")
    policies = [summary["policy_start"]["digest"], *(entry["policy"]["digest"] for entry in summary["rounds"])]
    for number in range(3):
        groups = rows(tmp_path, number, "1-samples", SampleGroup)
        drawn = [policies[number], *policies[max(0, number - 1) : number]]
        assert {tuple(c.source for c in group.completions) for group in groups} == {tuple(drawn)}
        judged = rows(tmp_path, number, "2-judged", JudgedGroup)
        assert {group.completions[-1].source for group in judged} == {GOLD}
        order = [GOLD, *drawn]
        for pair in rows(tmp_path, number, "3-pairs", PreferencePair):
            below = order.index(pair.chosen.source) > order.index(pair.rejected.source)
            assert pair.flipped == below
            assert pair.chosen_score > pair.rejected_score
        key = json.loads((tmp_path / f"round-00{number}" / "4-batches" / "key.json").read_text())
        assert key["inputs"]["reference"] == policies[number]
    curves = [rows(tmp_path, number, "5-policy", StepLog) for number in range(3)]
    clipped = [{v.name: v.value for v in step.extra} for curve in curves for step in curve]
    assert all({"chosen_clipped", "rejected_clipped"} <= set(values) for values in clipped)
    # Reference and completions are new in each round: whatever the thresholds, it begins at ln 2.
    assert [curve[0].loss for curve in curves] == pytest.approx([math.log(2)] * 3, abs=1e-5)
    assert clipped[0] == {"chosen_clipped": 0.0, "rejected_clipped": 0.0}
    assert max(values["rejected_clipped"] for values in clipped) > 0


def test_smaller_models_serve_without_human_answers(tmp_path):
    small = tmp_path / "small"
    model = AutoModelForCausalLM.from_pretrained(embedded_policy())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    model.save_pretrained(small)
    AutoTokenizer.from_pretrained(embedded_policy()).save_pretrained(small)
    without_gold = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"One day {i} Tom saw"} for i in range(120)])
    more = ["policy=embedded", f"prompts={without_gold}", "judge=lexicon", "train.learning_rate=3e-4", "rounds=1"]
    call(tmp_path / "out", *more, "pair_builder.human=false", f"sampler.smaller=[{small}]")
    pairs = rows(tmp_path / "out", 0, "3-pairs", PreferencePair)
    start = folder_digest(embedded_policy())
    kinds = Counter((p.chosen.source, p.rejected.source, p.flipped) for p in pairs)
    assert set(kinds) <= {(start, folder_digest(small), False), (folder_digest(small), start, True)}
    assert kinds


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        (["pair_builder.human=false"], ConfigError, r"sampler\.smaller.*prompts\.gold"),
        (["sampler.smaller=[./nowhere]"], ConfigError, r"sampler\.smaller\[0\].*no folder \./nowhere"),
        (["pair_builder.corrections=none.jsonl"], ConfigError, r"pair_builder\.corrections"),
    ],
)
def test_what_is_missing_is_named(tmp_path, more, kind, message):
    with pytest.raises(kind, match=message):
        call(tmp_path / "out", "rounds=1", *more)
    assert not (tmp_path / "out" / "round-000" / "3-pairs" / "manifest.json").exists()


def test_a_smaller_model_of_another_family_is_refused_before_anything_is_drawn(tmp_path):
    foreign = save_tiny_policy(tmp_path / "foreign")
    with pytest.raises(ConfigError, match=r"sampler\.smaller\[0\].*another tokenizer"):
        call(tmp_path / "out", "rounds=1", f"sampler.smaller=[{foreign}]")
    assert not list((tmp_path / "out").glob("*/*/part-*"))


def test_people_correct_a_round(tmp_path):
    one = ["rounds=1", "sampler.versions=0"]
    call(tmp_path / "a", *one)
    before = rows(tmp_path / "a", 0, "3-pairs", PreferencePair)
    verdicts = [{"pair_id": before[0].pair_id, "verdict": "right"}, {"pair_id": before[1].pair_id, "verdict": "tie"}]
    file = write_jsonl(tmp_path / "c.jsonl", verdicts)
    call(tmp_path / "b", *one, f"pair_builder.corrections={file}")
    after = rows(tmp_path / "b", 0, "3-pairs", PreferencePair)
    assert (after[0].chosen, after[0].rejected) == (before[0].rejected, before[0].chosen)
    assert after[0].flipped != before[0].flipped
    assert after[1:] == before[2:]
