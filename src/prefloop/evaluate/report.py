"""The run as one page: `report.html`, from `summary.json`, `recipe.yaml` and the artifacts of a run folder.

The page is a single file without scripts that loads nothing from anywhere; its content security policy tells
the browser so as well. Prompts, completions and notes are untrusted text: all of them are escaped. Examples
are few and cut to a length, so the page stays below 2 MB whatever the run's size.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from prefloop.artifact import Artifact, load_artifact, write_text
from prefloop.disk import seal_text
from prefloop.errors import DataError
from prefloop.evaluate import benchmarks
from prefloop.evaluate.displacement_charts import displacement_charts
from prefloop.evaluate.judging import tables
from prefloop.evaluate.report_charts import histograms, round_charts, step_charts
from prefloop.evaluate.report_examples import NOTE, TEXT, clip, outcomes_of, samples
from prefloop.evaluate.report_frontier import frontier_chart
from prefloop.evaluate.report_origins import origin_table
from prefloop.evaluate.report_pairs import stored_pairs
from prefloop.evaluate.summary import START_ROUND, interval, metrics_from_json, number, read_summary, verdict
from prefloop.evaluate.text_marks import LEAST_SHARED
from prefloop.rows import JudgedGroup, Metric, PreferencePair, Prompt, StepLog, TokenizedPair

R = TypeVar("R")

REPORT = "report.html"
REPORT_SEAL = "<!-- {} -->"

# What one page shows at most.
_LISTED = 40  # rounds below each other
_BESIDE = 12  # rounds beside each other, or with texts
_FIRST = 5  # of these, rounds from the beginning; the others are the last ones
_WARNINGS = 30
_FACTS = 40
_FACT = 80  # characters of a fact
_RECIPE = 40_000  # characters of recipe.yaml

_TILES = {
    "judge_score": "score",
    "win_rate_vs_start": "win rate against the start",
    "kl_policy_start": "KL(policy ‖ start)",
    "length": "length",
    "repetition": "repetition",
}
_METRICS = (
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
_GAINS = ("judge_score_gain", "judge_score_gain_best")


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
    summary = read_summary(root)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"score": _score, "gain": _signed, "seconds": _seconds, "count": _count}
    page = environment.get_template("report.html.j2").render(_view(root, summary))
    # Lone surrogates can come out of JSON; UTF-8 has no bytes for them.
    write_text(root / REPORT, seal_text(page.encode("utf-8", "replace").decode("utf-8"), REPORT_SEAL))
    return root / REPORT


def _view(root: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template shows, by name."""
    rounds: list[Mapping[str, Any]] = summary["rounds"]
    metrics = {e["round"]: metrics_from_json(e["metrics"]) for e in rounds}
    start_metrics = metrics_from_json((summary.get("start") or {}).get("metrics") or {})
    best, shown = summary["policy_best"]["round"], shown_round(summary)
    beside = [e["round"] for e in _ends(rounds, _BESIDE)]
    start = judged_in(root, START_ROUND)
    judged = {n: judged_in(root, n) for n in {*beside, shown} - {START_ROUND}}
    shown_samples = samples(start, judged.get(shown, []))
    pairs = {n: stored_pairs(_part_paths(_folder(root, n) / "3-pairs")) for n in beside}
    return {
        "summary": summary,
        "name": summary["name"] or root.resolve().name,
        "verdict": summary.get("verdict") or verdict(summary),
        "warnings": [clip(str(w), NOTE) for w in summary.get("warnings", [])[:_WARNINGS]],
        "best": best,
        "shown": shown,
        "tiles": _tiles(start_metrics, metrics.get(shown, {})),
        "decisions": [
            {**e, "why": [clip(str(reason), NOTE) for reason in e.get("why", [])]} for e in _ends(rounds, _LISTED)
        ],
        "omitted": max(0, len(rounds) - _LISTED),
        "table": _table([("start", start_metrics), *((f"round {n}", metrics[n]) for n in beside)]),
        "round_charts": [
            *round_charts(start_metrics, list(metrics.items())),
            *frontier_chart(start_metrics, list(metrics.items()), {e["round"]: e["accepted"] for e in rounds}),
        ],
        "histograms": histograms(start, {n: judged[n] for n in beside}),
        "samples": shown_samples,
        "outcomes": outcomes_of(shown_samples),
        "least_shared": LEAST_SHARED,
        "pairs": {n: few for n, few in pairs.items() if few},
        "benchmarks": benchmarks.table(benchmarks.read(root), summary),
        "origins": origin_table(rounds),
        "judging": tables(summary.get("judging") or {}),
        "displacement": [(e["round"], e["displacement"]) for e in _ends(rounds, _LISTED) if "displacement" in e],
        "displacement_charts": displacement_charts(
            [(e["round"], e["displacement"]) for e in rounds if "displacement" in e]
        ),
        "step_charts": step_charts([_steps(_folder(root, n)) for n in metrics]),
        "counts": [_counts(_folder(root, e["round"]), e) for e in _ends(rounds, _LISTED)],
        "unfinished": _unfinished(root, set(metrics)),
        "provenance": provenance(root, summary),
        "noted": [row for n in beside for row in _noted(_folder(root, n))],
        "recipe": _recipe(root),
    }


