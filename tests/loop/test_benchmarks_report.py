"""`prefloop evaluate --lm-eval`: results of lm-evaluation-harness in the report of the run that they are about."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from prefloop.cli import app
from prefloop.commands import evaluate as evaluation
from prefloop.launch import read_recipe
from prefloop.loop import run
from tiny import write_jsonl

SMALL = ["rounds=1", "prompts_per_round=8", "sampler.max_new_tokens=10", "evaluate.prompts=20", "gate.kind=always"]
TASK = """
task: endings
dataset_path: json
dataset_kwargs: {data_files: FILE}
test_split: train
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{[a, b]}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("run") / "spin"
    recipe, origins = read_recipe("iterative_dpo", SMALL)
    return root, run(recipe, root, origins=origins)


def call(*words):
    return CliRunner().invoke(app, ["evaluate", *map(str, words)])


def scripted(monkeypatch, value):
    """A harness with one task, whose results say `value`; returns what it was asked."""
    asked = []

    def simple_evaluate(**arguments):
        asked.append(arguments)
        table = {"acc,none": value, "acc_stderr,none": 0.05}
        return {"results": {"endings": table}, "n-samples": {"endings": {"effective": 100}}}

    tasks = SimpleNamespace(TaskManager=lambda include_path: SimpleNamespace(match_tasks=list))
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate, tasks=tasks))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    monkeypatch.setattr(evaluation, "version", lambda name: "0.4.13")
    return asked


def test_results_of_each_policy_stand_beside_each_other_in_the_report_and_in_show(finished, monkeypatch):
    root, summary = finished
    asked = scripted(monkeypatch, 0.75)
    found = call(root / "round-000" / "5-policy", "--lm-eval", "endings")
    assert found.exit_code == 0, found.output
    assert "0.750 [0.652, 0.848]" in found.output  # ± 1.96 × 0.05
    assert asked[0]["model_args"] == {"pretrained": str(root / "round-000" / "5-policy")}
    assert (asked[0]["device"], asked[0]["limit"]) == ("cpu", None)

    asked = scripted(monkeypatch, 0.5)
    start = summary["policy_start"]["path"]
    assert start == "embedded"
    assert call(root, "policy=embedded", "--lm-eval", "endings", "--lm-eval-limit", "7").exit_code == 0
    assert asked[0]["limit"] == 7
    rows = json.loads((root / "benchmarks.json").read_text())["rows"]
    assert [r["policy"]["digest"] for r in rows] == [
        summary["rounds"][0]["policy"]["digest"],
        summary["policy_start"]["digest"],
    ]
    html = (root / "report.html").read_text(encoding="utf-8")
    section = html[html.index('id="benchmarks"') :]
    assert "<th>round 0</th><th>start</th>" in section
    assert "<td>0.750<small>[0.652, 0.848]</small></td><td>0.500<small>" in section
    assert "lm_eval 0.4.13, at most 7 documents of each task" in section
    shown = CliRunner().invoke(app, ["show", str(root)]).output
    assert "start                    endings/acc 0.500" in shown

    # Measured again: its row is replaced, not added to.
    scripted(monkeypatch, 0.25)
    assert call(root / "round-000" / "5-policy", "--lm-eval", "endings").exit_code == 0
    rows = json.loads((root / "benchmarks.json").read_text())["rows"]
    assert [r["metrics"]["endings/acc"]["value"] for r in rows] == [0.25, 0.5]


def test_a_policy_outside_a_run_gets_a_file_of_its_own(finished, monkeypatch, tmp_path):
    scripted(monkeypatch, 0.5)
    found = call(finished[0], "--lm-eval", "endings", "--out", tmp_path / "out")
    assert found.exit_code == 0, found.output
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["benchmarks.json"]


def test_without_the_package_the_extra_is_named(finished, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    found = call(finished[0], "--lm-eval", "endings")
    assert "pip install 'prefloop[lm-eval]'" in str(found.exception)


def test_a_task_of_one_s_own_by_the_real_harness(finished, tmp_path, monkeypatch):
    """A story model finds likely what a story says next, so it is right about all four."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    documents = [
        {"q": "Once upon a time there was a little", "a": " girl", "b": " tax"},
        {"q": "She was very", "a": " happy", "b": " ergo"},
        {"q": "They went to the", "a": " park", "b": " of"},
        {"q": "He liked to", "a": " play", "b": " the"},
    ]
    file = write_jsonl(tmp_path / "documents.jsonl", documents)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "endings.yaml").write_text(TASK.replace("FILE", str(file)), encoding="utf-8")
    out = tmp_path / "out"
    found = call(finished[0], "--lm-eval", "endings", "--lm-eval-include", tmp_path / "tasks", "--out", out)
    assert found.exit_code == 0, found.output
    (row,) = json.loads((out / "benchmarks.json").read_text())["rows"]
    metric = row["metrics"]["endings/acc"]
    assert (metric["value"], metric["n"]) == (1.0, 4)
    assert math.isfinite(metric["low"])
