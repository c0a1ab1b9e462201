"""What runs need to have in common before they are compared, what a difference costs, and one budget for all."""

import re
from dataclasses import replace

import pytest

from prefloop.commands.compare_budget import Entry, completions_of, equalise, planned_updates
from prefloop.errors import ConfigError, DataError
from prefloop.evaluate.compare_data import Measured, Method, common_scores
from prefloop.evaluate.compare_report import result
from prefloop.evaluate.compare_words import markdown
from prefloop.launch import read_recipe
from synthetic_run import ended, method


def pair(**changes):
    return [method("a", ended(), ended()), method("b", ended(**changes), ended(**changes))]


def test_runs_alike_give_no_warning():
    arms, warnings = common_scores(pair())
    assert warnings == []
    assert set(arms) == {"a", "b", "start"}
    assert len(arms["start"]) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"judge": "llm"}, "different judges \\(lexicon, llm\\).*no interval would mean anything"),
        ({"prompts": range(100, 140)}, "0 held-out prompts in common; unpaired prompts cannot be compared"),
        ({"scores": {f"p{i}": (float("nan"),) for i in range(40)}}, "b: prompt p0 has a score that is NaN"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, words):
    with pytest.raises(DataError, match=words):
        common_scores(pair(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": range(15, 55)}, "different holdouts: only the 25 prompts .* about 1.3 times as wide"),
        ({"prompts": range(25, 65)}, "Only 15 held-out prompts: below 20 intervals are wide"),
        ({"sampling": "temperature 0.8, top-p 1"}, "drawn differently"),
        ({"start_digest": "other"}, "began with different policies"),
        ({"updates": 150}, "Budgets differ in updates: from 100 \\(a\\) to 150 \\(b\\)"),
        ({"samples": 120}, "Budgets differ in samples"),
    ],
)
def test_what_differs_is_said_with_its_consequence(changes, words):
    _, warnings = common_scores(pair(**changes))
    assert any(re.search(words, w) for w in warnings), warnings


def test_one_kind_of_judge_with_other_settings_is_another_judge():
    ours, theirs = {"kind": "llm", "model": "a", "temperature": 0.0}, {"kind": "llm", "model": "b", "temperature": 0.0}
    runs = [
        method("a", ended(judge="llm", judge_settings=ours)),
        method("b", ended(judge="llm", judge_settings=theirs)),
    ]
    with pytest.raises(DataError, match=r"judged by llm, but with different settings \(model: a and b\).*no interval"):
        common_scores(runs)
    common_scores([runs[0], method("b", ended(judge="llm", judge_settings=dict(ours)))])


def test_one_seed_and_runs_that_diverged_are_named():
    lost = Method("b", "b", (Measured(0, "b", ended()), Measured(1, "b", failed="loss is not finite")))
    _, warnings = common_scores([method("a", ended()), lost])
    assert any("one seed: intervals cover the choice of prompts only" in w for w in warnings)
    assert any("b: 1 of 2 runs diverged" in w for w in warnings)
    found = result([method("a", ended()), lost], [], swept=False)
    assert found["diverged"] == [{"name": "b", "seed": 1, "why": "loss is not finite"}]


def test_a_missing_score_leaves_its_prompt_out_of_all():
    scores = {f"p{i}": (None,) if i == 3 else (1.0,) for i in range(40)}
    arms, warnings = common_scores(pair(scores=scores))
    assert all("p3" not in seed for seeds in arms.values() for seed in seeds)
    assert warnings == ["1 prompts without a score in some run are left out of all."]


def test_a_sweep_counts_a_setting_that_diverged_as_lost():
    def setting(value, run):
        return method(f"simpo beta={value}", *run, target="simpo", varied={"loss.beta": value})

    lost = Method("simpo beta=9", "simpo", (Measured(0, "x", failed="diverged"),), {"loss.beta": "9"})
    found = result(
        [setting("1", [ended(shift=20), ended(shift=20)]), setting("2", [ended(), ended()]), lost], [], swept=True
    )
    (swept,) = found["sweeps"]
    assert swept["settings"] == 3
    assert swept["best"] == {"loss.beta": "1"}
    assert swept["best_rate"] == 100.0
    assert swept["beat_start"] == pytest.approx(1 / 3)
    assert swept["quartiles"][0] < 50
    assert "## Robustness over settings" in markdown(found)


def entry(name, *overrides):
    recipe, origins = read_recipe(name, ["rounds=2", "prompts_per_round=32", *overrides])
    return Entry(name, name, recipe, origins, {})


def test_budgets_are_made_equal_by_prompts_and_passes():
    made, notes = equalise([entry("spin"), entry("iterative_dpo")], "equal")
    assert [e.recipe.prompts_per_round * completions_of(e.recipe) for e in made] == [128, 128]
    # SPIN: 4 steps on 128 pairs, then 8 with the replayed ones. 32 pairs a round: one step each, so six passes.
    assert [planned_updates(e.recipe) for e in made] == [12, 12]
    assert made[1].recipe.train.epochs == 6
    assert made[0].recipe.eval_judge == made[1].recipe.eval_judge
    assert made[0].recipe.eval_sampler.settings()["temperature"] == 1.0
    assert any("128 prompts a round instead of 32" in note for note in notes)
    own, _ = equalise([entry("spin"), entry("iterative_dpo")], "own")
    assert [e.recipe.prompts_per_round for e in own] == [32, 32]


def test_a_method_that_searches_is_evaluated_on_draws():
    (made,), _ = equalise([entry("iterative_dpo", "sampler.kind=beam", "sampler.max_new_tokens=9")], "own")
    assert made.recipe.sampler.kind == "beam"
    assert made.recipe.eval_sampler.kind == "hf"
    assert made.recipe.eval_sampler.settings() == {"max_new_tokens": 9, "temperature": 1.0, "top_p": 1.0}


def test_samples_are_those_of_the_whole_run_and_no_more_than_there_are_prompts():
    entries = [entry("ppo", "rounds=8"), entry("iterative_dpo", "rounds=4"), entry("simpo", "rounds=1")]

    def drawn(made):
        return [e.recipe.rounds * e.recipe.prompts_per_round * completions_of(e.recipe) for e in made]

    made, _ = equalise(entries, "equal")
    assert drawn(made) == [8 * 32 * 4] * 3
    assert [e.recipe.prompts_per_round for e in made] == [32, 64, 256]
    # PPO learns from every completion, 32 a step; the others from one pair of each prompt's four, four times as often.
    assert [planned_updates(e.recipe) for e in made] == [32, 32, 32]
    assert [e.recipe.train.epochs for e in made] == [1, 4, 4]
    made, notes = equalise(entries, "equal", {e.name: 128 for e in entries})
    assert drawn(made) == [128 * 4] * 3
    assert any("simpo: 128 prompts a round instead of 32, so that it draws about 512 completions" in n for n in notes)
    whole = replace(entries[2], recipe=entries[2].recipe.model_copy(update={"prompts_per_round": None}))
    assert drawn(equalise([entries[0], whole], "equal", {"ppo": 100, "simpo": 100})[0]) == [384, 400]  # whole prompts


def test_methods_with_different_judges_are_refused():
    with pytest.raises(ConfigError, match="different judges \\(lexicon, verifier\\)"):
        equalise([entry("spin"), entry("simpo", "judge.kind=verifier")], "equal")
    with pytest.raises(ConfigError, match="--budget"):
        equalise([entry("spin")], "fair")
