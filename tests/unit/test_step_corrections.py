"""The corrector of Step-DPO on planted errors: locators, resampling, and going on from within a completion."""

import json
import re
from dataclasses import dataclass, field, replace

import pytest

from prefloop.correct.steps import Steps
from prefloop.errors import ConfigError, SamplerError
from prefloop.inputs import embedded_policy, embedded_prompts
from prefloop.judge.llm import Llm
from prefloop.judge.sums import Sums, first_wrong_step, solution_lines, steps
from prefloop.judge.sums_steps import SumsSteps
from prefloop.judge.verifier import Verifier
from prefloop.models.causal_lm import encode_completion, folder_digest, load, load_tokenizer
from prefloop.protocols import CorrectionTools, RoundContext, Start
from prefloop.rows import VERBATIM, Completion, JudgedGroup, Message, PolicyRef, Prompt, SampleGroup, Verdict, prompt_id
from prefloop.sample.hf import Hf
from scripted_endpoint import ScriptedEndpoint, in_form, material

FOLDER = embedded_policy("embedded-sums")
TOKENIZER = load_tokenizer(FOLDER)
POLICY = PolicyRef(str(FOLDER), folder_digest(FOLDER), -1)
CONTEXT = RoundContext(seed=3, round=0, policy=POLICY, start=POLICY)
LINES = embedded_prompts("embedded-sums").read_text(encoding="utf-8").splitlines()
ROWS = [json.loads(line) for line in LINES[:12]]


def prompt_of(row):
    messages = (Message(VERBATIM, row["prompt"]),)
    return Prompt(prompt_id(messages), messages, row["gold"], "train", "test:1")


def completion_of(name, text, ended=True):
    ids = tuple(encode_completion(TOKENIZER, text, stop=ended))
    return Completion(name, text, ids, (-0.5,) * len(ids), "stop" if ended else "length", 0, POLICY.digest)


def plant(row, number):
    """The right solution with the result of line `number` off by one and other results after it."""
    lines = solution_lines(row["prompt"])
    text = "\n".join([*lines[: number - 1], re.sub(r"\d+$", lambda m: str((int(m[0]) + 1) % 100), lines[number - 1])])
    rest = lines[number:]
    return text + "".join(f"\n{re.sub(r'[0-9]+$', '0', line)}" for line in rest)


def group_of(row, *texts, scores=None):
    prompt = prompt_of(row)
    completions = tuple(completion_of(f"{prompt.prompt_id}/{i}", text) for i, text in enumerate(texts))
    (verdict,) = Sums()([SampleGroup(prompt, completions, "p", 0, 1.0, 1.0)], CONTEXT)
    scores = verdict.scores if scores is None else scores
    return JudgedGroup(prompt, completions, "p", 0, 1.0, 1.0, scores, None, "sums", (None,) * len(texts))


@dataclass
class Scripted:
    """Goes on rightly after right steps, every `every`-th time only, and wrongly else; notes what it was asked."""

    every: int = 1
    asked: list = field(default_factory=list)
    count: int = 0

    def go_on(self, starts, context):
        self.asked.append(starts)
        return [tuple(self._one(start, seed) for seed in start.seeds) for start in starts]

    def _one(self, start, seed):
        self.count += 1
        before = TOKENIZER.decode(list(start.token_ids))
        done = len(steps(before))
        lines = solution_lines(start.prompt.text)
        wrong = first_wrong_step(start.prompt.text, before)
        if (wrong is None or wrong > done) and self.count % self.every == 0:
            rest = "\n".join(lines[done:])
        else:
            rest = "\n".join(re.sub(r"\d+$", "1", line) for line in lines[done:]) or "Answer: 1"
        ids = (*start.token_ids, *encode_completion(TOKENIZER, rest, stop=True))
        return Completion(f"s{seed}", before + rest, ids, (-0.5,) * len(ids), "stop", seed, POLICY.digest)


def correct(groups, locator=None, sampler=None, **settings):
    sampler = sampler or Scripted()
    return Steps(**settings)(groups, CorrectionTools(sampler, Sums(), locator), CONTEXT), sampler


PLANTED = [(row, number) for row in ROWS for number in range(1, len(solution_lines(row["prompt"])) + 1)]


@pytest.mark.parametrize("locator", [SumsSteps(), None], ids=["judge", "continuations"])
def test_every_planted_error_is_located_and_corrected_from_there(locator):
    groups = [group_of(row, plant(row, number)) for row, number in PLANTED]
    found, _ = correct(groups, locator, continuations=2)
    for (row, number), group in zip(PLANTED, found, strict=True):
        assert first_wrong_step(row["prompt"], group.completions[0].text) == number
        assert group.solutions[0].first_wrong == number
        corrected = group.completions[1:]
        assert [completion.text for completion in corrected] == [row["gold"]]
        assert group.scores == (0.0, 1.0)
        kept = sum(step.tokens for step in group.solutions[0].steps[: number - 1])
        assert corrected[0].token_ids[:kept] == group.completions[0].token_ids[:kept]
        assert group.solutions[1].steps[: number - 1] == group.solutions[0].steps[: number - 1]
        for completion, solution in zip(group.completions, group.solutions, strict=True):
            assert "".join(step.text for step in solution.steps) == completion.text
            assert sum(step.tokens for step in solution.steps) == len(completion.token_ids) - 1


