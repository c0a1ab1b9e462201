"""A comparison in words: the sentence on top of its report, and the report as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from prefloop.evaluate.bootstrap import LEVEL
from prefloop.evaluate.comparison import START

_NAMED = 6


def verdict(found: Mapping[str, Any]) -> str:
    """Return what the comparison came to, in two sentences that claim no more than the corrected tests allow."""
    names = [s["name"] for s in found["standings"]]
    first = names[0]
    beaten = [n for n in names if n != first and _better(found, first, n) == first]
    equal = [n for n in names if n != first and _better(found, first, n) is None and _met(found, first, n)]
    opening = "The start comes first" if first == START else f"{first} comes first"
    parts = []
    if beaten:
        parts.append(f"it is really better than {_listed(beaten)}")
    if equal:
        parts.append(f"it cannot be told from {_listed(equal)}")
    real = sum(d["better"] is not None for d in found["duels"])
    worse = [n for n in names if n != START and _better(found, n, START) == START]
    falls = f" Worse than the start: {_listed(worse)}." if worse else ""
    seeds = sorted({s["seeds"] for s in found["standings"] if s["name"] != START})
    counted = (
        f"{seeds[0]} seed{'s' if seeds[0] != 1 else ''}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    )
    if seeds[-1] == 1:
        counted += " (so this is about these policies, not about what another seed would give)"
    if not real:
        near = sum(d["p"] < 1 - LEVEL for d in found["duels"])
        hint = f" {_the(first).capitalize() if first == START else first} comes first all the same"
        hint += f", and uncorrected {near} would pass; more seeds narrow the intervals most." if near else "."
        return (
            f"No difference is shown: {_listed(names)} cannot be told apart after Holm's correction of "
            f"{len(found['duels'])} comparisons, on {found['prompts']} held-out prompts with {counted}.{hint}"
        )
    return (
        f"{opening}: {' and '.join(parts) or 'nothing was compared with it'}. {real} of {len(found['duels'])} "
        f"differences are real at 5 % after Holm's correction, on {found['prompts']} held-out prompts "
        f"with {counted}.{falls}"
    )


def _met(found: Mapping[str, Any], one: str, other: str) -> bool:
    return any({d["one"], d["other"]} == {one, other} for d in found["duels"])


def _better(found: Mapping[str, Any], one: str, other: str) -> Any:
    return next((d["better"] for d in found["duels"] if {d["one"], d["other"]} == {one, other}), None)


def _the(name: str) -> str:
    return f"the {name}" if name == START else name


def _listed(names: Sequence[str]) -> str:
    shown = [_the(n) for n in names]
    if len(shown) > _NAMED:
        return f"{', '.join(shown[:_NAMED])} and {len(shown) - _NAMED} more"
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else shown[0]


def markdown(found: Mapping[str, Any]) -> str:
    """Return the report as Markdown: verdict, warnings, leaderboard, pairs, budget, and a sweep's robustness."""
    lines = ["# Comparison", "", found["verdict"], ""]
    lines += [f"> {text}" for text in found["warnings"]] + [""] * bool(found["warnings"])
    lines += _table(
        ("method", "score", "win rate vs start, %", "Elo", "KL, nats a token", "length, tokens", "seeds"),
        [_leader(s) for s in found["standings"]],
    )
    lines += ["", "## Which differences are real", ""]
    lines += _table(
        ("one", "other", "win rate of one, %", "p", "p, Holm", "better"),
        [
            (d["one"], d["other"], bounded(d["win_rate"], 1), f"{d['p']:.2g}", f"{d['p_holm']:.2g}", d["better"] or "–")
            for d in found["duels"]
        ],
    )
    lines += ["", "## Budget and cost of a run", ""]
    heads = ("method", "samples", "pairs", "updates", "tokens sampled", "tokens trained", "tokens evaluated", "seconds")
    costs = [(s["name"], *(f"{v:,.0f}" for v in s["cost"].values())) for s in found["standings"] if "cost" in s]
    lines += _table(heads, costs)
    lines += _robust_lines(found)
    if found["notes"]:
        lines += ["", "## Notes", "", *(f"- {note}" for note in found["notes"])]
    return "\n".join(lines) + "\n"


