"""The claims' harness: descriptions that make valid runs, statistics by hand, and a whole claim at tiny sizes."""

import json
from dataclasses import replace
from itertools import combinations
from statistics import mean

import pytest

from benchmarks.claims.__main__ import find_claims, main
from benchmarks.claims.engine import page, results, worlds
from benchmarks.claims.engine.data import sources
from benchmarks.claims.engine.quality import per_prompt
from benchmarks.claims.engine.records import Comparison, Quality, Sizes
from benchmarks.claims.engine.runner import folder_of, held_out, job_of, recipe_of
from benchmarks.claims.engine.stats import (
    STATISTICS,
    Estimate,
    Trace,
    corrected,
    estimate,
    overall,
    p_value,
    verdict,
)
from benchmarks.claims.parts.shuffled_ladder import ShuffledLadder
from prefloop import loop
from prefloop.components import build, build_parts
from prefloop.inputs import embedded_prompts, resolve_prompts
from prefloop.pair.curriculum import Curriculum
from prefloop.prompts.dataset import read_prompts
from prefloop.protocols import Judge, RoundContext
from prefloop.recipe import Recipe, Spec, for_round
from prefloop.rows import Completion, JudgedGroup, Message, PolicyRef, Prompt
from tiny import needs_shared

CLAIMS = find_claims()
RUN = [name for name, claim in CLAIMS.items() if not claim.exact]
POLICY = PolicyRef("", "", -1)


@pytest.mark.parametrize("name", RUN)
def test_every_arm_is_a_run_that_prefloop_takes_and_that_differs_from_the_others(name, tmp_path, monkeypatch):
    claim = CLAIMS[name]
    monkeypatch.setattr("benchmarks.claims.engine.runner.prompts_file", lambda kind, *_: f"{kind}.jsonl")
    monkeypatch.setattr("benchmarks.claims.engine.runner.tuned_policy", lambda *_: "tuned")
    monkeypatch.setattr("benchmarks.claims.engine.runner.reward_model", lambda *_: "reward")
    folders, resolved = set(), []
    for arm in claim.arms:
        job = job_of(claim, arm, claim.rates_of(arm)[0], 0, Sizes())
        recipe, _ = recipe_of(job, tmp_path)
        for number in range(recipe.rounds):
            its = for_round(recipe, number)
            loop.check_combination(its, build_parts(its))
        assert recipe.train.learning_rate == job.rate
        assert (recipe.train.schedule, recipe.train.warmup) == ("constant", 0)
        folders.add(folder_of(job, tmp_path))
        resolved.append([for_round(recipe, n).model_dump(exclude={"per_round"}) for n in range(recipe.rounds)])
    assert len(folders) == len(claim.arms)
    # In effect, too: what a setting says could be undone by the recipe's changes from round to round.
    assert all(one != other for one, other in combinations(resolved, 2))


@pytest.mark.parametrize("name", RUN)
def test_no_arm_is_judged_by_its_training_judge_and_names_are_known(name):
    claim = CLAIMS[name]
    assert {claim.judge, *claim.judges()} <= set(worlds.JUDGES)
    for quality in (claim.quality, *(comparison.quality for comparison in claim.comparisons if comparison.quality)):
        assert claim.judge not in quality.judges or claim.judge in worlds.EXACT
    arms = {arm.name for arm in claim.arms}
    for comparison in claim.comparisons:
        assert {*comparison.better, *comparison.than} <= arms
        assert comparison.statistic in STATISTICS


def test_validation_report_and_training_prompts_are_apart(tmp_path):
    claim = CLAIMS["iterative_vs_offline"]
    sizes = Sizes()
    tuning, report = (job_of(claim, claim.arms[0], 1e-4, seed, sizes) for seed in (sizes.tuning_seeds[0], 0))
    recipe, _ = recipe_of(report, tmp_path)
    sets = [{p.prompt_id for p in held_out(job, recipe)} for job in (tuning, report)]
    prompts = resolve_prompts(recipe)
    sets.append({p.prompt_id for p in prompts.train})
    assert sum(map(len, sets)) == len(set.union(*sets)) == len(prompts.prompts)
    # The run's own gate looks at the first held-out prompts by id: validation ones.
    assert {p.prompt_id for p in loop.held_out(recipe, prompts)} <= sets[0]


