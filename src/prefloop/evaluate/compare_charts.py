"""What a comparison draws: learning curves, reward against KL, and win rates as bars with intervals."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from markupsafe import Markup, escape

from prefloop.evaluate.charts import Line, Point, line_chart, round_numbers
from prefloop.evaluate.comparison import START
from prefloop.evaluate.frontier import FrontierPoint, pareto_frontier
from prefloop.evaluate.report_charts import Chart
from prefloop.rows import Metric

TONES = 8
"""Colours of the page, `t0` to `t7`; then they begin anew."""

_MOST_LINES = 16  # of one chart; the best come first
_DODGE = 0.05
_BAR = 150.0  # width of an interval's drawing; 0 to 100 %


def charts(found: Mapping[str, Any]) -> list[Chart]:
    """Return the charts of a comparison, as `comparison.json` holds it."""
    methods = [s for s in found["standings"] if s["name"] != START][:_MOST_LINES]
    tones = {s["name"]: f"t{i % TONES}" for i, s in enumerate(methods)}
    drawn = [
        _frontier(methods, tones, found),
        _curve(methods, tones, "judge_score", "Score by round", "mean score of the judge"),
        _curve(methods, tones, "win_rate_vs_start", "Win rate by round", "% against the start; dashed: equal", 50.0),
        _curve(methods, tones, "kl_policy_start", "KL by round", "KL(policy ‖ start), nats per token"),
        _curve(methods, tones, "length", "Length by round", "tokens of a held-out completion"),
    ]
    return [chart for chart in drawn if chart is not None]


def _curve(
    methods: Sequence[Mapping[str, Any]],
    tones: Mapping[str, str],
    name: str,
    title: str,
    about: str,
    reference: float | None = None,
) -> Chart | None:
    """Return the policy in force after each round: the mean over seeds, upright bars from the least to the most."""
    lines, rounds = [], 0
    for place, method in enumerate(methods):
        curves = [run["curve"] for run in method["runs"] if "curve" in run]
        points = []
        for number in range(max((len(c) for c in curves), default=0)):
            values = [c[number][name] for c in curves if number < len(c) and name in c[number]]
            if values:
                ends = f"{min(values):.4g} to {max(values):.4g}"
                note = f"{method['name']}, {_round(number)}: {mean(values):.4g}, seeds {ends}"
                shift = (place - (len(methods) - 1) / 2) * _DODGE
                points.append(Point(number + shift, mean(values), min(values), max(values), note))
        rounds = max(rounds, len(points))
        if points:
            lines.append(Line(method["name"], tuple(points), tones[method["name"]]))
    if not lines:
        return None
    ticks = [(float(n), _round(n)) for n in range(rounds)]
    legend = tuple((line.tone, line.name) for line in lines)
    return Chart(title, about, line_chart(lines, f"{title}: {about}", ticks=ticks, reference=reference), legend)


def _round(number: int) -> str:
    return "start" if number == 0 else f"round {number - 1}"


def _frontier(methods: Sequence[Mapping[str, Any]], tones: Mapping[str, str], found: Mapping[str, Any]) -> Chart | None:
    """Return score against KL; the dashed line joins the methods that none beats in both."""
    known = [m for m in methods if "kl_policy_start" in m["metrics"]]
    if not known:
        return None
    start = next(s["score"] for s in found["standings"] if s["name"] == START)
    at = [_point(m["name"], m["score"], m["metrics"]["kl_policy_start"]) for m in known]
    at.append(_point(START, start, {"mean": 0.0, "least": 0.0, "most": 0.0}))
    best = pareto_frontier(at)
    lines = [Line("frontier", tuple(Point(p.kl.value, p.reward.value) for p in best), "front")] if len(best) > 1 else []
    for point in at:
        note = f"{point.name}: score {point.reward.value:.3f}, KL {point.kl.value:.3f}"
        dot = Point(point.kl.value, point.reward.value, point.reward.low, point.reward.high, note)
        lines.append(Line(point.name, (dot,), tones.get(point.name, "quiet")))
    most = max(p.kl.value for p in at)
    ticks = [(v, f"{v:.3g}") for v in round_numbers(0.0, most)] if most > 0 else [(0.0, "0")]
    legend = tuple((line.tone, line.name) for line in lines if line.tone != "front")
    about = "score against KL from the start, nats per token, means over seeds; grey line: not beaten in both"
    return Chart("Frontier", about, line_chart(lines, f"Frontier: {about}", ticks=ticks), legend)


def _point(name: str, score: Mapping[str, Any], kl: Mapping[str, float]) -> FrontierPoint:
    low, high = (score["value"] if score[end] is None else score[end] for end in ("low", "high"))
    reward = Metric(score["value"], low, high, score["n"], "score")
    return FrontierPoint(name, reward, Metric(kl["mean"], kl["least"], kl["most"], score["n"], "nats per token"))


def interval_bar(metric: Mapping[str, Any] | None) -> Markup:
    """Return a win rate as a dot with its interval between 0 and 100 %, the dashed middle at 50 %."""
    if metric is None:
        return Markup("")
    low, value, high = (_BAR * metric[end] / 100 for end in ("low", "value", "high"))
    label = f"{metric['value']:.1f} %, interval {metric['low']:.1f} to {metric['high']:.1f}"
    return Markup(
        f'<svg class="bar" viewBox="0 0 {_BAR:g} 14" role="img" aria-label="{escape(label)}">'
        f'<line class="reference" x1="{_BAR / 2:g}" x2="{_BAR / 2:g}" y1="0" y2="14"/>'
        f'<line class="reach" x1="{low:.1f}" x2="{high:.1f}" y1="7" y2="7"/>'
        f'<circle cx="{value:.1f}" cy="7" r="3.5"/></svg>'
    )