def test_continuations_that_located_a_step_are_used_and_not_drawn_again():
    row = ROWS[0]
    found, sampler = correct([group_of(row, plant(row, 3))], continuations=2)
    assert len(found[0].completions) == 2
    assert [len(TOKENIZER.decode(list(starts[0].token_ids)).splitlines()) for starts in sampler.asked] == [1, 2, 3]


def test_a_step_is_wrong_only_if_no_continuation_is_right():
    """Every third draw from a right beginning is right: two may miss it and three cannot."""
    row = ROWS[0]
    group = group_of(row, plant(row, 3))
    assert correct([group], sampler=Scripted(every=3), continuations=3)[0][0].solutions[0].first_wrong == 3
    assert correct([group], sampler=Scripted(every=3), continuations=2)[0][0].solutions[0].first_wrong == 1


def test_drawing_stops_at_the_first_right_one_and_at_the_limit():
    row = ROWS[1]
    group = group_of(row, plant(row, 2))
    found, sampler = correct([group], SumsSteps(), Scripted(every=6), tries=20, tries_at_once=4)
    assert (sampler.count, len(found[0].completions)) == (8, 2)
    found, sampler = correct([group], SumsSteps(), Scripted(every=100), tries=7, tries_at_once=4)
    assert (sampler.count, len(found[0].completions)) == (7, 1)
    assert found[0].solutions[0].first_wrong == 2
    seeds = [seed for starts in sampler.asked for start in starts for seed in start.seeds]
    assert len(set(seeds)) == 7


def test_a_right_sample_with_the_same_beginning_serves_and_nothing_is_drawn():
    row = ROWS[2]
    found, sampler = correct([group_of(row, plant(row, 2), row["gold"])], SumsSteps())
    assert sampler.count == 0
    assert [s.first_wrong for s in found[0].solutions] == [2, None]
    assert found[0].completions[1].text == row["gold"]


def test_only_so_many_wrong_solutions_equal_ones_once():
    row = ROWS[3]
    texts = [plant(row, 2), plant(row, 2), plant(row, 3), plant(row, 1)]
    for limit, expected in ((1, [2, None, None, None]), (2, [2, None, 3, None]), (None, [2, None, 3, 1])):
        found, _ = correct([group_of(row, *texts)], SumsSteps(), per_prompt=limit)
        assert [s.first_wrong for s in found[0].solutions[:4]] == expected


def test_no_verdict_no_wrong_step_and_a_cut_step_are_left_alone():
    row = ROWS[4]
    unscored = group_of(row, plant(row, 2), scores=(None,))
    right_steps = group_of(row, row["gold"], scores=(0.0,))
    cut = group_of(row, plant(row, 2))
    tail = completion_of("cut", plant(row, 2)[: plant(row, 2).index("=", plant(row, 2).index("Step 2"))], ended=False)
    cut = replace(cut, completions=(tail,))
    without_ids = replace(unscored, completions=(replace(tail, token_ids=None),), scores=(0.0,))
    found, sampler = correct([unscored, right_steps, cut, without_ids], SumsSteps())
    assert sampler.count == 0
    assert [group.solutions[0].first_wrong for group in found] == [None] * 4
    assert [len(group.solutions[0].steps) for group in found[2:]] == [1, 0]


@dataclass
class Silent:
    """A locator without a verdict on beginnings of more than one line."""

    def __call__(self, groups, context):
        return [Verdict((1.0 if len(steps(g.completions[0].text)) < 2 else None,), ("?",)) for g in groups]


def test_a_locator_without_verdict_leaves_the_solution_out():
    row = ROWS[5]
    found, sampler = correct([group_of(row, plant(row, 3))], Silent())
    assert (found[0].solutions[0].first_wrong, sampler.count) == (None, 0)


def test_a_right_answer_by_a_wrong_step_is_left_out_where_the_step_is_checked():
    row = ROWS[6]
    lucky = "\n".join([*plant(row, 2).split("\n")[:-1], row["gold"].split("\n")[-1]]).replace("Step 2: ", "Step 2:  1")
    assert (first_wrong_step(row["prompt"], lucky), Sums()([group_of(row, lucky)], CONTEXT)[0].scores) == (2, (1.0,))
    group = group_of(row, plant(row, 2), lucky)
    for check, firsts, drawn in ((False, [2, None], 0), (True, [2, 2, None], 4)):
        found, sampler = correct([group], SumsSteps(), check=check)
        assert [s.first_wrong for s in found[0].solutions] == firsts
        assert sampler.count == drawn
    with pytest.raises(ConfigError, match=r"corrector\.check: asks the locator"):
        correct([group], None, check=True)


