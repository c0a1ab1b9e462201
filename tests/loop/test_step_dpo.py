"""Step-DPO from samples to the policy, on the sums world."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefloop.artifact import load_artifact
from prefloop.errors import ConfigError, Interrupted
from prefloop.inputs import embedded_policy, embedded_prompts
from prefloop.judge.sums import first_wrong_step, steps
from prefloop.launch import read_recipe
from prefloop.loop import run
from prefloop.rows import JudgedGroup, PreferencePair, StepLog, TokenizedPair
from prefloop.train.batches import group_by_context
from tiny import write_jsonl

SMALL = [
    "rounds=1",
    "threads=1",
    "prompts_per_round=48",
    "prompts_per_part=16",
    "sampler.completions=4",
    "train.pairs_per_step=8",
    "evaluate.prompts=20",
    "gate.kind=always",
]
FOLDER = embedded_policy("embedded-sums")


def call(root: Path, *more: str, **how: Any) -> dict[str, Any]:
    recipe, origins = read_recipe("step_dpo", [*SMALL, *more])
    return run(recipe, root, origins=origins, **how)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("steps")
    return root, call(root)


def pairs_of(root: Path) -> list[PreferencePair]:
    return list(load_artifact(root / "round-000" / "3-pairs", PreferencePair))


def corrected_of(root: Path) -> list[JudgedGroup]:
    return list(load_artifact(root / "round-000" / "2b-corrected", JudgedGroup))


def test_the_first_wrong_step_of_a_wrong_solution_meets_a_step_of_a_right_one(finished):
    pairs = pairs_of(finished[0])
    assert len(pairs) > 20
    assert {len(steps(p.prefix.text)) if p.prefix else 0 for p in pairs} >= {0, 1, 2}
    for pair in pairs:
        before = pair.prefix.text if pair.prefix else ""
        assert first_wrong_step(pair.prompt.text, before + pair.rejected.text) == len(steps(before)) + 1
        assert len(steps(pair.chosen.text)) == len(steps(pair.rejected.text)) == 1
        assert (pair.chosen_score, pair.rejected_score) == (1.0, 0.0)


def test_steps_are_slices_of_what_was_sampled_and_hold_no_end_token(finished):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    groups = {group.prompt.prompt_id: group for group in corrected_of(finished[0])}
    for pair in pairs_of(finished[0]):
        before = pair.prefix.token_ids if pair.prefix else ()
        sampled = groups[pair.prompt.prompt_id].completions
        for side in (pair.chosen, pair.rejected):
            ids = (*before, *side.token_ids)
            assert tokenizer.eos_token_id not in ids
            assert any(c.token_ids[: len(ids)] == ids for c in sampled)
            assert tokenizer.decode(list(ids)) == (pair.prefix.text if pair.prefix else "") + side.text


def test_every_completion_is_the_sum_of_its_steps_and_an_end_token(finished):
    groups = corrected_of(finished[0])
    added = 0
    for group in groups:
        added += len(group.completions) - 4
        assert group.scores[4:] == (1.0,) * (len(group.completions) - 4)
        for completion, solution in zip(group.completions, group.solutions, strict=True):
            assert completion.finish_reason == "stop"
            assert "".join(step.text for step in solution.steps) == completion.text
            assert sum(step.tokens for step in solution.steps) == len(completion.token_ids) - 1
            assert [step.text for step in solution.steps] == steps(completion.text)
            if solution.first_wrong is not None:
                assert solution.first_wrong == first_wrong_step(group.prompt.text, completion.text)
    assert added > 5


@torch.inference_mode()
def test_log_probs_of_prefix_and_step_add_up_under_plain_transformers(finished):
    """log π(prefix, step | x) = log π(prefix | x) + log π(step | x, prefix), and the stored ones are the last term."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    pairs = {pair.pair_id: pair for pair in pairs_of(finished[0])}
    batch = list(load_artifact(finished[0] / "round-000" / "4-batches", TokenizedPair))

    def total(ids: list[int], begin: int) -> float:
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return float(logps[torch.arange(begin - 1, len(ids) - 1), torch.tensor(ids[begin:])].sum())

    for row in batch[:12]:
        pair = pairs[row.pair_id]
        prompt = tokenizer(pair.prompt.text)["input_ids"]
        before = list(pair.prefix.token_ids) if pair.prefix else []
        assert list(row.context) == prompt + before
        for side, tokens, stored in (
            (pair.chosen, row.chosen, row.reference_chosen),
            (pair.rejected, row.rejected, row.reference_rejected),
        ):
            assert tokens == side.token_ids
            whole = [*prompt, *before, *tokens]
            prefix = total([*prompt, *before], len(prompt)) if before else 0.0
            assert total(whole, len(prompt)) == pytest.approx(prefix + sum(stored), abs=2e-4)


