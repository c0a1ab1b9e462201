"""Every bad input gives one clear message, the exit code of the design, and nothing half-written."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from prefloop import cli
from prefloop.inputs import embedded_policy
from tiny import save_tiny_policy, write_jsonl

SMALL = [
    "prompts_per_round=24",
    "sampler.completions=2",
    "sampler.max_new_tokens=8",
    "evaluate.prompts=20",
    "judge.kind=lexicon",
    "rounds=1",
    "train.learning_rate=1e-4",
    "prompts.holdout=0.5",
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"One day {i} birds sang"} for i in range(80)])


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["prefloop", *map(str, arguments)])
        monkeypatch.setattr(cli.errors, "width", 10_000)
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capsys.readouterr().err

    return run


def run_arguments(policy, prompts, out, *more):
    return ["run", "iterative_dpo", f"policy={policy}", f"prompts={prompts}", *SMALL, *more, "--out", out]


def damaged_policy(folder: Path, fault: str) -> Path:
    shutil.copytree(embedded_policy(), folder)
    if fault == "no weights":
        (folder / "model.safetensors").unlink()
    elif fault == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif fault == "no config":
        (folder / "config.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("fault", "words"),
    [("no weights", "safetensors"), ("no tokenizer", "tokenizer"), ("no config", "config.json")],
)
def test_incomplete_model_folder(call, prompts, tmp_path, fault, words):
    policy = damaged_policy(tmp_path / "model", fault)
    code, message = call(*run_arguments(policy, prompts, tmp_path / "out"))
    assert code == 3
    assert words in message
    assert str(policy) in message
    assert not (tmp_path / "out").exists()


def test_missing_model_folder(call, prompts, tmp_path):
    code, message = call(*run_arguments(tmp_path / "nowhere", prompts, tmp_path / "out"))
    assert code == 2
    assert "nowhere" in message
    assert not (tmp_path / "out").exists()


def test_conversation_without_a_chat_template(call, tmp_path):
    policy = save_tiny_policy(tmp_path / "model", chat=False)
    rows = [{"prompt": [{"role": "user", "content": f"hello {i}"}]} for i in range(80)]
    code, message = call(*run_arguments(policy, write_jsonl(tmp_path / "p.jsonl", rows), tmp_path / "out"))
    assert code == 3
    assert "chat template" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no prompts"),
        ('{"prompt": "a"}\n{"prompt": \n', ":2"),
        ('{"prompt": "a"}\n{"question": "b"}\n', ":2"),
        ('{"prompt": "a"}\n[1]\n', ":2"),
        ('{"prompt": "a"}\n{"prompt": 3}\n', ":2"),
    ],
)
def test_malformed_prompts_name_the_line(call, tmp_path, content, words):
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    code, message = call(*run_arguments("embedded", path, tmp_path / "out"))
    assert code == 3
    assert str(path) in message
    assert words in message
    assert not (tmp_path / "out").exists()


def test_missing_prompt_file(call, tmp_path):
    code, message = call(*run_arguments("embedded", tmp_path / "none.jsonl", tmp_path / "out"))
    assert code == 2
    assert "none.jsonl" in message


def test_too_few_prompts_for_the_holdout(call, tmp_path):
    path = write_jsonl(tmp_path / "few.jsonl", [{"prompt": f"p {i}"} for i in range(12)])
    code, message = call(*run_arguments("embedded", path, tmp_path / "out"))
    assert code == 3
    assert "prompts.holdout" in message
    assert not (tmp_path / "out").exists()


def test_duplicate_prompts_are_counted_and_shown(call, tmp_path):
    rows = [{"prompt": f"One day {i % 60} birds sang"} for i in range(80)]
    path = write_jsonl(tmp_path / "twice.jsonl", rows)
    code, _ = call(*run_arguments("embedded", path, tmp_path / "out"))
    assert code == 0
    warnings = json.loads((tmp_path / "out" / "summary.json").read_text())["warnings"]
    assert any("20 duplicate" in warning for warning in warnings)


def judge_file(tmp_path: Path, body: str) -> str:
    path = tmp_path / "judge.py"
    path.write_text(f"def score(prompt, completion, gold):\n    {body}\n", encoding="utf-8")
    return f"{path}:score"


def verifier(name: str) -> list[str]:
    return ["judge.kind=verifier", "judge.mode=python", f"judge.file={name}"]


def test_equal_scores_make_no_pairs(call, prompts, tmp_path):
    more = verifier(judge_file(tmp_path, "return 0.5"))
    code, message = call(*run_arguments("embedded", prompts, tmp_path / "out", *more))
    assert code == 3
    assert "no pairs" in message
    assert "24 of 24 groups have equal scores" in message


def test_a_judge_that_raises(call, prompts, tmp_path):
    more = verifier(judge_file(tmp_path, "raise RuntimeError('out of ideas')"))
    code, message = call(*run_arguments("embedded", prompts, tmp_path / "out", *more))
    assert code == 4
    assert "out of ideas" in message
    assert "score" in message


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ("float('nan'), 1.0", r"prompts\.jsonl:\d+, completion 0: score nan, .* return a finite number, or None"),
        ("0.0, float('inf')", r"prompts\.jsonl:\d+, completion 1: score inf"),
        ("0.0,", r"prompts\.jsonl:\d+: 1 scores and 2 notes for 2 completions"),
    ],
)
def test_a_judge_without_an_order_is_named(call, prompts, tmp_path, scores, words):
    """Self-Rewarding's best and worst: neither is defined among numbers of which one is no number."""
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n\nfrom prefloop.rows import Verdict\n\n\n@dataclass(frozen=True)\n"
        "class Mine:\n    def __call__(self, groups, context):\n"
        f"        return [Verdict(({scores}), (None, None)) for _ in groups]\n",
        encoding="utf-8",
    )
    more = [f"judge.kind={tmp_path / 'mine.py'}:Mine", "eval_judge=lexicon"]
    code, message = call(*run_arguments("embedded", prompts, tmp_path / "out", *more))
    assert code == 4
    assert re.search(words, message), message
    assert not (tmp_path / "out" / "round-000" / "2-judged" / "manifest.json").exists()


