"""`prefloop plan` counts what a run then does, and `run --smoke` goes through every stage."""

import json
import sys
import time
from dataclasses import replace

import pytest

from prefloop import cli
from prefloop.commands.plan import Prices, Stopwatch, _calls, _seconds, plan
from prefloop.commands.smoke import smoke
from prefloop.errors import DataError
from prefloop.inputs import resolve_prompts
from prefloop.judge.llm import Llm
from prefloop.launch import read_recipe
from prefloop.loop import run
from tiny import write_jsonl

SETTINGS = [
    "prompts_per_round=32",
    "prompts_per_part=16",
    "sampler.completions=3",
    "sampler.max_new_tokens=8",
    "train.pairs_per_step=8",
    "evaluate.prompts=24",
    "gate.kind=always",
    "rounds=2",
]


def test_a_plan_counts_what_the_run_then_does(tmp_path):
    recipe, origins = read_recipe("iterative_dpo", SETTINGS)
    found = plan(recipe, Prices(per_call=0.5), probe=16)
    summary = run(recipe, tmp_path / "run", origins=origins)
    facts = [entry["facts"] for entry in summary["rounds"]]
    tokens = sum(f["samples"]["tokens"] + f["evaluation_samples"]["tokens"] for f in facts)
    size = sum(p.stat().st_size for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert (found.rounds, found.prompts, found.held_out) == (2, 64, 24)
    assert found.completions == 2 * 32 * 3 + 3 * 24
    assert found.judge_calls == found.completions
    assert found.money == pytest.approx(found.judge_calls * 0.5)
    assert found.steps == sum(f["policy"]["steps"] for f in facts)
    assert found.pairs == pytest.approx(sum(f["pairs"]["pairs"] for f in facts), rel=0.3)
    assert found.tokens == pytest.approx(tokens + summary["start"]["tokens"]["samples"], rel=0.3)
    assert found.disk == pytest.approx(size, rel=0.3)
    assert found.judge_asked
    assert any("money         " in line and "nothing" not in line for line in found.lines())


def test_seconds_are_scaled_stage_by_stage(monkeypatch):
    clock = Stopwatch(began=100.0)
    clock.stages = [("sample", 1.0), ("sample", 4.0), ("train", 2.0), ("sample", 0.5), ("displacement", 0.25)]
    clock.before, clock.trained, clock.round_began = 1, 3, 103.0
    # 2 s to set up, 1 s for the start, then 6.75 s of stages and 1 s between them.
    took = 3.0 + 6.75 + 1.0
    once = _seconds(clock, took, 1, 1.0, 1.0, 1.0)
    assert once == pytest.approx(took)
    more = _seconds(clock, took, 3, 10.0, 2.0, 1.5)
    assert more == pytest.approx(2 + 1 * 2 + 3 * (1 + 40 + 2 * 10 * 1.5 + 0.5 * 2 + 0.25))


@pytest.mark.parametrize(
    ("mode", "repeats", "completions", "calls"),
    [("grade", 1, 4, 4), ("grade", 3, 4, 12), ("compare", 1, 4, 12), ("rank", 1, 4, 2)],
)
def test_calls_of_a_language_model_judge(mode, repeats, completions, calls):
    judge = Llm(model="some/where", mode=mode, repeats=repeats, temperature=1.0)
    assert _calls(judge, completions)[0] == calls


def test_a_judge_behind_an_endpoint_is_not_asked_by_a_plan():
    address = "judge.base_url=http://127.0.0.1:9/v1"  # nobody listens there
    settings = [*SETTINGS, "judge.kind=llm", "judge.model=m", address, "rounds=1"]
    found = plan(read_recipe("iterative_dpo", settings)[0], Prices(per_million_tokens=2.0), probe=8)
    assert not found.judge_asked
    assert found.judge_calls == 32 * 3 + 2 * 24
    assert found.money == pytest.approx(found.judge_tokens * 2e-6)
    assert found.judge_tokens > 300 * found.judge_calls


def test_smoke_goes_through_every_stage_and_cleans_up(tmp_path):
    recipe, _ = read_recipe("iterative_dpo", [*SETTINGS, "rounds=3"])
    began = time.monotonic()
    done = smoke(recipe, tmp_path / "out")
    assert (done.prompts, done.steps, done.kept) == (4, 1, False)
    assert done.seconds <= time.monotonic() - began
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["sdpo", "cofs_dpo"])
def test_a_method_with_a_round_for_each_source_is_smoked_and_planned_in_one(method, tmp_path):
    rows = [
        {"prompt": f"Day {i}: Tom was", "chosen": f" happy {i}.", "rejected": f" sad {i}.", "source": "ab"[i % 2]}
        for i in range(60)
    ]
    data = ["policy=embedded", f"prompts={write_jsonl(tmp_path / 'pairs.jsonl', rows)}", "prompts.holdout=0.5"]
    settings = [*data, "eval_judge=lexicon", "eval_sampler.max_new_tokens=8", "evaluate.prompts=20", "threads=1"]
    recipe = read_recipe(method, settings)[0]
    done = smoke(recipe, tmp_path / "out")
    assert done.steps == 1
    assert not (tmp_path / "out").exists()
    found = plan(recipe, Prices(), probe=8)
    assert found.rounds == 2
    assert found.prompts - len(resolve_prompts(recipe).train) in (0, 1), "each prompt once"
    with pytest.raises(DataError, match="for 1 rounds; set rounds=2"):
        smoke(read_recipe(method, [*settings, "rounds=1"])[0], tmp_path / "out")


def test_smoke_can_keep_its_folder(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = ["run", "iterative_dpo", *SETTINGS, "--smoke", "--keep", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["prefloop", *command])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert str(out / "smoke") in capsys.readouterr().out.replace("\n", "")
    summary = json.loads((out / "smoke" / "summary.json").read_text())
    assert len(summary["rounds"]) == 1
    assert summary["rounds"][0]["facts"]["samples"]["prompts"] == 4


def test_smoke_says_what_is_wrong_and_keeps_the_evidence(tmp_path):
    judge = tmp_path / "judge.py"
    judge.write_text("def score(prompt, completion, gold):\n    return 1.0\n", encoding="utf-8")
    settings = [*SETTINGS, "judge.kind=verifier", "judge.mode=python", f"judge.file={judge}:score"]
    recipe, _ = read_recipe("iterative_dpo", settings)
    with pytest.raises(DataError, match="64 of 64 groups have equal scores"):
        smoke(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "smoke" / "summary.json").is_file()


def test_prices_add_up():
    assert Prices().cost(10, 10) is None
    assert Prices(0.5, 2.0).cost(10, 1_000_000) == 7.0
    assert replace(Prices(), per_call=0.1).cost(10, 5) == pytest.approx(1.0)
