"""Benchmarks through EleutherAI's lm-evaluation-harness, its numbers as `Metric`s beside our own.

The `lm_eval` package does everything: tasks, prompts, scoring, standard errors. It is optional, extra `lm-eval`. This
file calls its public `simple_evaluate` and reads what comes back, format of versions 0.4.3 to 0.4.13.
"""

import importlib
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from numbers import Real
from statistics import NormalDist
from typing import Any

from prefloop.errors import ConfigError, DataError
from prefloop.evaluate.bootstrap import LEVEL
from prefloop.rows import Metric


def run_tasks(
    policy: str,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    batch_size: int | str = "auto",
    **options: Any,
) -> dict[str, Metric]:
    """Run tasks of the harness on a policy in this process and return its metrics; see `metrics_of`.

    Most tasks fetch their data from the hub when they first run. Tasks that run code written by the policy, and data
    sets that bring code of their own, stay refused, as the harness does by default.

    Args:
        policy: folder of the policy, as `save_pretrained` writes it.
        tasks: names of tasks or groups, such as `ifeval` or `gsm8k`.
        include_path: folder with task files of your own. They can name Python functions, which are run.
        limit: only that many documents of each task: for a try, not for a result.
        batch_size: rows at once; `auto` lets the harness find out.
        options: further arguments of `lm_eval.simple_evaluate`, such as `num_fewshot`, `apply_chat_template`, `device`.

    Raises:
        ConfigError: the package is not installed, no task is named, or the harness does not know one.
        DataError: there are no results.

    """
    if not tasks:
        raise ConfigError("lm_eval: name at least one task, such as ifeval")
    library, task_module = _library("lm_eval"), _library("lm_eval.tasks")
    manager = task_module.TaskManager(include_path=include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(f"lm_eval: no such task: {', '.join(unknown)}; `lm_eval ls tasks` lists those there are")
    results = library.simple_evaluate(
        model="hf",
        model_args={"pretrained": policy},
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        batch_size=batch_size,
        log_samples=False,
        **options,
    )
    if results is None:
        raise DataError("lm_eval: no results; they come back on rank 0 only")
    return metrics_of(results)


def metrics_of(results: Mapping[str, Any]) -> dict[str, Metric]:
    """Return the metrics in a results object of the harness, returned or read from its JSON file.

    A key such as `exact_match,strict-match` of the task `gsm8k` becomes `gsm8k/exact_match,strict-match`; the filter
    `none` is left out of the name. Groups are beside their tasks. Values keep the harness's scale, 0–1 for accuracies,
    and the unit is its name for the metric. The interval is value ± 1.96 standard errors, not cut to a range, and its
    standard error is over documents, so it knows nothing of training seeds; where the harness gives none, the interval
    is −∞ to ∞. `n` counts documents. What is not a number is left out.

    Raises:
        DataError: there are no results.

    """
    tables = results.get("results")
    if not isinstance(tables, Mapping) or not tables:
        raise DataError("lm_eval: the results object has no `results`; give what lm_eval wrote or returned")
    found: dict[str, Metric] = {}
    for task, table in tables.items():
        for key, value in table.items():
            metric, _, kind = key.partition(",")
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            if kind and is_number and not metric.endswith("_stderr"):
                name = f"{task}/{metric}" + (f",{kind}" if kind != "none" else "")
                error = table.get(f"{metric}_stderr,{kind}")
                found[name] = _metric(float(value), error, _documents(results, task), metric)
    return found


def _metric(value: float, error: Any, n: int, unit: str) -> Metric:
    known = isinstance(error, Real) and isfinite(error)
    reach = NormalDist().inv_cdf((1 + LEVEL) / 2) * float(error) if known else inf
    estimator = "lm-evaluation-harness, normal interval" if known else "lm-evaluation-harness, no standard error"
    return Metric(value, value - reach, value + reach, n, unit, estimator)


def _documents(results: Mapping[str, Any], task: str) -> int:
    """Return how many documents a task or the tasks of a group had; 0 where the results do not say."""
    counts = results.get("n-samples", {})
    if task in counts:
        return int(counts[task]["effective"])
    parts = results.get("group_subtasks", {}).get(task, [])
    return sum(_documents(results, part) for part in parts) or int(results["results"][task].get("sample_len", 0))


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"lm_eval: the package is not installed, or not whole ({error}): pip install 'prefloop[lm-eval]'"
        ) from error