def test_a_diverging_run_stops_and_names_the_step(call, prompts, tmp_path):
    more = ["train.learning_rate=1e30", "train.max_grad_norm=null", "train.pairs_per_step=2", "train.warmup=0"]
    code, message = call(*run_arguments("embedded", prompts, tmp_path / "out", *more))
    assert code == 5
    assert "step 2" in message
    assert not (tmp_path / "out" / "round-000" / "5-policy" / "manifest.json").exists()


def test_other_settings_are_refused_and_redo_makes_them(call, prompts, tmp_path):
    out = tmp_path / "out"
    assert call(*run_arguments("embedded", prompts, out))[0] == 0
    samples = (out / "round-000" / "1-samples" / "manifest.json").stat().st_mtime_ns
    changed = run_arguments("embedded", prompts, out, "train.learning_rate=2e-4")
    before = {name: (out / name).read_bytes() for name in ("summary.json", "recipe.yaml", "report.html")}
    code, message = call(*changed)
    assert code == 2
    assert {name: (out / name).read_bytes() for name in before} == before
    assert "learning_rate: 0.0001 → 0.0002" in message
    assert "--redo" in message
    assert call(*changed, "--redo")[0] == 0
    assert "learning_rate: 0.0002  # command line" in (out / "recipe.yaml").read_text()
    # A new learning rate does not throw samples away.
    assert (out / "round-000" / "1-samples" / "manifest.json").stat().st_mtime_ns == samples
    assert (out / "round-000" / "5-policy.replaced-1" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "iterative_dpo", "tran.epochs=2"], "did you mean train?"),
        (["run", "iterative_dpo", "train.epochs=two"], "train.epochs"),
        (["run", "dpoo"], "no 'dpoo'"),
        (["run", "iterative_dpo", "policy=x"], "judge: not set"),
        (["run", "iterative_dpo", "policy=embedded", "judge=lexicon"], "prompts: not set"),
        (["run", "iterative_dpo", "prompts=x.jsonl", "judge=lexicon"], "policy: not set"),
        (["run", "iterative_dpo", "reference=none"], "loss.kind dpo needs one"),
        (["run", "iterative_dpo", "reference=adapter_off"], "train.lora"),
        (["run", "iterative_dpo", "round_exit=keep"], "train.lora"),
        (["run", "iterative_dpo", "sampler.temperature=-1"], "temperature"),
        (["run", "iterative_dpo", "loss.beta=0"], "beta"),
        (["run", "nowhere.yaml"], "nowhere.yaml"),
        (["show", "nowhere"], "not a run folder"),
        (["export", "policies", "nowhere", "x"], "not a run folder"),
    ],
)
def test_bad_usage(call, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, message = call(*arguments)
    assert code in (2, 3)
    assert words in message
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_says_so_in_its_summary(call, prompts, tmp_path):
    more = verifier(judge_file(tmp_path, "return 0.5"))
    assert call(*run_arguments("embedded", prompts, tmp_path / "out", *more))[0] == 3
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["state"], summary["rounds"]) == ("failed", [])


