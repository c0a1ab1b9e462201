"""From scores of completions to quality: see `records.Quality`."""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.claims.engine.records import Quality
from benchmarks.claims.engine.stats import Trace

Scores = Mapping[str, Sequence[Sequence[float | None]]]
"""By judge, prompt and completion; `None`: the judge gave no score."""


def trace_of(quality: Quality, measured: Mapping[str, Any]) -> Trace:
    """Return a measured run as qualities of prompts."""
    policies = measured["policies"]
    start = policies[0]["scores"]
    return Trace([per_prompt(quality, p["scores"], start) for p in policies], measured["promoted"])


def per_prompt(quality: Quality, scores: Scores, start: Scores) -> list[float]:
    """Return the quality of each prompt's completions, their mean."""
    if quality.kind == "percent":
        (only,) = quality.judges
        return [100 * mean(s or 0.0 for s in row) for row in scores[only]]
    ranks = {name: _Ranks(start[name]) for name in quality.judges}
    columns = [[[ranks[name](s) for s in row] for row in scores[name]] for name in quality.judges]
    return [mean(min(of_one) for of_one in zip(*rows, strict=True)) for rows in zip(*columns, strict=True)]


class _Ranks:
    """Where a score stands among those of the start, 0–100, ties in the middle; without a score at the bottom."""

    def __init__(self, start: Sequence[Sequence[float | None]]) -> None:
        self.known = sorted(s for row in start for s in row if s is not None)

    def __call__(self, score: float | None) -> float:
        if score is None:
            return 0.0
        return 50 * (bisect_left(self.known, score) + bisect_right(self.known, score)) / len(self.known)
