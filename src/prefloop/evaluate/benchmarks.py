"""Benchmark results kept with a run: `benchmarks.json`, which the report and `prefloop show` read.

One row for each policy of the run that was measured; a later call adds to its row, or replaces what it measured again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefloop.artifact import read_json, write_json
from prefloop.evaluate.summary import START_ROUND, interval, metric_json, metrics_from_json, number, with_interval
from prefloop.rows import Metric, PolicyRef

FILE = "benchmarks.json"


def keep(folder: Path, policy: PolicyRef, harness: str, metrics: Mapping[str, Metric]) -> Path:
    """Add what a benchmark found of a policy to the file in `folder`, and return its path.

    Args:
        folder: a run's folder, or any other.
        policy: what was measured.
        harness: name and version of what measured it.
        metrics: by name.

    """
    rows = read(folder)
    row = next((r for r in rows if r["policy"]["digest"] == policy.digest), None)
    if row is None:
        row = {"policy": {"path": policy.path, "digest": policy.digest}, "metrics": {}}
        rows.append(row)
    row["harness"] = harness
    row["metrics"] |= {name: metric_json(metric) for name, metric in metrics.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, {"rows": rows})
    return folder / FILE


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the rows in `folder`, none where nothing was measured.

    Raises:
        CorruptArtifact: the file is not JSON.

    """
    path = folder / FILE
    return list(read_json(path)["rows"]) if path.is_file() else []


def table(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return metrics as rows and policies as columns, as (value, interval) each; `None` where nothing was measured."""
    if not rows:
        return None
    found = [(_name(row, summary), metrics_from_json(row["metrics"])) for row in rows]
    names = sorted({name for _, metrics in found for name in metrics})
    return {
        "columns": [title for title, _ in found],
        "harness": ", ".join(sorted({row["harness"] for row in rows})),
        "rows": [
            {
                "name": name,
                "n": max(m[name].n for _, m in found if name in m),
                "cells": [_cell(metrics.get(name)) for _, metrics in found],
            }
            for name in names
        ],
    }


def _cell(metric: Metric | None) -> tuple[str, str] | None:
    return None if metric is None else (number(metric.value, metric.unit), interval(metric))


def lines(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (policy, metric with its interval) of everything that was measured."""
    return [
        (_name(row, summary), f"{name} {with_interval(metric)}, {metric.n:,} documents")
        for row in rows
        for name, metric in metrics_from_json(row["metrics"]).items()
    ]


def _name(row: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Return which policy of the run a row is about."""
    digest = row["policy"]["digest"]
    if digest == summary["policy_start"]["digest"]:
        return "start"
    number_of_round = next((e["round"] for e in summary["rounds"] if e["policy"]["digest"] == digest), START_ROUND)
    return f"round {number_of_round}" if number_of_round != START_ROUND else str(row["policy"]["path"])