BARE = {"prompt": "One day {i} birds sang"}
PAIRED = BARE | {"chosen": " A happy {i}.", "rejected": " A sad {i}."}
RATED = BARE | {"completions": [" a", " b", " c"]}


@pytest.mark.parametrize(
    ("recipe", "row", "more", "words"),
    [
        ("spin", BARE, [], r"reference answer for each prompt and none has one; .* prompts\.gold"),
        ("dnpo", BARE, [], r"reference answer for each prompt and none has one; .* prompts\.gold"),
        ("mrdpo", BARE, [], r"reference answer for each prompt and none has one; .* prompts\.gold"),
        ("tso", BARE, [], r"reference answer for each prompt and none has one; .* prompts\.gold"),
        ("tso", BARE, ["pair_builder.human=false"], r"sampler\.smaller lists no models.* prompts\.gold"),
        ("iterative_rpo", BARE, ["judge={kind: verifier, mode: number}"], r"has a gold answer .* prompts\.gold"),
        ("dpo", BARE, [], r":\d+: no completions to choose from; give the columns chosen and rejected"),
        ("tr_dpo", BARE, [], r":\d+: no completions to choose from; give the columns chosen and rejected"),
        ("ofs_dpo", BARE, [], r":\d+: no completions to choose from; give the columns chosen and rejected"),
        ("srpo", BARE, [], r":\d+: no completions to choose from; give the columns chosen and rejected"),
        ("curry_dpo", BARE, [], r":\d+: no completions to choose from; .* completions and scores"),
        ("curry_dpo", RATED, [], r":1: completions must be a list, and scores a list of as many numbers"),
        ("curry_dpo", RATED | {"scores": [None] * 3}, [], r"no pairs in round 0 .* have no ratings .*`scores`"),
        ("curry_dpo", RATED | {"scores": [2.0] * 3}, [], r"no pairs in round 0 .* 0 have no ratings and \d\d rate all"),
        ("curry_dpo", PAIRED, [], r"no pairs in round 1 .*none has more than 2 completions.* set rounds=1, or"),
        ("sdpo", BARE, [], r":\d+: needs two completions with different scores.* columns chosen and rejected"),
        ("sdpo", BARE, ["order.by=margin"], r":\d+: needs two completions with different scores"),
        ("sdpo", PAIRED, [], r":\d+: no column `source`; name each row's data set in it, or set order\.by=margin"),
        ("sdpo", PAIRED | {"source": "a"}, [], r"1 sources \(a\) for 2 rounds; set rounds=1, or order\.by=margin"),
        ("cofs_dpo", PAIRED, [], r":\d+: no column `source`; name each row's domain in it"),
        ("cofs_dpo", PAIRED | {"source": "a"}, [], r"column `source` names 1 domain \(a\).* needs two or more"),
    ],
)
def test_what_a_method_needs_is_named_before_any_work(call, tmp_path, recipe, row, more, words):
    rows = [{k: v.format(i=i) if isinstance(v, str) else v for k, v in row.items()} for i in range(120)]
    data = ["policy=embedded", f"prompts={write_jsonl(tmp_path / 'p.jsonl', rows)}", "eval_judge=lexicon"]
    judge = [] if recipe in ("curry_dpo", "sdpo", "cofs_dpo", "ofs_dpo", "dpo", "tr_dpo", "srpo") else ["judge=lexicon"]
    code, message = call("run", recipe, *data, *judge, *more, "--out", tmp_path / "out")
    assert code in (2, 3)
    assert re.search(words, message), message
    assert not (tmp_path / "out").exists()
