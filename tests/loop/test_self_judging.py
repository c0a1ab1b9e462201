"""Self-Rewarding and Meta-Rewarding through the loop: who judges whom, and what the judge itself learns from."""

from pathlib import Path
from typing import Any

import pytest

from prefloop.artifact import load_artifact
from prefloop.errors import ConfigError
from prefloop.launch import read_recipe
from prefloop.loop import run
from prefloop.rows import JudgedGroup, PreferencePair, TokenizedPair
from scripted_endpoint import ScriptedEndpoint, in_form, material, taste

SMALL = [
    "prompts_per_round=12",
    "sampler.max_new_tokens=12",
    "train.pairs_per_step=8",
    "evaluate.prompts=4",
    "gate.kind=always",
]


def call(name: str, root: Path, *more: str) -> dict[str, Any]:
    recipe, origins = read_recipe(name, [*SMALL, *more])
    return run(recipe, root, origins=origins)


def read(root: Path, place: str, record: type) -> list[Any]:
    return list(load_artifact(root / place, record))


def test_self_rewarding_trains_on_its_own_verdicts_and_is_measured_by_another_judge(tmp_path):
    summary = call("self_rewarding", tmp_path, "rounds=2")
    for number in (0, 1):
        judged = read(tmp_path, f"round-00{number}/2-judged", JudgedGroup)
        by_prompt = {group.prompt.prompt_id: group for group in judged}
        assert {group.judge for group in judged} == {"self_likelihood"}
        for pair in read(tmp_path, f"round-00{number}/3-pairs", PreferencePair):
            scores = by_prompt[pair.prompt.prompt_id].scores
            assert (pair.chosen_score, pair.rejected_score) == (max(scores), min(scores))
    held_out = read(tmp_path, "round-001/6-report/2-judged", JudgedGroup)
    assert {group.judge for group in held_out} == {"lexicon"}
    assert not any("eval_judge" in warning for warning in summary["warnings"])


@pytest.mark.parametrize("name", ["self_rewarding", "meta_rewarding"])
def test_a_policy_that_would_measure_itself_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"eval_judge: .* set eval_judge to a judge that stays"):
        call(name, tmp_path / "out", "rounds=1", "eval_judge=null")


def test_meta_rewarding_trains_actor_and_judge_and_the_judge_in_two_rounds_only(tmp_path):
    call("meta_rewarding", tmp_path, "rounds=3")
    builders = []
    for number in range(3):
        pairs = read(tmp_path, f"round-00{number}/3-pairs", PreferencePair)
        builders.append({pair.builder.partition("/")[2] for pair in pairs})
        for pair in pairs:
            if pair.builder == "meta_rewarding/judge":
                assert {pair.chosen.text, pair.rejected.text} == {" happy", " sad"}
                assert pair.prompt.text.endswith("\nThey felt")
    assert builders == [{"actor", "judge"}, {"actor", "judge"}, {"actor"}]
    # The policy sampled both sides of both kinds, so its log-probs serve as the reference's.
    assert load_artifact(tmp_path / "round-000" / "4-batches", TokenizedPair).facts["reference_logps"] == "sampler"


def grader_and_meta_judge(request: dict[str, Any], number: int) -> str:
    """Grades by taste and by seed, so that repeats differ; prefers the judgement with the higher grade."""
    texts = material(request)
    if "JUDGEMENT A" in texts:
        a, b = (max(c for c in texts[f"JUDGEMENT {name}"] if c.isdigit()) for name in "AB")
        return in_form(request, "tie" if a == b else "A" if a > b else "B")
    return in_form(request, (taste(texts["COMPLETION"]) + request["seed"]) % 6)


def test_judgements_of_a_language_model_are_trained_on_as_they_were_asked_for(tmp_path):
    with ScriptedEndpoint(grader_and_meta_judge) as endpoint:
        judge = f"{{kind: llm, model: judge, base_url: '{endpoint.url}', reply: text, repeats: 3, temperature: 0.7}}"
        more = [f"judge={judge}", "judge.keep_judgements=true", "judge.meta=3", "sampler.completions=3"]
        call("meta_rewarding", tmp_path, "rounds=1", *more)
    by_id = {
        j.judgement.completion_id: j
        for group in read(tmp_path, "round-000/2-judged", JudgedGroup)
        for j in group.judgements
    }
    pairs = [p for p in read(tmp_path, "round-000/3-pairs", PreferencePair) if p.builder.endswith("judge")]
    assert pairs
    for pair in pairs:
        best, worst = by_id[pair.chosen.completion_id], by_id[pair.rejected.completion_id]
        assert best.completion == worst.completion
        assert best.score > worst.score
        assert pair.prompt.messages == best.messages
        assert "COMPLETION" in pair.prompt.text
    facts = load_artifact(tmp_path / "round-000" / "4-batches", TokenizedPair).facts
    assert facts["pairs"] + sum(facts["dropped"].values()) == len(read(tmp_path, "round-000/3-pairs", PreferencePair))
