"""The run's rounds as a table for the terminal: what `prefloop demo` and `prefloop show` print."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from prefloop.evaluate.summary import START_ROUND, interval, metrics_from_json, number
from prefloop.rows import Metric

_BEST = "★"
_ABSENT = Text("–", style="dim")
_COLUMNS: tuple[tuple[str, str, bool], ...] = (
    ("score", "judge_score", False),
    ("win % vs start", "win_rate_vs_start", True),
    ("win % vs best", "win_rate_vs_best", True),
    ("KL", "kl_policy_start", False),
    ("length", "length", False),
    ("repeat", "repetition", False),
)
"""Heading, metric, and whether its interval is shown: all of them together fit 100 columns."""


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Return one row for the start and one for each round.

    KL is `kl_policy_start` in nats per token, length is in tokens, repetition a share; the 95 % intervals of
    the other metrics are in `summary.json` and the report. Text from the run is never read as markup.

    Args:
        summary: what `summary.json` holds.

    Raises:
        DataError: a metric of the summary cannot be read.

    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=Text(summary["name"] or ""), title_justify="left")
    table.caption = Text(f"{_BEST} best policy · 95 % intervals · KL in nats per token, length in tokens")
    table.caption_justify = "left"
    table.add_column("round", no_wrap=True)
    for heading, _, _ in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("decision", no_wrap=True)
    best = (summary.get("policy_best") or {}).get("round", START_ROUND)
    start = summary.get("start") or {}
    table.add_row("start", *_cells(start.get("metrics") or {}), Text(_BEST if best == START_ROUND else ""))
    for entry in summary["rounds"]:
        table.add_row(
            str(entry["round"]), *_cells(entry["metrics"]), _decision(entry["accepted"], entry["round"] == best)
        )
    return table


def evaluation_table(rows: Sequence[tuple[str, Mapping[str, Metric]]], first: str) -> Table:
    """Return one row for each (label, metrics); win rates are against the row `first`."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.caption, table.caption_justify = Text("95 % intervals · length in tokens"), "left"
    table.add_column("sampling", no_wrap=True)
    shown = [("score", "judge_score"), (f"win % vs {first}", "win_rate_vs_start"), ("length", "length")]
    shown += [("repeat", "repetition"), ("stopped %", "stopped")]
    for heading, _ in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    for label, metrics in rows:
        table.add_row(label, *(_cell(metrics.get(name), name != "repetition") for _, name in shown))
    return table


def tasks_table(metrics: Mapping[str, Metric]) -> Table:
    """Return one row for each metric of a benchmark, with its 95 % interval."""
    table = Table("metric", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("value", justify="right", no_wrap=True)
    for name, metric in metrics.items():
        table.add_row(Text(name), _cell(metric, with_interval=True))
    return table


def _decision(accepted: bool, best: bool) -> Text:
    text = Text("accepted", style="green") if accepted else Text("refused", style="red")
    return text.append(f" {_BEST}", style="bold") if best else text


def _cells(entries: Mapping[str, Any]) -> list[Text]:
    metrics = metrics_from_json(entries)
    return [_cell(metrics.get(name), with_interval) for _, name, with_interval in _COLUMNS]


def _cell(metric: Metric | None, with_interval: bool) -> Text:
    if metric is None:
        return _ABSENT
    text = Text(number(metric.value, metric.unit))
    return text.append(f" {interval(metric)}", style="dim") if with_interval else text
