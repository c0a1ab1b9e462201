"""From the measured runs of a claim to what its page shows: JSON-ready numbers and verdicts."""

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import inf
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.claims.engine.quality import trace_of
from benchmarks.claims.engine.records import Arm, Claim, Comparison, Job, Quality, Sizes
from benchmarks.claims.engine.runner import MEASURED, folder_of, job_of
from benchmarks.claims.engine.stats import (
    STATISTICS,
    Estimate,
    Trace,
    corrected,
    estimate,
    overall,
    p_value,
    verdict,
)
from prefloop.rows import digest_of

Rates = Mapping[str, float]
"""Learning rate by arm."""
Runs = Mapping[str, Mapping[int, dict[str, Any]]]
"""What runs measured, by arm and seed."""
Tuning = dict[str, dict[str, float | None]]
"""Mean quality on validation prompts, by arm and learning rate; `None`: a run diverged."""


def tuning_jobs(claim: Claim, sizes: Sizes) -> list[Job]:
    """Return the runs that choose learning rates; none where there is nothing to choose."""
    return [
        job_of(claim, arm, rate, seed, sizes)
        for arm in claim.arms
        if len(claim.rates_of(arm)) > 1 and not sizes.quick
        for rate in claim.rates_of(arm)
        for seed in sizes.tuning_seeds
    ]


def report_jobs(claim: Claim, rates: Rates, seeds: Sequence[int], sizes: Sizes) -> list[Job]:
    """Return the runs whose numbers are reported, the arms of one seed together."""
    return [job_of(claim, arm, rates[arm.name], seed, sizes) for seed in seeds for arm in claim.arms]


def read(job: Job, out: Path) -> dict[str, Any]:
    """Return what a job measured."""
    found: dict[str, Any] = json.loads((folder_of(job, out) / MEASURED).read_text(encoding="utf-8"))
    return found


def tune(claim: Claim, sizes: Sizes, out: Path) -> tuple[Rates, Tuning]:
    """Return each arm's best learning rate on validation prompts, and the quality with every one."""
    tuning: Tuning = {}
    for arm in claim.arms:
        if len(claim.rates_of(arm)) == 1 or sizes.quick:
            tuning[arm.name] = {f"{claim.rates_of(arm)[0]:g}": None}
            continue
        tuning[arm.name] = {f"{rate:g}": _at_rate(claim, arm, rate, sizes, out) for rate in claim.rates_of(arm)}
    return {name: float(_best(found)) for name, found in tuning.items()}, tuning


def _at_rate(claim: Claim, arm: Arm, rate: float, sizes: Sizes, out: Path) -> float | None:
    runs = [read(job_of(claim, arm, rate, seed, sizes), out) for seed in sizes.tuning_seeds]
    if any("diverged" in run for run in runs):
        return None
    curves = [trace_of(claim.quality, run).curve() for run in runs]
    # With revisions, all numbers of them count alike: none is preferred by the choice.
    return mean(mean(curve[1:]) if arm.revisions else curve[-1] for curve in curves)


def _best(found: Mapping[str, float | None]) -> str:
    return max(found, key=lambda rate: (found[rate] is not None, found[rate] or 0.0))


def summarise(
    claim: Claim, rates: Rates, tuning: Tuning, seeds: Sequence[int], sizes: Sizes, out: Path
) -> dict[str, Any]:
    """Return all numbers of a claim."""
    runs = {
        arm.name: {seed: read(job_of(claim, arm, rates[arm.name], seed, sizes), out) for seed in seeds}
        for arm in claim.arms
    }
    traces = _traces(claim.quality, runs)
    comparisons = _judged(
        [_compared(c, traces if c.quality is None else _traces(c.quality, runs), seeds) for c in claim.comparisons],
        claim.comparisons,
    )
    return {
        "claim": digest_of(asdict(claim), asdict(sizes)),
        "seeds": list(seeds),
        "prompts": len(next(iter(traces[claim.arms[0].name].values())).quality[0]) if traces[claim.arms[0].name] else 0,
        "arms": {name: _arm(claim, runs[name], traces[name], rates[name], tuning[name]) for name in runs},
        "comparisons": comparisons,
        "verdict": overall([found["verdict"] for found in comparisons]),
    }


