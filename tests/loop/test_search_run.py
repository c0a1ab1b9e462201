"""The searching and steering samplers in a recipe: a round that trains on a beam's completions, and evaluations."""

import json
import shutil
from pathlib import Path

import pytest

from prefloop.artifact import load_artifact
from prefloop.commands.evaluate import evaluate
from prefloop.errors import ConfigError
from prefloop.inputs import embedded_policy
from prefloop.launch import read_policy, read_recipe
from prefloop.loop import run
from prefloop.rows import JudgedGroup, PreferencePair, SampleGroup

SMALL = ["rounds=1", "prompts_per_round=8", "evaluate.prompts=20", "gate.kind=always", "threads=1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Trained on the first and the last of a beam of four; measured by best-of-n."""
    root = tmp_path_factory.mktemp("run") / "beam"
    file = root.parent / "mine.yaml"
    file.write_text(
        "recipe: iterative_dpo\n"
        "sampler: {kind: beam, beams: 4, completions: 4, max_new_tokens: 12}\n"
        "eval_sampler: {kind: best_of_n, n: 3, max_new_tokens: 12}\n"
    )
    recipe, origins = read_recipe(str(file), SMALL)
    return root, run(recipe, root, origins=origins)


def test_a_round_trains_on_what_a_beam_finds(finished):
    root, summary = finished
    assert summary["state"] == "done"
    samples = list(load_artifact(root / "round-000" / "1-samples", SampleGroup))
    for group in samples:
        totals = [sum(c.sampler_logps) for c in group.completions]
        assert totals == sorted(totals, reverse=True)
        assert len({c.token_ids for c in group.completions}) == 4
        assert group.temperature == 0
    assert list(load_artifact(root / "round-000" / "3-pairs", PreferencePair))


def test_what_is_no_draw_gives_no_divergence(finished):
    _, summary = finished
    assert "kl_policy_start" not in summary["rounds"][0]["metrics"]
    assert any("kl_policy_start was not measured" in warning for warning in summary["warnings"])


def test_a_policy_is_steered_and_guided_in_an_evaluation(finished, tmp_path):
    """Proxy tuning of the first policy by what training did to it draws what the trained policy draws."""
    root, _ = finished
    trained = tmp_path / "trained"
    shutil.copytree(root / "round-000" / "5-policy", trained)
    start = str(embedded_policy())
    common = ["prompts=embedded", "judge.kind=lexicon", "evaluate.prompts=20"]
    kinds = {
        "steered": (start, ["kind=proxy_tuning", f"tuned={trained}", f"untuned={start}"]),
        "plain": (str(trained), ["kind=hf"]),
        "guided": (str(trained), ["kind=guided", f"reference={start}", "block=5"]),
    }
    texts = {}
    for name, (policy, settings) in kinds.items():
        drawn = (f"eval_sampler.{setting}" for setting in (*settings, "max_new_tokens=10"))
        recipe = read_policy(Path(policy), [*common, *drawn])
        (row,) = evaluate(recipe, tmp_path / name)
        assert 0 < row.found.metrics["length"].value <= 10
        groups = load_artifact(tmp_path / name / "plain" / "2-judged", JudgedGroup)
        texts[name] = {g.prompt.prompt_id: g.completions[0].text for g in groups}
    assert texts["steered"] == texts["plain"]
    assert texts["guided"] != texts["plain"]
    assert json.loads((tmp_path / "guided" / "evaluation.json").read_text())["rows"][0]["beams"] is None


def test_policy_gradients_on_a_beam_are_refused_before_any_work(tmp_path):
    recipe, _ = read_recipe("grpo", [*SMALL, "sampler.kind=beam", "sampler.beams=4", "sampler.completions=4"])
    with pytest.raises(ConfigError, match="draws from the policy itself"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