def test_a_model_behind_an_endpoint_locates_as_the_exact_judge_does(tmp_path):
    def script(request, number):
        texts = material(request)
        assert texts["REFERENCE ANSWER"] in {row["gold"] for row in ROWS}
        wrong = first_wrong_step(texts["PROMPT"], texts["COMPLETION"])
        return in_form(request, int(wrong is None or wrong > len(steps(texts["COMPLETION"]))))

    planted = PLANTED[:20]
    groups = [group_of(row, plant(row, number)) for row, number in planted]
    with ScriptedEndpoint(script) as endpoint:
        found, _ = correct(groups, Llm("judge", base_url=endpoint.url, template="step"))
    assert [group.solutions[0].first_wrong for group in found] == [number for _, number in planted]
    # Prompts with several planted errors share their right beginnings, which are asked about once.
    asked = {"".join(steps(plant(row, number))[:depth]) for row, number in planted for depth in range(1, number + 1)}
    assert len(endpoint.requests) == len(asked) < sum(number for _, number in planted)


@dataclass
class Numbers:
    """Ends with the right number after one step, and with a wrong one after two."""

    def go_on(self, starts, context):
        return [tuple(self._one(start, seed) for seed in start.seeds) for start in starts]

    def _one(self, start, seed):
        before = TOKENIZER.decode(list(start.token_ids))
        text = "Answer: 1" if "Step 2" in before else "Answer: 35"
        ids = (*start.token_ids, *encode_completion(TOKENIZER, text, stop=True))
        return Completion(str(seed), before + text, ids, None, "stop", seed, "p")


def test_a_verifier_of_numbers_and_labelled_steps_serve_as_well():
    group = group_of(ROWS[0], "Step 1: 2\nStep 2: 3\nAnswer: 25", scores=(0.0,))
    group = replace(group, prompt=replace(group.prompt, gold="He has 27+8=35.\n#### 35"))
    tools = CorrectionTools(Numbers(), Verifier("number"), None)
    (found,) = Steps(split="labels", continuations=1)([group], tools, CONTEXT)
    assert [step.text for step in found.solutions[0].steps] == ["Step 1: 2\n", "Step 2: 3\nAnswer: 25"]
    assert found.solutions[0].first_wrong == 2
    assert found.completions[1].text == "Step 1: 2\nAnswer: 35"


@pytest.mark.parametrize(
    "settings",
    [{"tries": 0}, {"tries_at_once": 0}, {"continuations": 0}, {"per_prompt": 0}, {"right_above": float("nan")}],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=rf"corrector\.{next(iter(settings))}: must be"):
        Steps(**settings)


def test_going_on_from_within_a_greedy_completion_gives_the_same_completion():
    prompts = [prompt_of(row) for row in ROWS[:4]]
    sampler = Hf(completions=1, max_new_tokens=80, temperature=0.0)
    whole = [group.completions[0] for group in sampler(prompts, CONTEXT)]
    starts = [
        Start(prompt, one.token_ids[:cut], one.sampler_logps[:cut], (1, 2))
        for prompt, one, cut in zip(prompts, whole, (0, 7, 11, 20), strict=True)
    ]
    for one, some in zip(whole, sampler.go_on(starts, CONTEXT), strict=True):
        for again in some:
            assert (again.token_ids, again.text, again.finish_reason) == (one.token_ids, one.text, "stop")
            assert again.sampler_logps == pytest.approx(one.sampler_logps, abs=1e-4)
        assert some[0].completion_id != some[1].completion_id


def test_what_goes_on_depends_on_its_seed_alone():
    prompts = [prompt_of(row) for row in ROWS[:3]]
    sampler = Hf(completions=1, max_new_tokens=80)
    cut = encode_completion(TOKENIZER, solution_lines(prompts[0].text)[0] + "\n", stop=False)
    starts = [Start(prompts[0], tuple(cut), None, (11, 12, 13)), Start(prompts[1], (), None, (11,))]
    first, second = sampler.go_on(starts, CONTEXT)
    assert sampler.go_on([replace(starts[0], seeds=(13,))], CONTEXT)[0][0].token_ids == first[2].token_ids
    assert [c.token_ids[: len(cut)] for c in first] == [tuple(cut)] * 3
    assert first[0].sampler_logps is None
    assert second[0].seed == 11
    assert load(POLICY.path).stop_ids
    assert sampler.go_on([], CONTEXT) == []
    with pytest.raises(SamplerError, match="cannot go on after"):
        replace(sampler, max_new_tokens=len(cut)).go_on(starts[:1], CONTEXT)
