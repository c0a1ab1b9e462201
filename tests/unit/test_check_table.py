"""One deliberately bad data set, model and judge with every fault that `prefloop check` is for; and clean ones.

The three tables are what is promised: fault → finding.
"""

import json
import shutil
from pathlib import Path

import pytest

from prefloop.check.data import data_findings
from prefloop.check.model import model_findings
from prefloop.commands.check import policy_findings
from prefloop.components import build_parts
from prefloop.inputs import embedded_policy
from prefloop.launch import read_recipe
from prefloop.loop import check_combination
from prefloop.rows import TokenizedPair
from tiny import write_jsonl

GIVEN = ["sampler.kind=given", "judge.kind=given", "eval_sampler.kind=hf", "eval_sampler.max_new_tokens=8"]
GIVEN += ["eval_judge.kind=lexicon", "train.max_tokens=200", "prompts.holdout=0.5"]

IN_DATA = {
    "a setting that its part does not have": "configuration",
    "rows without a prompt, and with a number for a completion": "unreadable_rows",
    "chosen and rejected under different prompts": "different_prompts",
    "the same text on both sides": "identical_pairs",
    "nothing on one side": "empty_completions",
    "one side missing": "half_pairs",
    "a pair that stands there twice": "duplicate_pairs",
    "a pair that says the opposite of another": "contradictory_pairs",
    "a prompt in several rows": "duplicate_prompts",
    "completions with equal scores": "ties",
    "a completion that begins with its prompt": "prompt_repeated",
    "chosen far longer than rejected": "length_gap",
    "a held-out prompt that is a training prompt in capitals": "overlap_holdout",
    "an answer that training and held-out prompts share": "shared_answers",
    "an evaluation set that is trained on": "overlap_evaluation",
}
IN_TOKENS = {
    "a prompt that writes the beginning token": "beginning_tokens",
    "conversations without a beginning token beside texts with one": "beginning_tokens_differ",
    "a completion that writes the end token": "end_tokens",
    "role markers and special tokens inside data": "special_tokens_in_text",
    "prompts that merge with their completions": "prompt_prefix",
    "pairs longer than training takes": "dropped_too_long",
    "prompts longer than the model's positions": "positions",
    "a microbatch that memory does not hold": "memory",
    "rounds that the disk does not hold": "disk",
}
IN_MODEL = {
    "a sampler whose log-probs are not the trainer's": "sampler_gap",
    "a judge that goes by the place": "judge_order_flips",
    "a judge that leaves completions without a score": "judge_silent",
}
REACHED = {
    "a judge that cannot be reached": "judge_reachable",
    "a judge that finds everything equal": "judge_ties",
    "a reference that the loss needs and the recipe leaves out": "stopped",
    "a policy that is not its reference at step 0": "step_0",
}


def clean_rows():
    return [
        {"prompt": f"Story {i} begins", "chosen": f" well and ends {i} glad", "rejected": f" badly, all {i} of it sad"}
        for i in range(60)
    ]


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def bad_rows():
    """A clean data set with every fault of `IN_DATA` and `IN_TOKENS` put in that a row can hold."""
    rows = clean_rows()
    rows += [{"prompt": f"same {i}", "chosen": " alike", "rejected": " alike"} for i in range(3)]
    rows += [{"prompt": "half", "chosen": " whole", "rejected": None}]
    rows += [{"prompt": "hollow", "chosen": "", "rejected": " full of words"}]
    rows += [{"prompt": "Story 1 begins", "chosen": " well and ends 1 glad", "rejected": " badly, all 1 of it sad"}]
    rows += [{"prompt": "Story 2 begins", "chosen": " badly, all 2 of it sad", "rejected": " well and ends 2 glad"}]
    rows += [{"prompt": "tied", "completions": [" one", " two"], "scores": [3, 3]}]
    rows += [{"prompt": f"long {i}", "chosen": " word" * 300, "rejected": " short"} for i in range(20)]
    rows += [{"prompt": "very long " * 300, "chosen": " yes", "rejected": " no"}]
    rows += [{"prompt": "twice said", "chosen": "twice said and done", "rejected": " something else"}]
    rows += [{"prompt": "<s><s> marks", "chosen": " an end</s> within", "rejected": " none <pad>"}]
    rows += [{"prompt": f"The {i} happy d", "chosen": "og ran", "rejected": "uck swam"} for i in range(60)]
    talks = [[{"role": "user", "content": f"talk {i}"}] for i in range(9)]
    rows += [{"prompt": talk, "chosen": " yes", "rejected": " no"} for talk in talks]
    rows += [{"prompt": f"STORY, {i} begins!", "chosen": f" as {i}", "rejected": f" so {i}"} for i in range(60)]
    answer = " the very same long answer that nobody gives twice by chance, or do they"
    rows += [{"prompt": f"copied {i}", "chosen": answer, "rejected": f" no {i}"} for i in range(12)]
    return rows


def refused_rows():
    """Rows that stop the reader."""
    return [
        {"chosen": turns("q", "yes"), "rejected": turns("another", "no")},
        {"chosen": " without a prompt", "rejected": " too"},
        {"prompt": "number", "chosen": 7, "rejected": " seven"},
        {"prompt": "infinite", "completions": [" a", " b"], "scores": [float("inf"), 1]},
    ]


def faults(findings):
    return {finding.name for finding in findings if finding.severity != "info"}


def recipe_of(tmp_path, rows, *more, policy="embedded"):
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    return read_recipe("iterative_dpo", [f"policy={policy}", f"prompts={path}", *GIVEN, *more])[0]


def found_all(table, findings):
    """Every fault of the table is found as what it says, with a number or an example, and with what to do."""
    found = [f for f in findings if f.severity != "info"]
    assert set(table.values()) <= {f.name for f in found}
    for finding in found:
        assert finding.advice, finding.name