def _robust_lines(found: Mapping[str, Any]) -> list[str]:
    """Return the tables of a sweep's robustness and of the other distribution, where there are such."""
    lines = []
    if found["sweeps"]:
        lines += ["", "## Robustness over settings", "", *_table(ROBUST, [_robust(s) for s in found["sweeps"]])]
    ood = found["ood"]
    if ood is None:
        return lines
    lines += ["", f"## Out of distribution: {ood['prompts']} prompts of {ood['source']}", ""]
    lines += [f"> {text}" for text in ood["warnings"]] + [""] * bool(ood["warnings"])
    if ood["sweeps"]:
        rows = [(*_robust(s), f"{s['chosen_rate']:.1f}") for s in ood["sweeps"]]
        lines += [*_table((*ROBUST, "rate of the setting best in distribution, %"), rows), ""]
    heads = ("method", "score", "win rate vs start, %", "KL, nats a token", "length, tokens", "seeds")
    rows = [(row[0], row[1], row[2], *row[4:]) for row in (_leader({**s, "elo": None}) for s in ood["standings"])]
    return lines + _table(heads, rows)


def robustness(found: Mapping[str, Any]) -> Table | None:
    """Return a sweep's robustness for the terminal, in and out of distribution; `None` without a sweep."""
    if not found["sweeps"]:
        return None
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.caption = Text("best setting, quartiles over settings, share of settings that beat the start, KL, length")
    table.caption_justify = "left"
    for index, head in enumerate(("method", "prompts", "best", "win %", "quartiles", "beat %", "KL", "length")):
        table.add_column(head, justify="right" if index > 1 else "left", no_wrap=True)
    sides = [("held out", found["sweeps"])] + ([("ood", found["ood"]["sweeps"])] if found["ood"] else [])
    for name, sweeps in sides:
        for swept in sweeps:
            # The last word of a setting's name, as in the leaderboard.
            short = {**swept, "best": {key.rpartition(".")[2]: value for key, value in swept["best"].items()}}
            cells = _robust(short)
            ranges = (cell.replace(" to ", "–") for cell in cells[6:])
            table.add_row(*(Text(cell) for cell in (cells[0], name, *cells[2:6], *ranges)))
    return table


ROBUST = ("method", "settings", "best", "win rate, %", "quartiles, %", "beat the start, %", "KL", "length")
"""Heads of the table of a sweep's robustness."""


def bounded(metric: Mapping[str, Any] | None, decimals: int) -> str:
    """Return a metric of comparison.json with its interval, "–" for none."""
    if metric is None:
        return "–"
    ends = [metric["low"], metric["high"]]
    written = f"{metric['value']:.{decimals}f}"
    if None not in ends:
        written += f" [{ends[0]:.{decimals}f}, {ends[1]:.{decimals}f}]"
    return written.replace("-", "−")


def leaderboard(found: Mapping[str, Any]) -> Table:
    """Return the leaderboard for the terminal."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.caption, table.caption_justify = Text("95 % intervals over seeds and prompts"), "left"
    for index, head in enumerate(("method", "score", "win % vs start", "Elo", "KL", "length", "seeds")):
        table.add_column(head, justify="right" if index else "left", no_wrap=True)
    for standing in found["standings"]:
        table.add_row(*(Text(cell) for cell in _leader(standing)))
    return table


def _leader(standing: Mapping[str, Any]) -> tuple[str, ...]:
    metrics = standing.get("metrics", {})
    return (
        standing["name"],
        bounded(standing["score"], 3),
        bounded(standing["win_rate_vs_start"], 1),
        bounded(standing["elo"], 0),
        *(f"{metrics[n]['mean']:.{d}f}" if n in metrics else "–" for n, d in (("kl_policy_start", 3), ("length", 1))),
        str(standing["seeds"]),
    )


def _robust(found: Mapping[str, Any]) -> tuple[str, ...]:
    def spread(values: Mapping[str, float] | None, decimals: int) -> str:
        return "–" if values is None else f"{values['least']:.{decimals}f} to {values['most']:.{decimals}f}"

    return (
        found["target"],
        str(found["settings"]),
        ", ".join(f"{k}={v}" for k, v in found["best"].items()),
        f"{found['best_rate']:.1f}",
        " / ".join(f"{q:.1f}" for q in found["quartiles"]),
        f"{100 * found['beat_start']:.0f}",
        spread(found["kl"], 3),
        spread(found["length"], 1),
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return lines + [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
