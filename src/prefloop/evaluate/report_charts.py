"""What the report draws: metrics by round, scores as histograms, training by step."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from prefloop.evaluate.bootstrap import FloatArray
from prefloop.evaluate.charts import MOST_POINTS, Line, Point, histogram, line_chart, thinned
from prefloop.evaluate.summary import START_ROUND, number, with_interval, with_unit
from prefloop.rows import JudgedGroup, Metric, StepLog

Metrics = Mapping[str, Metric]

BY_DEFINITION = {
    "win_rate_vs_start": Metric(50.0, 50.0, 50.0, 0, "%"),
    "kl_policy_start": Metric(0.0, 0.0, 0.0, 0, "nats per token"),
}
"""What the start scores against itself: not measured, but where the curves begin."""

_BINS = 24
_DODGE = 0.08  # rounds by which two lines with intervals are moved apart, so that neither hides the other
_FEWEST_POINTS = 12  # of a round's training curve, however many rounds share the chart
_MANY_ROUNDS = 60  # beyond this, points are drawn as means of neighbours and rounds are not ruled off


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing with its heading, what it shows in words, and where it has several lines, (colour, name) of each."""

    title: str
    about: str
    drawing: Markup
    legend: tuple[tuple[str, str], ...] = ()


def round_charts(start: Metrics, rounds: Sequence[tuple[int, Metrics]]) -> list[Chart]:
    """Return score, win rates, KL, length, repetition and stopping by round, the start first.

    Args:
        start: the start policy's metrics.
        rounds: number and metrics of each finished round, in order. None: no charts.

    """
    measured = {name for _, metrics in rounds for name in metrics}
    at_start = {name: metric for name, metric in BY_DEFINITION.items() if name in measured}
    columns = [(START_ROUND, {**at_start, **start}), *rounds]
    drawn = (
        _by_round(columns, "Score", "mean score of the judge", {"judge_score": "score"}),
        _by_round(
            columns,
            "Win rate",
            "%, ties half; dashed: equal",
            {"win_rate_vs_start": "against the start", "win_rate_vs_best": "against the best before it"},
            reference=50.0,
        ),
        _by_round(columns, "KL(policy ‖ start)", "nats per token", {"kl_policy_start": "KL"}),
        _by_round(columns, "Length", "tokens", {"length": "length"}),
        _by_round(columns, "Repetition", "share of repeated 3-grams", {"repetition": "repetition"}),
        _by_round(columns, "Stopped", "% of completions that end by themselves", {"stopped": "stopped"}),
    )
    return [chart for chart in drawn if chart is not None and rounds]


def histograms(start: Sequence[JudgedGroup], judged: Mapping[int, Sequence[JudgedGroup]]) -> list[Chart]:
    """Return the distribution of held-out scores of each round, the start's as outline, over common bins and
    heights.

    Args:
        start: the start policy's judged completions.
        judged: those of each round, by its number. None: the start alone is drawn.

    """
    before = _scores(start)
    scores = {n: found for n, groups in judged.items() if len(found := _scores(groups))}
    if not scores and len(before):
        scores = {START_ROUND: before}
    if not scores:
        return []
    edges = np.histogram_bin_edges(np.concatenate([before, *scores.values()]), bins=_BINS)
    behind = _shares(before, edges)
    bars = {n: _shares(found, edges) for n, found in scores.items()}
    top = 1.08 * max(float(share.max()) for share in (behind, *bars.values()))
    charts = []
    for n, found in scores.items():
        title = "Start" if n == START_ROUND else f"Round {n}"
        about = f"{len(found):,} completions, mean {number(float(found.mean()), 'score')}"
        drawing = histogram(
            bars[n].tolist(), behind.tolist(), edges.tolist(), f"Scores of {title.lower()}: {about}", top
        )
        charts.append(Chart(title, about, drawing))
    return charts


def step_charts(rounds: Sequence[Sequence[StepLog]]) -> list[Chart]:
    """Return the training curves, the steps of all rounds one after another.

    Args:
        rounds: the step logs of each round that trained, in order.

    """
    if not any(rounds):
        return []
    return [
        _by_step(rounds, "Loss", "mean over the pairs of a step", {"loss": lambda s: s.loss}),
        _by_step(rounds, "Margin", "of implicit rewards, chosen − rejected", {"margin": lambda s: s.margin}),
        _by_step(rounds, "Accuracy", "share of pairs with a margin above 0", {"accuracy": lambda s: s.accuracy}),
        _by_step(
            rounds,
            "Saturation",
            "mean σ(−margin); near 0 the pairs teach nothing any more",
            {"saturation": lambda s: s.saturation},
        ),
        _by_step(
            rounds,
            "Log-probs of the policy",
            "nats, summed over a completion",
            {"chosen": lambda s: s.chosen_logp, "rejected": lambda s: s.rejected_logp},
        ),
        _by_step(rounds, "Gradient norm", "before clipping", {"norm": lambda s: s.grad_norm}),
        *_gradient_chart(rounds),
        *_extra_charts(rounds),
    ]


