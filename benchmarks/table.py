"""Medians, ratios and verdicts: from measurements to the cells of a table."""

from collections.abc import Callable, Sequence
from statistics import median

from benchmarks.records import Bar, Case, Measurement, Results

COLUMNS = ("contender", "wall s", "CPU s", "pairs/s", "tokens/s", "peak GB", "before GB", "of matrix peak")
Value = Callable[[Measurement], float]


def wall(m: Measurement) -> float:
    """Return seconds by the clock on the wall."""
    return m.wall


def cpu(m: Measurement) -> float:
    """Return CPU seconds."""
    return m.cpu


def peak(m: Measurement) -> float:
    """Return the most bytes held."""
    return float(m.peak)


def fraction(m: Measurement, device: str) -> float:
    """Return useful FLOP per second (per CPU second on a CPU) over the machine's matrix peak; 0 where unknown."""
    seconds = m.wall if device == "cuda" else m.cpu
    return m.flops / seconds / m.machine_peak if m.machine_peak else 0.0


def mid(measurements: Sequence[Measurement], value: Value) -> float:
    """Return the median."""
    return median(value(m) for m in measurements)


def spread(values: Sequence[float], pattern: str = "{:.2f}") -> str:
    """Return `median (min–max)`."""
    middle, low, high = (pattern.format(v) for v in (median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low}–{high})"


def rows(results: Results, device: str) -> list[list[str]]:
    """Return one row for each contender, in the order of `COLUMNS`; a dash where a column does not apply."""
    return [[label, *_cells(found, device)] for label, found in results.items() if found]


def _cells(found: Sequence[Measurement], device: str) -> list[str]:
    seconds = wall if device == "cuda" else cpu
    pairs = [m.pairs / seconds(m) for m in found]
    tokens = [m.tokens / seconds(m) for m in found]
    shares = [100 * fraction(m, device) for m in found]
    return [
        spread([m.wall for m in found]),
        spread([m.cpu for m in found]),
        f"{median(pairs):.2f}" if found[0].pairs else "–",
        f"{median(tokens):,.0f}" if found[0].tokens else "–",
        spread([m.peak / 1e9 for m in found]),
        f"{mid(found, lambda m: m.base / 1e9):.2f}",
        spread(shares, "{:.0f} %") if found[0].machine_peak else "–",
    ]


def ratio(results: Results, ours: str, rival: str, value: Value) -> tuple[float, str]:
    """Return rival's median over ours, and the same as text with the lowest and highest ratio of one repeat."""
    mine, theirs = results[ours], results[rival]
    middle = mid(theirs, value) / mid(mine, value)
    turns = [value(b) / value(a) for a, b in zip(mine, theirs, strict=True)]
    return middle, f"{middle:.2f}× ({min(turns):.2f}–{max(turns):.2f})"


def ratio_lines(results: Results) -> list[str]:
    """Return how the first contender compares with each other one: speed by both clocks, memory."""
    labels = [label for label, found in results.items() if found]
    lines = []
    for rival in labels[1:]:
        by_wall, by_cpu, memory = (ratio(results, labels[0], rival, value)[1] for value in (wall, cpu, peak))
        lines.append(
            f"{labels[0]} against {rival}: {by_wall} the speed by wall time, {by_cpu} by CPU time; "
            f"{memory} less peak memory"
        )
    return lines


def bound_lines(results: Results, device: str) -> list[str]:
    """Return how fast any exact trainer could be at most: all useful operations at the matrix peak, and nothing else.

    The peak is that of the first contender's precision.
    """
    labels = [label for label, found in results.items() if found]
    ours = results[labels[0]]
    if not ours[0].machine_peak:
        return []
    peak_rate = max(m.machine_peak for m in ours)
    seconds = ours[0].flops / peak_rate
    line = (
        f"bound: {_short(ours[0].flops / 1e9)} G useful operations take {seconds:.3g} s at {peak_rate / 1e9:,.0f} G/s"
    )
    clock = wall if device == "cuda" else cpu
    rivals = [label for label in labels[1:] if not label.startswith(labels[0])]
    most = [f"{mid(results[label], clock) / seconds:.1f} times as fast as {label}" for label in rivals]
    return [f"{line}, so no exact trainer can be more than {' or '.join(most)}" if most else line]


def detail_lines(results: Results) -> list[str]:
    """Return the medians of what else was noted."""
    lines = []
    for label, found in results.items():
        if found and found[0].details:
            parts = [f"{name} {_short(median(m.details[name] for m in found))}" for name in found[0].details]
            lines.append(f"{label}: {', '.join(parts)}")
    return lines


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def verdict(bar: Bar, case: Case, results: Results, device: str) -> str:
    """Return whether a goal was reached, with the figure; speed must be reached by wall time and by CPU time."""
    if not results.get(bar.ours) or (bar.rival and not results.get(bar.rival)):
        return f"{bar.text}: not run"
    if bar.metric == "fraction":
        reached = median(fraction(m, device) for m in results[bar.ours])
        figure = f"{100 * reached:.0f} %"
    elif bar.metric == "memory":
        reached, figure = ratio(results, bar.ours, bar.rival, peak)
        figure += " less"
    else:
        by_wall, figure = ratio(results, bar.ours, bar.rival, wall)
        by_cpu, text = ratio(results, bar.ours, bar.rival, cpu)
        # On a GPU the processor only waits.
        reached = by_wall if device == "cuda" else min(by_wall, by_cpu)
        figure += "" if device == "cuda" else f" by wall time, {text} by CPU time"
    return f"{bar.text}: {'**reached**' if reached >= bar.goal else '**not reached**'}, {figure}"
