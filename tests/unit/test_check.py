"""`prefloop check` finds every fault of a deliberately bad data set, and nothing in a clean one."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from prefloop import cli
from prefloop.check.config import check_names
from prefloop.check.data import data_findings, data_warnings
from prefloop.check.finding import Finding, quantiles
from prefloop.check.judging import judge_findings
from prefloop.check.model import model_findings
from prefloop.check.space import disk_bytes, memory_bytes, shape_of
from prefloop.commands.check import policy_findings
from prefloop.components import build_parts
from prefloop.errors import ConfigError, JudgeError
from prefloop.inputs import embedded_policy
from prefloop.launch import read_recipe
from prefloop.loop import check_combination
from prefloop.models import causal_lm
from prefloop.protocols import RoundContext
from prefloop.recipe import Recipe
from prefloop.rows import Completion, Message, PolicyRef, Prompt, SampleGroup, TokenizedPair, Verdict
from tiny import save_tiny_policy, write_jsonl

OFFLINE = ["sampler.kind=given", "judge.kind=given", "eval_sampler.kind=hf", "eval_sampler.max_new_tokens=8"]
OFFLINE += ["eval_judge.kind=lexicon", "train.max_tokens=200", "prompts.holdout=0.5"]

HALF = ["prompts.holdout=0.5"]


def clean_rows(count: int = 60) -> list[dict[str, object]]:
    return [
        {"prompt": f"Story {i} begins", "chosen": f" well and ends {i} glad", "rejected": f" badly, all {i} of it sad"}
        for i in range(count)
    ]


def bad_rows() -> list[dict[str, object]]:
    """A clean data set with every fault added once or twice."""
    rows = clean_rows()
    rows += [{"prompt": f"same {i}", "chosen": " alike", "rejected": " alike"} for i in range(3)]  # identical
    rows += [{"prompt": "hollow", "chosen": "", "rejected": " full of words"}]  # empty
    rows += [{"prompt": "Story 1 begins", "chosen": " well and ends 1 glad", "rejected": " badly, all 1 of it sad"}]
    rows += [{"prompt": "Story 2 begins", "chosen": " badly, all 2 of it sad", "rejected": " well and ends 2 glad"}]
    rows += [{"prompt": "tied", "completions": [" one", " two"], "scores": [3, 3]}]
    rows += [{"prompt": f"long {i}", "chosen": " word" * 90, "rejected": " short"} for i in range(20)]
    rows += [{"prompt": "twice said", "chosen": "twice said and done", "rejected": " something else"}]
    rows += [{"prompt": "marks", "chosen": " an end<eos> within", "rejected": " none"}]
    rows += [{"prompt": f"STORY, {i} begins!", "chosen": f" as {i}", "rejected": f" so {i}"} for i in range(60)]
    answer = " the very same long answer that nobody gives twice by chance, or do they"
    rows += [{"prompt": f"copied {i}", "chosen": answer, "rejected": f" no {i}"} for i in range(12)]
    return rows


def offline(tmp_path: Path, rows: list[dict[str, object]], *more: str, policy: str = "embedded") -> Recipe:
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    return read_recipe("iterative_dpo", [f"policy={policy}", f"prompts={path}", *OFFLINE, *more])[0]


def by_name(findings) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def faults(findings) -> set[str]:
    return {finding.name for finding in findings if finding.severity != "info"}


IN_DATA = {
    "identical_pairs": 3,
    "empty_completions": 1,
    "duplicate_pairs": 1,
    "contradictory_pairs": 1,
    "duplicate_prompts": 2,
    "ties": 1,
    "prompt_repeated": 1,
    "length_gap": None,
    "overlap_holdout": None,
    "shared_answers": None,
}


def test_every_fault_of_a_bad_data_set_is_found_with_its_number(tmp_path):
    findings = list(data_findings(offline(tmp_path, bad_rows())))
    assert faults(findings) == set(IN_DATA)
    named = by_name(findings)
    assert {n: named[n].number for n, c in IN_DATA.items() if c is not None} == {n: c for n, c in IN_DATA.items() if c}
    for name in IN_DATA:
        assert named[name].advice
    assert "pairs.jsonl:61" in named["identical_pairs"].examples[0]
    assert "pairs.jsonl:66" in named["contradictory_pairs"].examples[0]


def test_nothing_is_found_in_a_clean_data_set(tmp_path):
    recipe = offline(tmp_path, clean_rows())
    assert faults(data_findings(recipe)) == set()
    assert faults(policy_findings(recipe, tmp_path, check_combination)) == set()
    assert data_warnings(recipe) == []


def test_nothing_is_found_in_what_prefloop_ships(tmp_path):
    recipe, _ = read_recipe("iterative_dpo", [])
    assert faults(data_findings(recipe)) == set()
    findings = list(policy_findings(recipe, tmp_path, check_combination))
    assert faults(findings) == set()
    named = by_name(findings)
    assert named["step_0"].number == pytest.approx(0.693147, abs=1e-4)
    assert named["sampler_gap"].number < 1e-4
    assert named["judge_order_flips"].number == 0


def test_the_tokens_of_a_bad_data_set(tmp_path):
    policy = save_tiny_policy(tmp_path / "model")
    findings = list(
        policy_findings(offline(tmp_path, bad_rows(), policy=str(policy)), tmp_path, check_combination, False)
    )
    found = by_name(findings)
    assert faults(findings) == {"special_tokens_in_text", "end_tokens", "dropped_too_long", "positions"}
    assert found["dropped_too_long"].number == 20
    assert found["special_tokens_in_text"].number == 1
    examples = [f for f in findings if f.name == "example"]
    assert len(examples) == 3
    assert examples[0].examples[0] == "prompt      <bos>|" + "|".join("Story 0 begins")
    assert examples[0].examples[1].endswith("|d|<eos>")


def test_a_prompt_that_merges_with_its_completion_is_found(tmp_path):
    rows = [{"prompt": f"The {i} happy d", "chosen": "og ran", "rejected": "uck swam"} for i in range(60)]
    findings = list(policy_findings(offline(tmp_path, rows), tmp_path, check_combination, forward=False))
    assert faults(findings) == {"prompt_prefix"}
    assert by_name(findings)["prompt_prefix"].number == 60


def test_conversations_with_different_prompts_are_an_error(tmp_path):
    def turns(question: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    rows = [{"chosen": turns(f"q {i}", "yes"), "rejected": turns(f"q {i}", "no")} for i in range(60)]
    assert "different_prompts" not in faults(data_findings(offline(tmp_path, rows)))
    rows[7] = {"chosen": turns("q 7", "yes"), "rejected": turns("another", "no")}
    found = by_name(data_findings(offline(tmp_path, rows)))
    assert found["different_prompts"].severity == "error"
    assert "pairs.jsonl:8" in found["different_prompts"].examples[0]


def test_contradictory_labels_of_unpaired_rows(tmp_path):
    rows = [{"prompt": f"p {i}", "completion": f" c {i}", "label": True} for i in range(60)]
    assert faults(data_findings(offline(tmp_path, rows))) == set()
    rows.append({"prompt": "p 3", "completion": " c 3", "label": False})
    assert faults(data_findings(offline(tmp_path, rows))) == {"contradictory_pairs"}


def test_unreadable_rows_are_all_listed(tmp_path):
    rows = clean_rows()
    rows[4]["chosen"], rows[9]["prompt"] = 7, None
    found = by_name(data_findings(offline(tmp_path, rows)))
    assert found["unreadable_rows"].severity == "error"
    assert found["unreadable_rows"].number == 2


def test_an_evaluation_set_that_is_trained_on(tmp_path):
    recipe = offline(tmp_path, clean_rows())
    other = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": f"story {i} Begins."} for i in range(0, 120, 2)])
    found = by_name(data_findings(recipe, [other]))
    trained = found["overlap_evaluation"].number
    assert 0 < trained <= 30
    assert faults(data_findings(recipe, [write_jsonl(tmp_path / "new.jsonl", [{"prompt": "none of it"}])])) == set()


def test_pairs_that_are_not_trained_on_are_no_warning(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"p {i}", "chosen": "a", "rejected": "a"} for i in range(60)])
    recipe, _ = read_recipe("iterative_dpo", ["policy=embedded", f"prompts={path}", "judge.kind=lexicon", *HALF])
    assert faults(data_findings(recipe)) == set()
    assert by_name(data_findings(recipe))["identical_pairs"].number == 60


@pytest.mark.parametrize(
    ("settings", "words"),
    [(["loss.betta=1"], "did you mean beta"), (["judge.kind=lexicn"], "lexicon"), (["sampler.kind=./x.py:A"], "x.py")],
)
def test_settings_are_looked_up_without_importing_them(settings, words):
    recipe, _ = read_recipe("iterative_dpo", settings)
    with pytest.raises(ConfigError, match=words):
        check_names(recipe)


def test_data_only_imports_no_torch():
    code = "import sys; from prefloop import cli; cli.main(); assert False"
    script = f"import sys; sys.argv = ['prefloop', 'check', 'iterative_dpo', '--data-only']\ntry:\n    {code[12:]}\n"
    script += "except SystemExit as end:\n    assert not end.code\nassert 'torch' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)


@pytest.fixture
def call(monkeypatch, capsys):
    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["prefloop", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_strict_fails_on_warnings(call, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", bad_rows())
    arguments = ["check", "iterative_dpo", "policy=embedded", f"prompts={path}", *OFFLINE, "--data-only"]
    code, text = call(*arguments)
    assert (code, "WARNING identical_pairs" in text) == (0, True)
    code, text = call(*arguments, "--strict")
    assert code == 3
    assert "identical_pairs" in text.splitlines()[-1]


def group(prompt: str, *texts: str) -> SampleGroup:
    completions = tuple(Completion(f"{prompt}/{t}", t, None, None, "stop", 0, "x") for t in texts)
    asked = Prompt(prompt, (Message("text", prompt),), None, "train", "here")
    return SampleGroup(asked, completions, "x", 0, 1.0, 1.0)


@dataclass
class PlaceJudge:
    """Prefers what it sees first in some groups; in the others the longer text."""

    by_place: set[str] = field(default_factory=set)

    def __call__(self, groups, context):
        verdicts = []
        for one in groups:
            first, second = one.completions
            wins = one.prompt.prompt_id in self.by_place or len(first.text) > len(second.text)
            verdicts.append(Verdict((float(wins), float(not wins)), (None, None)))
        return verdicts


class DeadJudge:
    def __call__(self, groups, context):
        raise JudgeError("judge: no answer from http://127.0.0.1:9")


CONTEXT = RoundContext(0, 0, PolicyRef("x", "x", -1), PolicyRef("x", "x", -1))


@pytest.mark.parametrize("flipping", [0, 3, 12, 20])
def test_the_order_flip_rate_is_counted(flipping):
    groups = [group(f"p{i}", "short", "longer one") for i in range(20)]
    found = by_name(judge_findings("judge", PlaceJudge({f"p{i}" for i in range(flipping)}), groups, CONTEXT))
    assert found["judge_order_flips"].number == flipping / 20
    assert (found["judge_order_flips"].severity == "warning") == (flipping > 5)


def test_a_judge_that_cannot_be_reached_is_an_error():
    (finding,) = judge_findings("judge", DeadJudge(), [group("p", "a", "b")], CONTEXT)
    assert (finding.name, finding.severity) == ("judge_reachable", "error")


def test_a_sampler_with_other_log_probs_is_found():
    recipe, _ = read_recipe("iterative_dpo", [])
    folder = str(embedded_policy())
    wrong = TokenizedPair("p", (1, 40, 50), (60, 70), (80, 90, 100), (-1.0, -1.0), (-1.0,) * 3, None, 1.0)
    found = by_name(model_findings(recipe, build_parts(recipe), folder, [wrong]))
    assert found["sampler_gap"].severity == "warning"
    assert found["sampler_gap"].number > 0.5


def test_sizes_agree_with_the_model_itself():
    folder = embedded_policy()
    shape = shape_of(folder)
    model = causal_lm.load(str(folder)).model
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.layers, shape.hidden) == (model.config.num_hidden_layers, model.config.hidden_size)
    recipe, _ = read_recipe("iterative_dpo", [])
    assert memory_bytes(recipe, shape, 100) > 16 * shape.parameters
    assert disk_bytes(recipe, shape, 256, 80, 121) > 3 * 4 * shape.parameters


def test_quantiles_by_nearest_rank():
    assert quantiles(list(range(101))) == "min 0 · 25 % 25 · median 50 · 75 % 75 · 95 % 95 · max 100"


def test_a_run_notes_the_cheap_warnings(tmp_path):
    warnings = data_warnings(offline(tmp_path, bad_rows()))
    assert any("same text on both sides" in w and "pairs.jsonl:61" in w for w in warnings)
    assert json.dumps(warnings)