def _gradient_chart(rounds: Sequence[Sequence[StepLog]]) -> list[Chart]:
    """Return how hard the loss pulls at either side, over the steps that know."""
    having = [kept for steps in rounds if (kept := [s for s in steps if s.chosen_gradient is not None])]
    lines: dict[str, Callable[[StepLog], float]] = {
        "chosen": lambda s: math.nan if s.chosen_gradient is None else s.chosen_gradient,
        "rejected": lambda s: math.nan if s.rejected_gradient is None else s.rejected_gradient,
    }
    return [_by_step(having, "Gradient weight", "|∂loss/∂log π(y)| of either side", lines)] if having else []


def _extra_charts(rounds: Sequence[Sequence[StepLog]]) -> list[Chart]:
    """Return a curve of each number that a loss or trainer logs of its own, over the steps that have it."""
    names = dict.fromkeys(value.name for steps in rounds for step in steps for value in step.extra)

    def read(name: str) -> Callable[[StepLog], float]:
        return lambda step: next((v.value for v in step.extra if v.name == name), math.nan)

    charts = []
    for name in names:
        having = [kept for steps in rounds if (kept := [s for s in steps if any(v.name == name for v in s.extra)])]
        charts.append(_by_step(having, name.replace("_", " ").capitalize(), "mean over a step", {name: read(name)}))
    return charts


def _by_round(
    columns: Sequence[tuple[int, Metrics]],
    title: str,
    about: str,
    names: Mapping[str, str],
    reference: float | None = None,
) -> Chart | None:
    lines = []
    for place, (name, known_as) in enumerate(names.items()):
        shift = (place - (len(names) - 1) / 2) * _DODGE
        points = tuple(_point(n, metrics[name], shift) for n, metrics in columns if name in metrics)
        if points:
            lines.append(Line(known_as, thinned(points, _MANY_ROUNDS), "ab"[place]))
    if not lines:
        return None
    ticks = [(float(n), _round_name(n, "")) for n, _ in columns]
    drawing = line_chart(lines, f"{title} by round, {about}", ticks=ticks, reference=reference)
    return Chart(title, about, drawing, _legend(lines))


def _point(n: int, metric: Metric, shift: float) -> Point:
    found = with_interval(metric) if metric.n else f"{with_unit(metric.value, metric.unit)} by definition"
    note = f"{_round_name(n, 'round ')}: {found}"
    return Point(n + shift, metric.value, metric.low, metric.high, note)


def _round_name(n: int, before: str) -> str:
    return "start" if n == START_ROUND else f"{before}{n}"


def _by_step(
    rounds: Sequence[Sequence[StepLog]], title: str, about: str, values: Mapping[str, Callable[[StepLog], float]]
) -> Chart:
    ends = np.cumsum([len(logs) for logs in rounds]).tolist()
    # A line that ran on from one round to the next would show a jump where training began anew.
    joined = len(rounds) > _MANY_ROUNDS
    most = MOST_POINTS if joined else max(_FEWEST_POINTS, MOST_POINTS // len(rounds))
    runs = [[step for logs in rounds for step in logs]] if joined else rounds
    firsts = [1] if joined else [1, *(end + 1 for end in ends)]
    lines = [
        Line(name, thinned([Point(float(i), value(s)) for i, s in enumerate(run, first)], most), "ab"[place])
        for place, (name, value) in enumerate(values.items())
        for run, first in zip(runs, firsts, strict=False)
    ]
    rules = [] if joined else [end + 0.5 for end in ends[:-1]]
    return Chart(title, about, line_chart(lines, f"{title} by step, {about}", rules=rules), _legend(lines))


def _legend(lines: Sequence[Line]) -> tuple[tuple[str, str], ...]:
    known = dict.fromkeys((line.tone, line.name) for line in lines)
    return tuple(known) if len(known) > 1 else ()


def _scores(groups: Iterable[JudgedGroup]) -> FloatArray:
    return np.array([s for g in groups for s in g.scores if s is not None], dtype=np.float64)


def _shares(scores: FloatArray, edges: FloatArray) -> FloatArray:
    counts = np.histogram(scores, edges)[0].astype(np.float64)
    return counts / max(1, len(scores))