def test_every_fault_of_the_data_is_found(tmp_path):
    recipe = recipe_of(tmp_path, bad_rows() + refused_rows(), "loss.betta=1")
    against = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": f"story {i} Begins."} for i in range(60)])
    findings = list(data_findings(recipe, [against]))
    found_all(IN_DATA, findings)
    assert faults(findings) == set(IN_DATA.values())
    number = {f.name: f.number for f in findings}
    assert (number["unreadable_rows"], number["different_prompts"], number["identical_pairs"]) == (3, 1, 3)


def talking_model(tmp_path):
    """The story model with a chat template that forgets the beginning token."""
    folder = tmp_path / "model"
    shutil.copytree(embedded_policy(), folder)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = folder / name
        if path.is_file() and name.endswith(".jinja"):
            path.unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_every_fault_of_the_tokens_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("prefloop.check.space._free_disk", lambda out: 2**30)
    huge = ["train.tokens_per_microbatch=1000000000", "rounds=1000"]
    recipe = recipe_of(tmp_path, bad_rows(), *huge, policy=str(talking_model(tmp_path)))
    findings = list(policy_findings(recipe, tmp_path, check_combination, forward=False))
    found_all(IN_TOKENS, findings)
    assert faults(findings) == set(IN_TOKENS.values())
    examples = [f for f in findings if f.name == "example"]
    assert examples[0].examples[0].startswith("prompt      <s>|")
    assert len(examples) == 3


SAMPLER = """
import dataclasses
from dataclasses import dataclass
from prefloop.sample.hf import Hf
@dataclass(frozen=True)
class Off:
    completions: int = 2
    max_new_tokens: int = 8
    @property
    def temperature(self): return 1.0
    @property
    def top_p(self): return 1.0
    def __call__(self, prompts, context):
        made = Hf(completions=self.completions, max_new_tokens=self.max_new_tokens)(prompts, context)
        off = lambda c: dataclasses.replace(c, sampler_logps=tuple(x - 0.5 for x in c.sampler_logps))
        return [dataclasses.replace(g, completions=tuple(map(off, g.completions))) for g in made]
"""
JUDGE = """
from dataclasses import dataclass
from prefloop.errors import JudgeError
from prefloop.rows import Verdict
@dataclass(frozen=True)
class ByPlace:
    def __call__(self, groups, context):
        silent = lambda n, g: Verdict((None,) * len(g.completions), ("no words",) * len(g.completions))
        first = lambda g: Verdict(tuple(float(-i) for i in range(len(g.completions))), (None,) * len(g.completions))
        return [silent(n, g) if n % 4 == 0 else first(g) for n, g in enumerate(groups)]
@dataclass(frozen=True)
class Equal:
    def __call__(self, groups, context):
        return [Verdict((1.0,) * len(g.completions), (None,) * len(g.completions)) for g in groups]
@dataclass(frozen=True)
class Dead:
    def __call__(self, groups, context):
        raise JudgeError("judge: no answer from http://127.0.0.1:9")
"""


@pytest.fixture
def own_parts(tmp_path):
    (tmp_path / "off.py").write_text(SAMPLER)
    (tmp_path / "judge.py").write_text(JUDGE)
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"Once upon a time, {i}"} for i in range(60)])

    def checked(sampler, judge, *more):
        settings = ["policy=embedded", f"prompts={prompts}", "sampler.max_new_tokens=8", "prompts.holdout=0.5", *more]
        settings += [f"sampler.kind={tmp_path}/off.py:Off"] if sampler else []
        recipe, _ = read_recipe("iterative_dpo", [*settings, f"judge.kind={judge}"])
        return list(policy_findings(recipe, tmp_path, check_combination))

    return checked


def test_every_fault_of_sampler_and_judge_is_found(own_parts, tmp_path):
    findings = own_parts(True, f"{tmp_path}/judge.py:ByPlace")
    found_all(IN_MODEL, findings)
    assert faults(findings) == set(IN_MODEL.values())


def test_what_stops_or_spoils_a_run_is_found(own_parts, tmp_path):
    named = set()
    for judge in ("Dead", "Equal"):
        found = faults(own_parts(False, f"{tmp_path}/judge.py:{judge}"))
        assert len(found) == 1
        named |= found
    named |= faults(own_parts(False, "lexicon", "reference=none"))
    named |= off_at_step_0()
    assert named == set(REACHED.values())


def off_at_step_0():
    """Pairs whose reference log-probs are those of another model."""
    recipe, _ = read_recipe("iterative_dpo", [])
    pair = TokenizedPair("p", (1, 40, 50), (60, 70), (80, 90, 100), (-9.0, -9.0), (-1.0,) * 3, None, 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prefloop.check.model.score_reference", lambda model, pairs, *_: pairs)
        found = list(model_findings(recipe, build_parts(recipe), str(embedded_policy()), [pair]))
    return faults(f for f in found if f.name == "step_0")


def test_nothing_is_found_in_clean_data_with_a_clean_model_and_judge(own_parts, tmp_path):
    recipe = recipe_of(tmp_path, clean_rows())
    against = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": f"Nobody asked {i}"} for i in range(20)])
    assert faults(data_findings(recipe, [against])) == set()
    assert faults(policy_findings(recipe, tmp_path, check_combination)) == set()
    assert faults(own_parts(False, "lexicon")) == set()


def test_the_page_names_every_finding():
    page = Path(__file__).parents[2].joinpath("docs", "check.md").read_text(encoding="utf-8")
    for name in {**IN_DATA, **IN_TOKENS, **IN_MODEL, **REACHED}.values():
        assert f"`{name}`" in page or name == "stopped", name
