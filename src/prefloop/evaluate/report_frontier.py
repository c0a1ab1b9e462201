"""A run's frontier: reward against KL of the start and of every round's policy, as a chart and in words."""

from collections.abc import Mapping, Sequence

from prefloop.evaluate.charts import Line, Point, line_chart, round_numbers
from prefloop.evaluate.frontier import FrontierPoint, pareto_frontier
from prefloop.evaluate.report_charts import Chart
from prefloop.evaluate.summary import START_ROUND, with_interval
from prefloop.rows import Metric

_MOST = 40  # rounds that are drawn, the last ones
_TAGGED = 8  # rounds up to which each point is named beside it


def frontier_points(
    start: Mapping[str, Metric], rounds: Sequence[tuple[int, Mapping[str, Metric]]]
) -> list[FrontierPoint]:
    """Return the start and the rounds that have both a score and a KL, in order; empty where only the start has.

    Args:
        start: the start policy's metrics.
        rounds: number and metrics of each finished round.

    """
    known = [(n, m) for n, m in rounds if "judge_score" in m and "kl_policy_start" in m][-_MOST:]
    if not known or "judge_score" not in start:
        return []
    unit, estimator = (getattr(known[-1][1]["kl_policy_start"], name) for name in ("unit", "estimator"))
    zero = Metric(0.0, 0.0, 0.0, start["judge_score"].n, unit, estimator)  # by definition
    found = [FrontierPoint(_name(START_ROUND), start["judge_score"], zero)]
    # How completions were drawn is in the estimator's name and in the warnings; the points are of one kind.
    found += [
        FrontierPoint(_name(n), m["judge_score"], Metric(*_ends(m["kl_policy_start"]), unit, estimator))
        for n, m in known
    ]
    return found


def frontier_chart(
    start: Mapping[str, Metric], rounds: Sequence[tuple[int, Mapping[str, Metric]]], accepted: Mapping[int, bool]
) -> list[Chart]:
    """Return score against KL, the line through what no other point beats in both; none where nothing was measured.

    Args:
        start: as in `frontier_points`.
        rounds: as in `frontier_points`.
        accepted: by round, whether it was promoted.

    """
    points = frontier_points(start, rounds)
    if not points:
        return []
    best = pareto_frontier(points)
    kept = {_name(n) for n, yes in accepted.items() if yes}
    lines = [Line("not beaten in both", tuple(Point(p.kl.value, p.reward.value) for p in best), "quiet")]
    for point in points:
        tone = "quiet" if point is points[0] else "a" if point.name in kept else "b"
        note = f"{point.name}: score {with_interval(point.reward)}, KL {with_interval(point.kl)}"
        tag = point.name if len(points) <= _TAGGED else ""
        dot = Point(point.kl.value, point.reward.value, point.reward.low, point.reward.high, note, tag)
        lines.append(Line(point.name, (dot,), tone))
    across = [p.kl.value for p in points]
    ticks = [(v, f"{v:.3g}") for v in round_numbers(min(across), max(across))] if max(across) > min(across) else []
    about = "score against KL(policy ‖ start), nats per token; the line joins what no other point beats in both"
    tones = [("a", "accepted", kept), ("b", "refused", {p.name for p in points[1:]} - kept)]
    legend = tuple((tone, name) for tone, name, some in tones if some)
    return [Chart("Frontier", about, line_chart(lines, f"Frontier: {about}", ticks=ticks), legend)]


def _name(number: int) -> str:
    return "start" if number == START_ROUND else f"round {number}"


def _ends(metric: Metric) -> tuple[float, float, float, int]:
    return metric.value, metric.low, metric.high, metric.n