def shown_round(summary: Mapping[str, Any]) -> int:
    """Return the round to look at: the best, or where nothing was accepted the last; −1 where none is finished."""
    rounds = [entry["round"] for entry in summary["rounds"]]
    best: int = summary["policy_best"]["round"]
    return best if best in rounds else max(rounds, default=START_ROUND)


def judged_in(root: Path, number_of_round: int) -> list[JudgedGroup]:
    """Return the judged held-out completions of a round's policy, or of the start (−1); none where there are none."""
    folder = root / "start" if number_of_round == START_ROUND else _folder(root, number_of_round) / "6-report"
    return [group for part in _parts(folder / "2-judged", JudgedGroup) for group in part]


def _tiles(start: Mapping[str, Metric], now: Mapping[str, Metric]) -> list[dict[str, str]]:
    """Return the few numbers at the top, each with the start's where there is one, else with its interval."""
    return [
        {
            "title": title,
            "value": number(now[name].value, now[name].unit),
            "unit": now[name].unit if now[name].unit in ("%", "tokens", "nats per token") else "",
            "below": f"start {number(start[name].value, start[name].unit)}" if name in start else interval(now[name]),
        }
        for name, title in _TILES.items()
        if name in now
    ]


def _table(columns: Sequence[tuple[str, Mapping[str, Metric]]]) -> dict[str, Any]:
    """Return the metrics as rows; the start and the rounds are columns."""
    names = {name for _, metrics in columns for name in metrics}
    rows = []
    for name in [n for n in _METRICS if n in names] + sorted(names - set(_METRICS))[:_FACTS]:
        found = [metrics.get(name) for _, metrics in columns]
        latest = [m for m in found if m is not None][-1]
        write = _signed if name in _GAINS else number
        cells = [None if m is None else (write(m.value, m.unit), interval(m)) for m in found]
        rows.append({"name": name, "unit": latest.unit, "estimator": latest.estimator, "cells": cells})
    prompts = [max((m.n for m in metrics.values()), default=None) for _, metrics in columns]
    return {"columns": [title for title, _ in columns], "rows": rows, "prompts": prompts}


