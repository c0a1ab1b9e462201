"""Results of lm-evaluation-harness as metrics. `RESULTS` has the form that version 0.4.13 returned for a group of two
tasks; its numbers, and the task `gsm8k` with its two filters, are written by hand."""

import sys
from math import inf
from types import SimpleNamespace

import numpy as np
import pytest

from prefloop.errors import ConfigError, DataError
from prefloop.evaluate.lm_eval import metrics_of, run_tasks

RESULTS = {
    "results": {
        "gsm8k": {
            "name": "gsm8k",
            "alias": "gsm8k",
            "sample_len": 1319,
            "exact_match,strict-match": 0.5,
            "exact_match_stderr,strict-match": 0.01,
            "exact_match,flexible-extract": 0.6,
            "exact_match_stderr,flexible-extract": np.float64(0.02),
        },
        "one": {"name": "one", "alias": " - one", "sample_len": 4, "acc,none": 0.25, "acc_stderr,none": 0.25},
        "two": {"name": "two", "alias": " - two", "sample_len": 6, "acc,none": 1, "acc_stderr,none": "N/A"},
        "both": {"alias": "both", "name": "both", "sample_len": 10, "acc,none": 0.7, "sample_count": {"acc,none": 10}},
    },
    "groups": {"both": {"alias": "both", "acc,none": 0.7}},
    "group_subtasks": {"both": ["one", "two"]},
    "n-samples": {
        "gsm8k": {"original": 1319, "effective": 100},
        "one": {"original": 4, "effective": 4},
        "two": {"original": 6, "effective": 6},
    },
}


def test_names_values_and_intervals():
    found = metrics_of(RESULTS)
    assert list(found) == [
        "gsm8k/exact_match,strict-match",
        "gsm8k/exact_match,flexible-extract",
        "one/acc",
        "two/acc",
        "both/acc",
    ]
    strict = found["gsm8k/exact_match,strict-match"]
    assert strict.value == 0.5
    assert (strict.low, strict.high) == pytest.approx((0.5 - 1.959964 * 0.01, 0.5 + 1.959964 * 0.01))
    assert (strict.n, strict.unit) == (100, "exact_match")  # documents that were run, not those there are
    assert found["gsm8k/exact_match,flexible-extract"].high == pytest.approx(0.6 + 1.959964 * 0.02)


def test_without_a_standard_error_there_is_no_interval():
    found = metrics_of(RESULTS)
    assert (found["two/acc"].low, found["two/acc"].high) == (-inf, inf)
    assert found["two/acc"].estimator == "lm-evaluation-harness, no standard error"
    assert type(found["two/acc"].value) is float


def test_a_group_has_the_documents_of_its_tasks():
    assert metrics_of(RESULTS)["both/acc"].n == 10
    bare = {"results": {"one": {"alias": "one", "acc,none": 0.5, "acc_stderr,none": 0.1}}}
    assert metrics_of(bare)["one/acc"].n == 0


def test_what_is_not_a_number_is_left_out():
    odd = {"results": {"one": {"alias": "one", "acc,none": " ", "f1,none": True, "em,none": 0.5}}}
    assert list(metrics_of(odd)) == ["one/em"]


@pytest.mark.parametrize("bad", [{}, {"results": {}}, {"results": None}])
def test_an_object_without_results_is_refused(bad):
    with pytest.raises(DataError, match="has no `results`"):
        metrics_of(bad)


def test_without_the_package_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'prefloop\[lm-eval\]'"):
        run_tasks("policy", ["ifeval"])


def test_no_task_is_refused_before_anything_is_imported():
    with pytest.raises(ConfigError, match="name at least one task"):
        run_tasks("policy", [])


def scripted(monkeypatch, answer):
    """Put a harness in place that knows the task `one`, notes what it is asked, and gives `answer`."""
    asked = {}

    def simple_evaluate(**arguments):
        asked.update(arguments)
        return answer

    manager = SimpleNamespace(match_tasks=lambda names: [n for n in names if n == "one"])
    tasks = SimpleNamespace(TaskManager=lambda include_path: manager)
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate, tasks=tasks))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    return asked


def test_the_harness_is_asked_for_the_policy_and_its_results_come_back(monkeypatch):
    asked = scripted(monkeypatch, RESULTS)
    assert run_tasks("runs/x/policy", ["one"], limit=3, num_fewshot=2) == metrics_of(RESULTS)
    assert asked["model_args"] == {"pretrained": "runs/x/policy"}
    assert (asked["tasks"], asked["limit"], asked["num_fewshot"]) == (["one"], 3, 2)
    assert "confirm_run_unsafe_code" not in asked


def test_an_unknown_task_and_no_results_are_refused(monkeypatch):
    scripted(monkeypatch, None)
    with pytest.raises(ConfigError, match="no such task: onne"):
        run_tasks("policy", ["one", "onne"])
    with pytest.raises(DataError, match="rank 0"):
        run_tasks("policy", ["one"])
