"""A reward model's run in words and as a table for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from prefloop.evaluate.summary import interval, metrics_from_json, number, with_interval, with_unit
from prefloop.rows import Metric

CHANCE = 50.0
_COLUMNS = (
    ("accuracy %", "accuracy", True),
    ("by length %", "accuracy_length", False),
    ("margin", "reward_margin", False),
    ("best of n: gain", "best_of_n_gain", True),
    ("of possible", "best_of_n_share", False),
)
"""Heading, metric, and whether its interval is shown: all of them together fit 100 columns."""


def reward_table(summary: Mapping[str, Any]) -> Table:
    """Return one row for each round.

    Raises:
        DataError: a metric of the summary cannot be read.

    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=Text(summary["name"] or ""), title_justify="left")
    table.caption = Text("held-out pairs · 95 % intervals · gain in the judge's score")
    table.caption_justify = "left"
    table.add_column("round", no_wrap=True)
    for heading, _, _ in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("decision", no_wrap=True)
    best = summary["policy_best"]["round"]
    for entry in summary["rounds"]:
        metrics = metrics_from_json(entry["metrics"])
        cells = [Text(_cell(metrics.get(name), shown)) for _, name, shown in _COLUMNS]
        decision = ("accepted" if entry["accepted"] else "refused") + " ★" * (entry["round"] == best)
        table.add_row(str(entry["round"]), *cells, Text(decision))
    return table


def _cell(metric: Metric | None, with_its_interval: bool) -> str:
    if metric is None:
        return "–"
    return number(metric.value, metric.unit) + (f" {interval(metric)}" if with_its_interval else "")


def reward_verdict(summary: Mapping[str, Any]) -> str:
    """Return what the run came to, in words that claim no more than the intervals allow."""
    opening = {"failed": "The run failed. ", "running": "The run is not finished. "}.get(summary["state"], "")
    rounds = summary["rounds"]
    if not rounds:
        return f"{opening or 'The run is done. '}No round has a result yet."
    best = summary["policy_best"]["round"]
    entry = next((e for e in rounds if e["round"] == best), rounds[-1])
    metrics = metrics_from_json(entry["metrics"])
    accuracy, length = metrics["accuracy"], metrics["accuracy_length"]
    over = metrics["accuracy_over_length"]
    better = "better than" if over.low > 0 else "worse than" if over.high < 0 else "not to be told from"
    text = (
        f"{opening}The reward model of round {entry['round']} orders {with_interval(accuracy)} of the held-out pairs "
        f"as the data do (chance 50 %), {better} a rule on length alone ({with_unit(length.value, '%')})."
    )
    if "best_of_n_gain" not in metrics:
        return text
    gain = metrics["best_of_n_gain"]
    verb = "raises" if gain.low > 0 else "lowers" if gain.high < 0 else "does not clearly change"
    return f"{text} Choosing the policy's completion by reward {verb} the judge's score: {with_interval(gain)}."


def decide(metrics: Mapping[str, Metric]) -> tuple[bool, tuple[str, ...]]:
    """Return whether a reward model is of use, beyond chance, and why."""
    accuracy, over = metrics["accuracy"], metrics["accuracy_over_length"]
    accepted = accuracy.low > CHANCE
    verb = "excludes" if accepted else "does not exclude"
    beyond = "better than" if over.low > 0 else "not shown to be better than"
    return accepted, (
        f"accuracy {with_interval(accuracy)} {verb} {with_unit(CHANCE, '%')}, chance",
        f"{beyond} a rule on length alone: {with_interval(over)} points",
    )
