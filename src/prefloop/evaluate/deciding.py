"""What a gate decides by: the metric at the level that the rounds' shared error rate leaves, and how much more data
would settle it.

A percentile far out in the tail needs more resamples than one at 95 %: their number grows so that as many as ever lie
beyond an end, up to `MOST_RESAMPLES`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil

from prefloop.evaluate.bootstrap import LEVEL, RESAMPLES, paired_bootstrap
from prefloop.evaluate.heldout import differences
from prefloop.evaluate.text_metrics import PERCENT
from prefloop.evaluate.win_rate import sample_size_advice
from prefloop.rows import JudgedGroup, Metric

MOST_RESAMPLES = 100_000
POINTS = 2.0
"""Difference in percentage points that the advice is about."""
EVEN = 50.0

_HIGHEST = 1 - 1e-9  # a level so near 1 that the ends are those of all resamples


def at_level(
    metrics: Mapping[str, Metric],
    name: str,
    groups: Sequence[JudgedGroup],
    rival: Sequence[JudgedGroup],
    level: float,
    seed: int = 0,
) -> dict[str, Metric]:
    """Return `metrics` with the interval of `name` at `level`; as they are where it is 95 % or was not measured.

    Args:
        metrics: from `heldout.candidate_metrics`.
        name: a win rate or a gain.
        groups: the candidate's judged completions.
        rival: those that the metric compares with: the start's or the best's.
        level: coverage, 0–1.
        seed: of the bootstrap.

    """
    if level == LEVEL or name not in metrics:
        return dict(metrics)
    found = paired_bootstrap(
        differences(name, groups, rival),
        seed=seed,
        resamples=resamples_at(level),
        level=min(level, _HIGHEST),
        bounds=PERCENT if name.startswith("win_rate") else None,
    )
    return {**metrics, name: replace(metrics[name], low=found.low, high=found.high, level=level)}


def resamples_at(level: float) -> int:
    """Return how many resamples leave as many beyond an end as `RESAMPLES` do at 95 %, `MOST_RESAMPLES` at most."""
    return min(MOST_RESAMPLES, max(RESAMPLES, ceil(RESAMPLES * (1 - LEVEL) / (1 - min(level, _HIGHEST)))))


def advice(metric: Metric, name: str, groups: Sequence[JudgedGroup], rival: Sequence[JudgedGroup]) -> str | None:
    """Return how many prompts would show `POINTS`, where a win rate tells neither better nor worse; else `None`."""
    if not name.startswith("win_rate") or not metric.low <= EVEN <= metric.high or metric.n < 2:
        return None
    preference = [value / 100 for value in differences(name, groups, rival)]
    words = sample_size_advice(preference, POINTS, level=metric.level)
    return f"inconclusive: {words}. More held-out prompts: evaluate.prompts and prompts.holdout"