def exact(claim: Claim, seeds: Sequence[int], sizes: Sizes) -> dict[str, Any]:
    """Return the numbers of a claim that needs no runs: see `Claim.exact`."""
    module, _, name = claim.exact.partition(":")
    value = getattr(importlib.import_module(module), name)
    traces = {arm.name: {seed: Trace([[float(value(arm.name, seed))]], []) for seed in seeds} for arm in claim.arms}
    comparisons = _judged([_compared(c, traces, seeds) for c in claim.comparisons], claim.comparisons)
    return {
        "claim": digest_of(asdict(claim), asdict(sizes)),
        "seeds": list(seeds),
        "prompts": 0,
        "arms": {name: {"values": [found[seed].curve()[-1] for seed in seeds]} for name, found in traces.items()},
        "comparisons": comparisons,
        "verdict": overall([found["verdict"] for found in comparisons]),
    }


def _traces(quality: Quality, runs: Runs) -> dict[str, dict[int, Trace]]:
    return {
        name: {seed: trace_of(quality, run) for seed, run in found.items() if "diverged" not in run}
        for name, found in runs.items()
    }


def _compared(comparison: Comparison, traces: Mapping[str, Mapping[int, Trace]], seeds: Sequence[int]) -> list[float]:
    """Return the difference of each seed of which no run diverged."""
    measure = STATISTICS[comparison.statistic][1]
    theirs = STATISTICS[comparison.than_statistic or comparison.statistic][1]
    named = (*comparison.better, *comparison.than)
    usable = [seed for seed in seeds if all(seed in traces[name] for name in named)]
    return [
        mean(measure(traces[name][seed]) for name in comparison.better)
        - (mean(theirs(traces[name][seed]) for name in comparison.than) if comparison.than else 0.0)
        for seed in usable
    ]


def _judged(differences: Sequence[Sequence[float]], comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return every comparison's interval and the verdict on it, corrected for their number."""
    found = [estimate(seeds) if seeds else Estimate(0.0, -inf, inf, 0) for seeds in differences]
    said = [
        verdict(Estimate(e.value - c.sign * c.by, e.low - c.sign * c.by, e.high - c.sign * c.by, e.n), c.sign)
        for e, c in zip(found, comparisons, strict=True)
    ]
    final = corrected(said, [p_value(e, c.sign * c.by) for e, c in zip(found, comparisons, strict=True)])
    return [
        {
            "differences": [round(d, 4) for d in seeds],
            "value": e.value if e.n else None,
            "low": e.low if e.n > 1 else None,
            "high": e.high if e.n > 1 else None,
            "p_holm": p if e.n > 1 else None,
            "verdict": words,
        }
        for seeds, e, (words, p) in zip(differences, found, final, strict=True)
    ]


def _arm(
    claim: Claim,
    runs: Mapping[int, dict[str, Any]],
    traces: Mapping[int, Trace],
    rate: float,
    tuning: Mapping[str, float | None],
) -> dict[str, Any]:
    whole = [(runs[seed], trace) for seed, trace in traces.items()]
    facts: dict[str, Any] = {"rate": rate, "tuning": dict(tuning), "diverged": len(runs) - len(whole)}
    if not whole:
        return facts
    worse = [trace.rounds_worse() for _, trace in whole]
    last = [run["policies"][trace.in_force()[-1]] for run, trace in whole]
    first = [run["policies"][0] for run, _ in whole]
    return facts | {
        "curves": [[round(q, 4) for q in trace.curve()] for _, trace in whole],
        "worse": [sum(column) for column in zip(*worse, strict=True)],
        **{name: mean(run[name] for run, _ in whole) for name in ("completions", "pairs", "updates", "seconds")},
        "start": _looks(claim, first),
        "end": _looks(claim, last),
        "kl": mean(run["kl"][-1] for run, _ in whole),
    }


def _looks(claim: Claim, policies: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return means over seeds of raw scores and of what the text looks like."""
    looks = {name: mean(policy[name] for policy in policies) for name in ("length", "repetition", "stopped")}
    for name in claim.judges():
        known = [s for policy in policies for row in policy["scores"][name] for s in row if s is not None]
        looks[name] = mean(known)
    return looks