@pytest.mark.parametrize("name", [name for name in RUN if CLAIMS[name].data == "prompts"])
def test_arms_draw_the_same_number_of_completions(name, tmp_path, monkeypatch):
    claim = CLAIMS[name]
    monkeypatch.setattr("benchmarks.claims.engine.runner.tuned_policy", lambda *_: worlds.WORLDS["stories"])
    monkeypatch.setattr("benchmarks.claims.engine.runner.prompts_file", lambda *_: "")
    monkeypatch.setattr("benchmarks.claims.engine.runner.reward_model", lambda *_: "")
    drawn = set()
    for arm in claim.arms:
        recipe, _ = recipe_of(job_of(claim, arm, claim.rates_of(arm)[0], 0, Sizes()), tmp_path)
        assert recipe.prompts_per_round <= len(resolve_prompts(recipe).train)
        drawn.add(sum(recipe.prompts_per_round * completions(recipe, number) for number in range(recipe.rounds)))
    assert len(drawn) == 1


def completions(recipe: Recipe, number: int) -> int:
    """Completions of each prompt in a round: of every policy of a matrix, which has one in the first round."""
    settings = for_round(recipe, number).sampler.settings()
    return settings["completions"] * (1 + min(number, settings.get("versions", 0)))


def test_the_interval_is_students():
    # Student's sleep data (1908), extra hours of the second drug: R's t.test gives 2.33 [0.90, 3.76].
    found = estimate([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
    assert (found.value, found.low, found.high) == pytest.approx((2.33, 0.8976775, 3.7623225), abs=1e-3)
    assert verdict(estimate([3.0])) == "not reproduced"


@pytest.mark.parametrize(
    ("low", "high", "sign", "expected"),
    [
        (0.1, 2, 1, "reproduced"),
        (0.1, 2, -1, "opposite"),
        (-2, -0.1, 1, "opposite"),
        (-2, -0.1, -1, "reproduced"),
        (-1, 1, 1, "not reproduced"),
        (0, 1, 1, "not reproduced"),
    ],
)
def test_a_verdict_needs_an_interval_on_one_side(low, high, sign, expected):
    assert verdict(Estimate((low + high) / 2, low, high, 5), sign) == expected


def test_a_claim_of_several_parts_is_reproduced_only_as_a_whole():
    assert overall(["reproduced", "reproduced"]) == "reproduced"
    assert overall(["reproduced", "opposite"]) == "partly reproduced"
    assert overall(["not reproduced", "opposite"]) == "opposite in part"


def test_p_values_are_students_and_corrected_by_holm():
    # Student's sleep data again: R's t.test gives t = 3.6799, p = 0.005076.
    sleep = estimate([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
    assert p_value(sleep) == pytest.approx(0.005076, abs=5e-6)
    assert p_value(sleep, by=sleep.value) == 1
    assert (p_value(estimate([3.0])), p_value(estimate([2.0, 2.0])), p_value(estimate([0.0, 0.0]))) == (1, 0, 1)
    said = ["reproduced", "opposite", "not reproduced"]
    assert corrected(said, [0.01, 0.04, 0.9]) == [
        ("reproduced", 0.03),
        ("not reproduced", 0.08),
        ("not reproduced", 0.9),
    ]


def test_a_difference_may_have_to_exceed_a_bound_and_be_of_two_statistics():
    run = Trace([[0.0], [3.0], [9.0]], [True, True])
    weaker = Trace([[0.0], [1.0], [2.0]], [True, True])
    traces = {"a": {0: run, 1: run}, "b": {0: weaker, 1: weaker}}
    gains = Comparison("", ("a",), ("b",), "revised", than_statistic="drafts")
    assert results._compared(gains, traces, range(2)) == [8.0, 8.0]
    said = [results._judged([[8.0, 8.0]], [replace(gains, by=by)])[0]["verdict"] for by in (7.9, 8.0, 8.1)]
    assert said == ["reproduced", "not reproduced", "opposite"]


def test_a_refused_round_leaves_the_policy_and_counts_as_such():
    good, bad, better = [50.0, 51.0, 52.0, 53.0], [30.0, 31.0, 32.0, 33.0], [60.0, 61.0, 62.0, 63.0]
    run = Trace([good, bad, better, bad, bad], [False, True, True, False])
    assert run.in_force() == [0, 0, 2, 3, 3]
    assert run.curve() == [51.5, 51.5, 61.5, 31.5, 31.5]
    assert run.rounds_worse() == (1, 1, 1)  # round 3 promoted, round 0 refused; round 3's equal refused, not worse
    assert {name: measure(run) for name, (_, measure) in STATISTICS.items()} == {
        "final": 31.5,
        "first": 51.5,
        "later_gain": -20.0,
        "last_gain": -30.0,
        "drafts": 51.5,
        "revised": 31.5,
        "revision_gain": -20.0,
        "regressions": 1.0,
    }


def test_the_lowest_rank_counts():
    start = {"a": [[1.0, 2.0], [3.0, 4.0]], "b": [[10.0, 20.0], [30.0, 40.0]]}
    both = Quality("", ("a", "b"))
    assert per_prompt(both, start, start) == [25.0, 75.0]  # mid-ranks 12.5, 37.5 and 62.5, 87.5
    hacked = {"a": [[99.0], [99.0]], "b": [[5.0], [None]]}
    assert per_prompt(both, hacked, start) == [0.0, 0.0]
    assert per_prompt(Quality("", ("a",)), hacked, start) == [100.0, 100.0]
    assert per_prompt(Quality("", ("a",), "percent"), {"a": [[1.0, 0.0], [1.0, 1.0]]}, start) == [50.0, 100.0]


def test_the_shuffled_ladder_has_the_curriculums_pairs_in_another_order():
    def group(number: int) -> JudgedGroup:
        prompt = Prompt(f"p{number}", (Message("text", f"p{number}"),), None, "train", "here")
        completions = tuple(Completion(f"{number}-{i}", f"t{i}", None, None, "stop", 0, "given") for i in range(4))
        return JudgedGroup(prompt, completions, "", 0, 1.0, 1.0, (3.0, 2.0, 1.0, 0.0), None, "given", (None,) * 4)

    groups = [group(number) for number in range(40)]

    def rounds(builder: Curriculum) -> list[list[str]]:
        return [[p.rejected.text for p in builder(groups, RoundContext(0, n, POLICY, POLICY))] for n in range(3)]

    ordered, shuffled = rounds(Curriculum()), rounds(ShuffledLadder())
    assert ordered == [["t3"] * 40, ["t2"] * 40, ["t1"] * 40]
    assert [sorted(column) for column in zip(*shuffled, strict=True)] == [["t1", "t2", "t3"]] * 40
    assert all(set(column) == {"t1", "t2", "t3"} for column in shuffled)


def test_sources_hold_every_prompt_once_and_depend_on_the_seed():
    prompts = read_prompts(str(embedded_prompts("embedded")), limit=12).prompts
    one, other = ([row["source"] for row in sources(prompts, seed, 4)] for seed in (0, 1))
    rows = list(sources(prompts, 0, 4))
    assert len({row["prompt"] for row in rows}) == len(rows) <= 12
    assert one.count("writer") == 6 >= one.count("mood")
    assert {row["prompt"] for row in rows if row["source"] == "writer"} != {
        row["prompt"] for row in sources(prompts, 1, 4) if row["source"] == "writer"
    }
    assert set(one) == set(other) | set(one)


@needs_shared
def test_the_fixed_judges_prefer_language_to_scrambled_words():
    story = " was very happy. She went to the park with her mom and they played with the ball."
    scrambled = " " + " ".join(sorted(story.split(), key=lambda w: w[::-1]))
    prompt = Prompt("p", (Message("text", "Lily saw a big red ball. She"),), None, "train", "here")
    completions = tuple(Completion(str(i), t, None, None, "stop", 0, "x") for i, t in enumerate((story, scrambled, "")))
    group = JudgedGroup(prompt, completions, "", 0, 1.0, 1.0, (None,) * 3, None, "", (None,) * 3)
    context = RoundContext(0, 0, POLICY, POLICY)
    for name in ("fluency", "stories-even", "stories-odd"):
        good, bad, nothing = _judge(name)([group], context)[0].scores
        assert good > nothing > bad, name
    positive, _, nothing = _judge("opinion")([group], context)[0].scores
    assert positive > nothing == 0


def _judge(name: str) -> Judge:
    judge: Judge = build("eval_judge", Spec.model_validate(worlds.judge_spec(name)))
    return judge


@needs_shared
def test_a_quick_claim_is_measured_reused_and_written(tmp_path, capsys):
    out, target = tmp_path / "runs", tmp_path / "claims.md"
    command = ["--quick", "--seeds", "1", "--workers", "1", "--claims", "sdpo_order,iterative_vs_offline"]
    assert main([*command, "--out", str(out), "--page", str(target)]) == 0
    assert "sdpo_order: 3 of 3 done" in capsys.readouterr().out
    first = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
    assert set(first) == {"sdpo_order", "iterative_vs_offline"}
    arms = first["sdpo_order"]["arms"]
    assert [len(arm["curves"][0]) for arm in arms.values()] == [3, 3, 2]
    assert len({arm["curves"][0][0] for arm in arms.values()}) == 1  # the same start, by the same random streams
    for found in first.values():
        assert found["verdict"] == "not reproduced"  # one seed has no interval
    assert not list(out.glob("runs/*/round-*/5-policy/*.safetensors"))

    text = target.read_text(encoding="utf-8")
    assert "the figures mean nothing" in text
    assert str(worlds.ROOT) not in text
    # Several rounds of many prompts and one of all are not the same where there are only 40: the page must not hide it.
    assert text.count("**Unequal budgets**: updates") == 2
    assert "| DNPO goes on where SPIN stalls | not measured yet |" in text
    assert all(f"## {claim.title}\n" in text for claim in CLAIMS.values())

    assert main([*command, "--out", str(out), "--page", str(target)]) == 0
    assert "sdpo_order: 3 runs, 3 of them measured already" in capsys.readouterr().out
    again = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
    assert again["sdpo_order"]["arms"] == arms


def test_claims_whose_data_are_absent_are_skipped_by_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(worlds, "SHARED", tmp_path / "nothing")
    command = ["--claims", "sdpo_order", "--workers", "1", "--out", str(tmp_path), "--page", str(tmp_path / "x.md")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "sdpo_order: skipped, as ../shared/data has no opinion lexicon, stories260k" in said
    assert not any(tmp_path.iterdir())


def test_an_unknown_claim_is_refused(capsys):
    assert main(["--claims", "sdpo_ordre"]) == 2
    assert "sdpo_ordre unknown; choose from cofs_forgetting, curry_order" in capsys.readouterr().out


def test_the_best_rate_of_each_arm_is_taken_and_divergence_is_not(tmp_path):
    claim = replace(CLAIMS["iterative_vs_offline"], quality=Quality("", ("opinion",), "percent"))
    ends = {1e-4: [0.1, 0.3], 3e-5: [0.2, 0.1], 3e-4: [0.9, None]}
    for job in results.tuning_jobs(claim, Sizes()):
        end = ends[job.rate][Sizes().tuning_seeds.index(job.seed)]
        found = {"policies": [_scored(0.0), _scored(end)], "promoted": [True]} if end else {"diverged": "step 3"}
        folder = folder_of(job, tmp_path)
        folder.mkdir(parents=True)
        (folder / "measured.json").write_text(json.dumps(found), encoding="utf-8")
    rates, tuning = results.tune(claim, Sizes(), tmp_path)
    assert rates == {"iterative": 1e-4, "offline": 1e-4}
    assert tuning["offline"] == pytest.approx({"3e-05": 15.0, "0.0001": mean([10.0, 30.0]), "0.0003": None})


def _scored(value: float) -> dict[str, object]:
    return {"scores": {"opinion": [[value]]}}


def test_a_claim_without_runs_is_computed_and_shown(tmp_path, monkeypatch):
    claim = replace(CLAIMS["iterative_vs_offline"], exact="statistics:NormalDist")
    monkeypatch.setattr("statistics.NormalDist", lambda arm, seed: {"iterative": 2.0, "offline": 1.0}[arm] + seed / 10)
    entry = results.exact(claim, range(3), Sizes()) | {"runs": 0, "minutes": 0.0, "workers": 1}
    assert entry["comparisons"][0]["differences"] == [1.0, 1.0, 1.0]
    assert entry["verdict"] == "reproduced"
    target = tmp_path / "claims.md"
    page.store(target, "one", entry | {"date": "", "command": "", "machine": "", "versions": ""})
    page.write(target, {"one": claim}, Sizes())
    assert "| iterative | 2.1 [1.9, 2.3] |" in target.read_text(encoding="utf-8")


def test_the_page_says_where_a_description_has_changed_since():
    claim = next(iter(CLAIMS.values()))
    entry = {"claim": "another", "verdict": "reproduced"}
    assert page._verdict(claim, entry, Sizes()) == "**reproduced** (before its description changed)"
    assert page._verdict(claim, None, Sizes()) == "not measured yet"
