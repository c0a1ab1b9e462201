"""The run as one page: `report.html`, built from `summary.json`, `recipe.yaml` and the artifacts of a run
folder.

The page is a single file without scripts that loads nothing from anywhere; a content security policy in it
says so to the browser as well. Prompts, completions and notes are untrusted text: every one of them is
escaped. Examples are counted and cut, so the page stays below 2 MB whatever the run's size."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from prefloop.artifact import Artifact, load_artifact, read_json, write_text
from prefloop.errors import DataError
from prefloop.evaluate.charts import Line, Point, histogram, line_chart, thinned
from prefloop.evaluate.summary import (
    START_ROUND,
    interval,
    metrics_from_json,
    number,
    verdict,
    with_interval,
    with_unit,
)
from prefloop.rows import Completion, JudgedGroup, Metric, PreferencePair, Prompt, StepLog, TokenizedPair

R = TypeVar("R")

REPORT = "report.html"

# What one page shows at most.
_TEXT = 1200  # characters of a prompt or completion
_WHY = 600  # characters of a reason or note
_RECIPE = 40_000  # characters of recipe.yaml
_ROUNDS = 40  # rounds in lists and tables: the first few, then the last
_FIRST_ROUNDS = 5
_COLUMNS = 12  # rounds beside each other: in the metrics table, histograms and pairs
_SAMPLES = 4  # prompts of each kind: gained most, lost most, fixed order
_WARNINGS = 30
_FACTS = 40
_BINS = 24

_STAGES = {"1-samples": "sample", "2-judged": "judge", "3-pairs": "pair", "4-batches": "batch", "5-policy": "train"}
_ORDER = (
    "judge_score",
    "judge_score_gain",
    "judge_score_gain_best",
    "win_rate_vs_start",
    "win_rate_vs_best",
    "kl_policy_start",
    "length",
    "repetition",
    "distinct_2",
    "stopped",
)
_SIGNED = ("judge_score_gain", "judge_score_gain_best")






def write_report(root: Path) -> Path:
    """Write `report.html` into a run folder, whole or not at all, and return its path.

    Only the run folder is read. Of an unfinished run the page shows what is there.

    Args:
        root: the run folder.

    Raises:
        DataError: there is no `summary.json`, or it lacks a field.
        CorruptArtifact: an artifact that the page reads is damaged.

    Example:
        >>> write_report(Path("runs/demo"))  # doctest: +SKIP
        PosixPath('runs/demo/report.html')

    """
    if not (root / "summary.json").is_file():
        raise DataError(f"{root}: no summary.json here; give the folder of a run that has been started")
    summary = read_json(root / "summary.json")
    try:
        view = _view(root, summary)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{root / 'summary.json'}: not as docs/artifacts.md describes it ({error!r}); "
            "repeat `prefloop run` to write it again"
        ) from error
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"score": _score, "gain": _signed, "seconds": _seconds, "count": _count, "clip": _clip}
    page = environment.get_template("report.html.j2").render(view)
    # Lone surrogates can come out of JSON; UTF-8 has no bytes for them.
    write_text(root / REPORT, page.encode("utf-8", "replace").decode("utf-8"))
    return root / REPORT


def _view(root: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    rounds = list(summary["rounds"])
    best = summary["policy_best"]["round"]
    start = _judged(root / "start" / "2-judged")
    judged = {
        e["round"]: _judged(_round_folder(root, e["round"]) / "6-report" / "2-judged") for e in _ends(rounds, _COLUMNS)
    }
    after = best if best != START_ROUND else (rounds[-1]["round"] if rounds else START_ROUND)
    return {
        "summary": summary,
        "verdict": summary.get("verdict") or verdict(summary),
        "warnings": [_clip(w, _WHY) for w in summary.get("warnings", [])[:_WARNINGS]],
        "best": best,
        "tiles": _tiles(summary, rounds, after),
        "decisions": _decisions(rounds),
        "omitted": max(0, len(rounds) - _ROUNDS),
        "table": _metric_table(summary, rounds),
        "round_charts": _round_charts(summary, rounds),
        "histograms": _histograms(start, judged),
        "samples": _samples(start, judged.get(after, []) if after in judged else _judged_of(root, after)),
        "after": after,
        "pairs": _pairs(root, [e["round"] for e in rounds]),
        "step_charts": _step_charts(root, [e["round"] for e in rounds]),
        "counts": [_stage_counts(root, e) for e in _ends(rounds, _ROUNDS)],
        "unfinished": _unfinished(root, rounds),
        "provenance": _provenance(root, summary),
        "facts": _facts(root, rounds),
        "recipe": _recipe(root),
    }


# --- numbers -------------------------------------------------------------------------------------------------------


def _tiles(summary: Mapping[str, Any], rounds: Sequence[Any], after: int) -> list[dict[str, str]]:
    """Return the few numbers at the top: those of the best policy, or of the last round where none was
    accepted."""
    entry = next((e for e in rounds if e["round"] == after), None)
    if entry is None:
        return []
    now, start = metrics_from_json(entry["metrics"]), _start_metrics(summary)
    tiles = []
    for name, title in (
        ("judge_score", "score"),
        ("win_rate_vs_start", "win rate against the start"),
        ("kl_policy_start", "KL(policy ‖ start)"),
        ("length", "length"),
        ("repetition", "repetition"),
    ):
        if name in now:
            unit = now[name].unit
            before = f"start: {number(start[name].value, unit)}" if name in start else ""
            tiles.append(
                {
                    "title": title,
                    "value": with_unit(now[name].value, "%" if unit == "%" else "share" if unit != "tokens" else ""),
                    "unit": unit if unit in ("nats per token", "tokens") else "",
                    "below": before or interval(now[name]),
                }
            )
    return tiles


def _start_metrics(summary: Mapping[str, Any]) -> dict[str, Metric]:
    return metrics_from_json((summary.get("start") or {}).get("metrics") or {})


def _decisions(rounds: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {
            "round": e["round"],
            "accepted": e["accepted"],
            "why": [_clip(reason, _WHY) for reason in e.get("why", [])],
            "metrics": {name: with_interval(m) for name, m in metrics_from_json(e["metrics"]).items()},
        }
        for e in _ends(rounds, _ROUNDS)
    ]


def _metric_table(summary: Mapping[str, Any], rounds: Sequence[Any]) -> dict[str, Any]:
    """Return the metrics as rows, the start and the rounds as columns."""
    shown = _ends(rounds, _COLUMNS)
    columns = [("start", _start_metrics(summary))]
    columns += [(f"round {e['round']}", metrics_from_json(e["metrics"])) for e in shown]
    names = {name for _, metrics in columns for name in metrics}
    ordered = [n for n in _ORDER if n in names] + sorted(names - set(_ORDER))[:_FACTS]
    rows = []
    for name in ordered:
        found = [metrics.get(name) for _, metrics in columns]
        any_one = next(m for m in found if m is not None)
        form = _signed if name in _SIGNED else number
        cells = [None if m is None else (form(m.value, m.unit), interval(m)) for m in found]
        rows.append({"name": name, "unit": any_one.unit, "estimator": _last(found).estimator, "cells": cells})
    prompts = [max((m.n for m in metrics.values()), default=0) for _, metrics in columns]
    return {"columns": [title for title, _ in columns], "rows": rows, "prompts": prompts}


def _last(found: Sequence[Metric | None]) -> Metric:
    return next(m for m in reversed(found) if m is not None)




_MANY = 60  # rounds beyond which points are drawn as means of neighbours


# --- what lies in the artifacts ------------------------------------------------------------------------------------


def _round_folder(root: Path, number_of_round: int) -> Path:
    return root / f"round-{number_of_round:03d}"


def _rows(path: Path, record: type[R]) -> Iterable[R]:
    return load_artifact(path, record) or ()


def _judged(path: Path) -> list[JudgedGroup]:
    return list(_rows(path, JudgedGroup))


def _judged_of(root: Path, number_of_round: int) -> list[JudgedGroup]:
    return (
        []
        if number_of_round == START_ROUND
        else _judged(_round_folder(root, number_of_round) / "6-report" / "2-judged")
    )






















# --- counts and provenance -----------------------------------------------------------------------------------------


def _stage_counts(root: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    folder = _round_folder(root, entry["round"])
    completions, unscored = _completions(load_artifact(folder / "2-judged", JudgedGroup))
    paired = _paired_prompts(load_artifact(folder / "3-pairs", PreferencePair))
    prompts = _rows_of(folder / "0-prompts", Prompt)
    return {
        "round": entry["round"],
        "prompts": prompts,
        "completions": completions,
        "unscored": unscored,
        "pairs": _rows_of(folder / "3-pairs", PreferencePair),
        "unpaired": None if prompts is None or paired is None else prompts - paired,
        "batches": _rows_of(folder / "4-batches", TokenizedPair),
        "steps": _rows_of(folder / "5-policy", StepLog),
        "seconds": dict(entry.get("seconds") or {}),
        "tokens": dict(entry.get("tokens") or {}),
    }


def _rows_of(path: Path, record: type[Any]) -> int | None:
    artifact: Artifact[Any] | None = load_artifact(path, record)
    return None if artifact is None else artifact.rows


def _completions(artifact: Artifact[JudgedGroup] | None) -> tuple[int | None, int | None]:
    """Return how many completions a round judged, and how many got no score, from that one column."""
    if artifact is None:
        return None, None
    total = unscored = 0
    for column in _column(artifact, "scores"):
        scores = column.flatten()
        total, unscored = total + len(scores), unscored + scores.null_count
    return total, unscored


def _paired_prompts(artifact: Artifact[PreferencePair] | None) -> int | None:
    if artifact is None:
        return None
    return len(
        {pid for column in _column(artifact, "prompt.prompt_id") for pid in column.field("prompt_id").to_pylist()}
    )


def _column(artifact: Artifact[Any], name: str) -> Iterable[Any]:
    """Yield one column of an artifact's parts as Arrow arrays, without decoding the texts beside it."""
    for part in sorted(artifact.path.glob("part-*.parquet")):
        with pq.ParquetFile(part) as file:
            for batch in file.iter_batches(columns=[name]):
                yield batch.column(0)


