"""What `prefloop show` prints beside the table of rounds: the report's other parts, for the terminal.

Texts of the run are never read as markup.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.text import Text

from prefloop.evaluate import benchmarks
from prefloop.evaluate.frontier import pareto_frontier
from prefloop.evaluate.report import judged_in, provenance, shown_round
from prefloop.evaluate.report_examples import OUTCOMES, Sample, samples
from prefloop.evaluate.report_frontier import frontier_points
from prefloop.evaluate.summary import START_ROUND, metrics_from_json, number, with_interval
from prefloop.evaluate.text_marks import Part
from prefloop.rows import JudgedGroup

EXAMPLES = 3
"""Prompts before and after that are printed where nothing else is asked."""

_BARS = "▁▂▃▄▅▆▇█"
_BINS = 32
_BESIDE = 8  # rounds whose distributions are printed, the last ones


def details(root: Path, summary: Mapping[str, Any], examples: int = EXAMPLES) -> Iterator[RenderableType]:
    """Yield the metrics of the policy that the report shows, frontier, distributions, examples and provenance.

    Args:
        root: the run folder.
        summary: what `summary.json` holds.
        examples: how many prompts to print before and after.

    Raises:
        DataError: a metric of the summary cannot be read.
        CorruptArtifact: an artifact is damaged.

    """
    rounds = [e["round"] for e in summary["rounds"]]
    shown = shown_round(summary)
    start = judged_in(root, START_ROUND)
    after = judged_in(root, shown) if shown != START_ROUND else []
    sections: list[tuple[str, Iterator[Text]]] = [
        (f"Metrics of round {shown}", _metrics(summary, shown)),
        ("Benchmarks", (_named(*line) for line in benchmarks.lines(benchmarks.read(root), summary))),
        ("Score against KL(policy ‖ start), nats per token", _frontier(summary)),
        ("Scores of held-out completions", _distributions(root, start, rounds[-_BESIDE:])),
        (f"The same prompts before and after round {shown}", _examples(_few(samples(start, after), examples), shown)),
        ("Where this comes from", (_named(name, value) for name, value in provenance(root, summary))),
    ]
    for title, lines in sections:
        found = list(lines)
        if found:
            yield Text(f"\n{title}", style="bold")
            yield from found


def _metrics(summary: Mapping[str, Any], shown: int) -> Iterator[Text]:
    entry = next((e for e in summary["rounds"] if e["round"] == shown), None)
    start = metrics_from_json((summary.get("start") or {}).get("metrics") or {})
    for name, metric in metrics_from_json(entry["metrics"] if entry else {}).items():
        before = f"   start {number(start[name].value, start[name].unit)}" if name in start else ""
        yield _named(name, f"{with_interval(metric)}{before}", 24)


def _frontier(summary: Mapping[str, Any]) -> Iterator[Text]:
    start = metrics_from_json((summary.get("start") or {}).get("metrics") or {})
    points = frontier_points(start, [(e["round"], metrics_from_json(e["metrics"])) for e in summary["rounds"]])
    best = {point.name for point in pareto_frontier(points)}
    for point in points:
        mark = "   not beaten in both" if point.name in best else ""
        yield _named(point.name, f"score {with_interval(point.reward)}   KL {with_interval(point.kl)}{mark}", 24)


def _distributions(root: Path, start: Sequence[JudgedGroup], rounds: Sequence[int]) -> Iterator[Text]:
    found = {"start": _scores(start)} | {f"round {n}": _scores(judged_in(root, n)) for n in rounds}
    found = {name: scores for name, scores in found.items() if len(scores)}
    if not found:
        return
    edges = np.histogram_bin_edges(np.concatenate(list(found.values())), bins=_BINS)
    counts = {name: np.histogram(scores, edges)[0] / len(scores) for name, scores in found.items()}
    top = max(float(shares.max()) for shares in counts.values())
    for name, shares in counts.items():
        bars = "".join(_BARS[min(7, int(8 * share / top))] if share else " " for share in shares)
        mean = number(float(found[name].mean()), "score")
        yield _named(
            name, f"{number(float(edges[0]), 'score')} {bars} {number(float(edges[-1]), 'score')}   mean {mean}"
        )


def _scores(groups: Sequence[JudgedGroup]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([s for g in groups for s in g.scores if s is not None], dtype=np.float64)


def _few(found: Sequence[Sample], most: int) -> list[Sample]:
    """Return the first of each outcome, then the second of each, and so on."""
    by_outcome = [[s for s in found if name in s.outcomes] for name in OUTCOMES]
    turns = (sample for turn in zip_longest(*by_outcome) for sample in turn if sample is not None)
    return list(dict.fromkeys(turns))[:most]


def _examples(found: Sequence[Sample], shown: int) -> Iterator[Text]:
    for sample in found:
        both = sample.marked
        yield Text(f"  {', '.join(sample.titles)}", style="dim")
        yield _text("prompt", None, ((sample.prompt, False),))
        yield _text("start", sample.before_score, both.before)
        yield _text(f"round {shown}", sample.after_score, both.after)


def _text(label: str, score: float | None, parts: Sequence[Part]) -> Text:
    head = f"{label} ({number(score, 'score')})" if score is not None else label
    line = Text(f"  {head}: ", style="dim")
    for text, differs in parts:
        plain = "".join(c if c.isprintable() else " " for c in text)  # no control codes reach the terminal
        line.append(plain, style="bold underline" if differs else "not dim")
    return line


def _named(name: str, value: str, width: int = 24) -> Text:
    plain = "".join(c if c.isprintable() else " " for c in value)
    return Text(f"  {name:<{width}} ", style="dim").append(plain, style="not dim")