def test_both_steps_of_a_pair_share_the_computation_of_their_prefix(finished):
    batch = list(load_artifact(finished[0] / "round-000" / "4-batches", TokenizedPair))
    groups = group_by_context(batch).groups
    assert len(groups) == len({row.context for row in batch}) <= len(batch)
    assert all(len(group.completions) >= 2 for group in groups)


def test_training_starts_at_ln_2_and_the_stage_is_in_the_summary(finished):
    root, summary = finished
    first = next(iter(load_artifact(root / "round-000" / "5-policy", StepLog)))
    assert first.loss == pytest.approx(0.693147, abs=1e-4)
    facts = summary["rounds"][0]["facts"]
    assert facts["corrected"]["first_wrong_step_found"] >= facts["corrected"]["groups"] / 4
    assert facts["corrected"]["completions"] > facts["samples"]["completions"]
    assert facts["batches"]["reference_logps"] == "sampler"
    assert summary["rounds"][0]["seconds"]["corrected"] > 0
    assert (
        "first_wrong_step_found"
        in json.loads((root / "round-000" / "2b-corrected" / "manifest.json").read_text())["facts"]
    )


def test_a_run_that_stops_among_corrections_goes_on_and_ends_in_the_same_bytes(finished, tmp_path):
    folder = tmp_path / "round-000" / "2b-corrected"
    with pytest.raises(Interrupted, match="correct, part 2 of 3"):
        call(tmp_path, stop=lambda: (folder / "part-00001.parquet").exists())
    assert not (folder / "manifest.json").exists()
    written = {p.name: p.stat().st_mtime_ns for p in folder.glob("part-*")}
    call(tmp_path)
    assert {name: (folder / name).stat().st_mtime_ns for name in written} == written
    for name in ("2b-corrected", "3-pairs", "4-batches", "5-policy"):
        files = sorted(
            p for p in (finished[0] / "round-000" / name).iterdir() if p.suffix in (".parquet", ".safetensors")
        )
        assert files
        for file in files:
            again = tmp_path / "round-000" / name / file.name
            assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(file.read_bytes()).digest()


def test_questions_in_gsm8ks_form_with_a_verifier_and_without_a_locator(tmp_path):
    """The sums as a user's file with the paper's settings: continuations name about half of the exact steps or more."""
    lines = embedded_prompts("embedded-sums").read_text(encoding="utf-8").splitlines()[:120]
    rows = [json.loads(line) for line in lines]
    answers = [{"question": row["prompt"], "answer": f"{row['gold']}\n#### {row['answer']}"} for row in rows]
    prompts = write_jsonl(tmp_path / "gsm8k.jsonl", answers)
    call(
        tmp_path / "out",
        *[
            "policy=embedded-sums",
            f"prompts={{path: {prompts}, column: question, gold: answer}}",
            "prompts_per_round=24",
        ],
        *["judge={kind: verifier, mode: number}", "sampler.max_new_tokens=80", "train.epochs=1"],
    )
    exact = []
    for group in corrected_of(tmp_path / "out"):
        for completion, solution in zip(group.completions, group.solutions, strict=True):
            if solution.first_wrong is not None:
                exact.append(solution.first_wrong == first_wrong_step(group.prompt.text, completion.text))
    assert len(exact) > 10
    # The carelessness of this model lets wrong steps end right, and right ones not.
    assert sum(exact) / len(exact) > 0.4
    pairs = pairs_of(tmp_path / "out")
    assert pairs
    assert all(len(steps(side.text)) == 1 for pair in pairs for side in (pair.chosen, pair.rejected))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["corrector=null", "locator=null"], r"pair_builder\.kind: steps pairs steps, .* set corrector\.kind=steps"),
        (["corrector=null", "pair_builder=ranked"], "locator: only a corrector asks it"),
        (
            ["sampler={kind: matrix}"],
            r"corrector\.kind: steps goes on from within completions, which sampler\.kind matrix",
        ),
        (["pair_builder={kind: versus_gold}"], "versus_gold nothing is judged"),
        (["corrector.split=("], r"corrector\.split"),
        (["corrector.trys=3"], r"corrector\.trys: unknown key .* did you mean tries\?"),
        (["locator=nobody"], r"locator\.kind: no 'nobody' in prefloop/judge"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(tmp_path, more, words):
    with pytest.raises(ConfigError, match=words):
        call(tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()