def _unfinished(root: Path, rounds: Sequence[Any]) -> list[tuple[str, list[str]]]:
    """Return the rounds that have a folder but no entry yet, with their finished stages."""
    known = {_round_folder(root, e["round"]).name for e in rounds}
    folders = [f for f in sorted(root.glob("round-*")) if re.fullmatch(r"round-\d+", f.name) and f.name not in known]
    return [
        (folder.name, [stage.name for stage in sorted(folder.iterdir()) if load_artifact(stage, None)])
        for folder in folders[-_COLUMNS:]
    ]


def _facts(root: Path, rounds: Sequence[Any]) -> list[dict[str, Any]]:
    """Return what each stage of the shown rounds noted, with the artifact's rows and digest."""
    found = []
    for entry in _ends(rounds, _COLUMNS):
        folder = _round_folder(root, entry["round"])
        for stage in sorted(folder.iterdir()) if folder.is_dir() else ():
            artifact = load_artifact(stage, None)
            if artifact is None:
                continue
            noted = [(k, v) for k, v in artifact.facts.items() if isinstance(v, str | int | float | bool)]
            found.append(
                {
                    "stage": f"{folder.name}/{stage.name}",
                    "rows": artifact.rows,
                    "digest": artifact.digest,
                    "facts": "; ".join(f"{k}: {_clip(str(v), 80)}" for k, v in noted[:_FACTS]),
                }
            )
    return found