def _counts(folder: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return how much each stage of a round had in hand; `None` where a stage did not run or is not finished."""
    prompts = _rows(folder / "0-prompts", Prompt)
    scores = [batch["scores"].flatten() for batch in _columns(folder / "2-judged", ["scores"])]
    pairs = _rows(folder / "3-pairs", PreferencePair)
    # Pairs of earlier rounds that are trained on again have prompts of their own.
    paired = {
        prompt["prompt_id"]
        for batch in _columns(folder / "3-pairs", ["prompt.prompt_id", "round"])
        for prompt, made in zip(batch["prompt"].to_pylist(), batch["round"].to_pylist(), strict=True)
        if made == entry["round"]
    }
    return {
        "round": entry["round"],
        "prompts": prompts,
        "completions": sum(len(s) for s in scores) if scores else None,
        "unscored": sum(s.null_count for s in scores) if scores else None,
        "pairs": pairs,
        "unpaired": None if prompts is None or pairs is None else prompts - len(paired),
        "batches": _rows(folder / "4-batches", TokenizedPair),
        "steps": _rows(folder / "5-policy", StepLog),
        "seconds": entry.get("seconds") or {},
        "tokens": entry.get("tokens") or {},
    }


def _unfinished(root: Path, known: set[int]) -> list[tuple[str, list[str]]]:
    """Return the rounds that have a folder but no entry in the summary, with their finished stages."""
    names = {_folder(root, n).name for n in known}
    folders = [f for f in sorted(root.glob("round-*")) if re.fullmatch(r"round-\d+", f.name) and f.name not in names]
    return [(folder.name, [name for name, _ in _stages(folder)]) for folder in folders[-_BESIDE:]]


def _noted(folder: Path) -> list[dict[str, Any]]:
    """Return rows, digest and facts of each finished stage of a round."""
    found = []
    for name, artifact in _stages(folder):
        facts = [f"{k}: {clip(str(v), _FACT)}" for k, v in artifact.facts.items() if not isinstance(v, dict | list)]
        found.append(
            {
                "stage": f"{folder.name}/{name}",
                "rows": artifact.rows,
                "digest": artifact.digest,
                "facts": "; ".join(facts[:_FACTS]),
            }
        )
    return found


def _stages(folder: Path) -> Iterable[tuple[str, Artifact[Any]]]:
    """Yield the finished artifacts of a round by name, those inside 6-report too."""
    if not folder.is_dir():
        return
    for stage in sorted(f for f in folder.iterdir() if "." not in f.name):  # NAME.replaced-1 is no stage any more
        artifact: Artifact[Any] | None = load_artifact(stage, None)
        if artifact is not None:
            yield stage.name, artifact
        elif stage.name.startswith("6-"):
            yield from ((f"{stage.name}/{name}", inner) for name, inner in _stages(stage))


def provenance(root: Path, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return where a run's numbers come from, as (what, value): data, policies, reference, judges, versions."""
    start, best = summary["policy_start"], summary["policy_best"]
    which = "the start" if best["round"] == START_ROUND else f"round {best['round']}"
    known = [
        ("run", summary["name"]),
        ("folder", root.resolve().name),
        ("recipe", summary["recipe"] or "own"),
        ("seed", summary["seed"]),
        ("state", summary["state"]),
        ("start policy", f"{start['path']}, digest {start['digest']}"),
        ("best policy", f"{which}: {best['path']}, digest {best['digest']}"),
        ("data", _flat(summary.get("prompts"))),
        ("prompts of the run", _prompts(root)),
        ("reference of the loss", summary.get("reference")),
        ("judge", _flat(summary.get("judge"))),
        ("judge of the evaluation", _flat(summary.get("eval_judge"))),
        ("prefloop", summary["prefloop"]),
        *((f"version of {name}", v) for name, v in sorted((summary.get("versions") or {}).items())),
    ]
    return [(name, clip(str(value), TEXT)) for name, value in known if value not in (None, "")]


def _prompts(root: Path) -> str:
    """Return how many prompts the run has, by split, and which: the digest covers ids and splits."""
    artifact: Artifact[Any] | None = load_artifact(root / "prompts", None)
    if artifact is None:
        return ""
    train = int(artifact.facts.get("train", 0))
    return f"{train:,} to train on, {artifact.rows - train:,} held out, digest {artifact.digest}"


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_flat(v)}" for k, v in value.items() if v is not None)
    return "" if value is None else str(value)


def _recipe(root: Path) -> str:
    path = root / "recipe.yaml"
    return clip(path.read_text(encoding="utf-8", errors="replace"), _RECIPE) if path.is_file() else ""


def _folder(root: Path, number_of_round: int) -> Path:
    return root / f"round-{number_of_round:03d}"


def _steps(folder: Path) -> list[StepLog]:
    return [step for part in _parts(folder / "5-policy", StepLog) for step in part]


def _parts(path: Path, record: type[R]) -> Iterable[list[R]]:
    """Return the parts of an artifact, none where it is not finished."""
    artifact = load_artifact(path, record)
    return artifact.parts() if artifact is not None else ()


def _part_paths(path: Path) -> Iterable[Path]:
    """Return the files of a finished artifact's parts, each compared with its manifest; none where it is not done."""
    artifact: Artifact[Any] | None = load_artifact(path, None)
    return artifact.part_paths() if artifact is not None else ()


def _rows(path: Path, record: type[Any]) -> int | None:
    artifact: Artifact[Any] | None = load_artifact(path, record)
    return None if artifact is None else artifact.rows


def _columns(path: Path, names: list[str]) -> Iterable[Any]:
    """Yield some columns of a finished artifact as Arrow batches: counting needs no texts."""
    if load_artifact(path, None) is not None:
        for part in sorted(path.glob("part-*.parquet")):
            with pq.ParquetFile(part) as file:
                yield from file.iter_batches(columns=names)


def _ends(items: Sequence[R], most: int) -> list[R]:
    """Return all items, or where there are more than `most`, the first few and the last."""
    return list(items) if len(items) <= most else [*items[:_FIRST], *items[_FIRST - most :]]


def _score(value: float | None) -> str:
    return "no score" if value is None else number(value, "score")


def _signed(value: float, unit: str = "score") -> str:
    return f"+{number(value, unit)}" if value > 0 else number(value, unit)


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _seconds(value: float) -> str:
    minutes, hours = value / 60, value / 3600
    if minutes < 2:
        return f"{value:.1f} s"
    return f"{minutes:.1f} min" if hours < 2 else f"{hours:.1f} h"
