"""What the report draws of the 3D diagnosis, round by round."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefloop.evaluate.charts import Line, Point, line_chart, thinned
from prefloop.evaluate.report_charts import Chart
from prefloop.evaluate.summary import metric_from_json, with_interval
from prefloop.rows import Metric

Found = Mapping[str, Any]

_MANY_ROUNDS = 60  # beyond this, points are drawn as means of neighbours


def displacement_charts(rounds: Sequence[tuple[int, Found]]) -> list[Chart]:
    """Return changes of log-probs, what became of held-out texts, unseen samples, and entropy.

    Args:
        rounds: number and diagnosis of each round, as `summary.json` holds it. None: no charts.

    """
    pairs = {"chosen": _change("chosen"), "rejected": _change("rejected")}
    held_out = {"chosen": _change("held_out_chosen"), "rejected": _change("held_out_rejected")}
    gold = {"reference answers": _change("gold"), "the start's samples": _change("start_samples")}
    about = "change in the round, nats per token"
    drawn = (
        _chart(rounds, "The round's pairs", about, pairs, 0.0),
        _chart(rounds, "Rollouts", about, {"rollouts": _change("rollouts")}, 0.0),
        _chart(rounds, "Held-out pairs", about, held_out, 0.0),
        _chart(rounds, "Other held-out texts", about, gold, 0.0),
        _chart(rounds, "Unseen samples", "share, dashed: the start", {"unseen": lambda d: _metric(d["unseen"])}, 0.05),
        _chart(
            rounds,
            "Entropy",
            "−mean log π of own samples, nats per token; dashed: the start",
            {"entropy": lambda d: _metric(d["entropy"])},
            next((d["entropy_start"]["value"] for _, d in rounds if d["entropy_start"]), None),
        ),
    )
    return [chart for chart in drawn if chart is not None]


def _change(kind: str) -> Callable[[Found], Metric | None]:
    return lambda found: _metric(found["logps"].get(kind, {}).get("change"))


def _metric(entry: Mapping[str, Any] | None) -> Metric | None:
    return None if entry is None or entry["value"] is None else metric_from_json(entry)


def _chart(
    rounds: Sequence[tuple[int, Found]],
    title: str,
    about: str,
    lines: Mapping[str, Callable[[Found], Metric | None]],
    reference: float | None,
) -> Chart | None:
    drawn = []
    for tone, (name, read) in zip("ab", lines.items(), strict=False):
        points = [_point(n, metric) for n, found in rounds if (metric := read(found)) is not None]
        if points:
            drawn.append(Line(name, thinned(points, _MANY_ROUNDS), tone))
    if not drawn:
        return None
    ticks = [(float(n), str(n)) for n, _ in rounds]
    drawing = line_chart(drawn, f"{title} by round, {about}", ticks=ticks, reference=reference)
    legend = tuple((line.tone, line.name) for line in drawn)
    return Chart(title, about, drawing, legend if len(legend) > 1 else ())


def _point(n: int, metric: Metric) -> Point:
    return Point(float(n), metric.value, metric.low, metric.high, f"round {n}: {with_interval(metric)}")