def _provenance(root: Path, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    start, best = summary["policy_start"], summary["policy_best"]
    which = "the start" if best["round"] == START_ROUND else f"round {best['round']}"
    known = [
        ("run", summary["name"]),
        ("folder", root.name),
        ("recipe", summary["recipe"]),
        ("seed", summary["seed"]),
        ("state", summary["state"]),
        ("start policy", f"{start['path']} ({start['digest']})"),
        ("best policy", f"{which}: {best['path']} ({best['digest']})"),
        ("judge", _flat(summary.get("judge"))),
        ("judge of the evaluation", _flat(summary.get("eval_judge"))),
        ("prefloop", summary["prefloop"]),
        *((f"version of {name}", v) for name, v in sorted((summary.get("versions") or {}).items())),
    ]
    return [(name, _clip(str(value), _TEXT)) for name, value in known if value not in (None, "")]


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_flat(v)}" for k, v in value.items() if v is not None)
    return "" if value is None else str(value)


def _recipe(root: Path) -> str:
    path = root / "recipe.yaml"
    return _clip(path.read_text(encoding="utf-8", errors="replace"), _RECIPE) if path.is_file() else ""


# --- small things --------------------------------------------------------------------------------------------------


def _ends(items: Sequence[R], most: int) -> list[R]:
    """Return all items, or the first few and the last, `most` in all."""
    if len(items) <= most:
        return list(items)
    return [*items[:_FIRST_ROUNDS], *items[len(items) - most + _FIRST_ROUNDS :]]




def _score(value: float | None) -> str:
    return "no score" if value is None else number(value, "score")


def _signed(value: float, unit: str = "score") -> str:
    return f"+{number(value, unit)}" if value > 0 else number(value, unit)


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 100:
        return f"{value:.1f} s"
    minutes, hours = value / 60, value / 3600
    return f"{minutes:.1f} min" if minutes < 100 else f"{hours:.1f} h"
