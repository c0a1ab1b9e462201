"""`docs/claims.md`: written whole from the claims' descriptions and the JSON file of measured numbers beside it."""

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.claims.engine import worlds
from benchmarks.claims.engine.records import Claim, Comparison, Sizes
from benchmarks.claims.engine.stats import STATISTICS, estimate
from prefloop.rows import digest_of

Entry = Mapping[str, Any]
WIDTH = 120
UNEQUAL = 1.05
"""Arms whose completions or updates differ by more than this factor have unequal budgets."""


def store(page: Path, name: str, entry: Entry) -> None:
    """Put a claim's numbers into the JSON file beside the page; the others stay."""
    path = page.with_suffix(".json")
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = dict(sorted({**known, name: entry}.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".writing")
    unfinished.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def write(page: Path, claims: Mapping[str, Claim], sizes: Sizes) -> None:
    """Write the page."""
    path = page.with_suffix(".json")
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    parts = [_head(sizes)]
    if sizes.quick:
        parts.append("**A smoke test at tiny sizes: the figures mean nothing.**\n")
    parts += [_overview(claims, known, sizes)]
    parts += [_section(name, claim, known.get(name), sizes) for name, claim in claims.items()]
    page.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


def _overview(claims: Mapping[str, Claim], known: Mapping[str, Entry], sizes: Sizes) -> str:
    lines = ["| claim | verdict | |", "|---|---|---|"]
    for name, claim in claims.items():
        lines.append(f"| {claim.title} | {_verdict(claim, known.get(name), sizes)} | {claim.source} |")
    return "\n".join([*lines, ""])


def _verdict(claim: Claim, entry: Entry | None, sizes: Sizes) -> str:
    if entry is None:
        return "not measured yet"
    stale = "" if entry["claim"] == digest_of(asdict(claim), asdict(sizes)) else " (before its description changed)"
    return f"**{entry['verdict']}**{stale}"


def _section(name: str, claim: Claim, entry: Entry | None, sizes: Sizes) -> str:
    lines = [f"## {claim.title}", "", f"`{name}` · {claim.source}", "", _wrapped(claim.statement), ""]
    facts = [] if claim.exact else _setting(claim)
    lines += [_wrapped(f"- {fact}", "  ") for fact in [*facts, *claim.notes]]
    lines += ["", "| arm | what it does | recipe | settings |", "|---|---|---|---|"]
    lines += [f"| {arm.name} | {arm.words} | {arm.recipe} | {_code(arm.settings)} |" for arm in claim.arms]
    lines += [""]
    if entry is None:
        return "\n".join([*lines, "Not measured yet.", ""])
    if claim.exact:
        lines += [*_values(claim, entry), ""]
    else:
        lines += [*_numbers(claim, entry), "", *_unequal_budgets(claim, entry), *_looks(claim, entry), ""]
    lines += [
        *_comparisons(claim, entry),
        "",
        *_rounds_made_worse(claim, entry),
        f"Verdict: {_verdict(claim, entry, sizes)}",
        "",
    ]
    lines += [
        f"{entry['date']} · `{entry['command']}` · {len(entry['seeds'])} seeds, {entry['prompts']} held-out prompts · "
        f"{entry['runs']} runs of {entry['minutes']:g} minutes in all, {entry['workers']} at a time · "
        f"{entry['machine']} · {entry['versions']}",
        "",
    ]
    return "\n".join(lines)


def _setting(claim: Claim) -> list[str]:
    judges = _list(worlds.ABOUT[name] for name in claim.quality.judges)
    return [
        f"**World**: {worlds.IN_WORDS[claim.world]}{_start_in_words(claim)}.",
        f"**Training judge**: {worlds.ABOUT[claim.judge]}.",
        f"**Quality**: {claim.quality.words} ({claim.quality.unit}): {judges}.",
        f"**All arms**: {_code(claim.common)} {_rates_in_words(claim)}",
    ]


def _values(claim: Claim, entry: Entry) -> list[str]:
    """Return the table of a claim without runs."""
    found = {arm.name: estimate(entry["arms"][arm.name]["values"]) for arm in claim.arms}
    rows = [f"| {name} | {_interval(e.value, e.low, e.high)} |" for name, e in found.items()]
    return [f"| arm | {claim.quality.words} |", "|---|---|", *rows]


def _numbers(claim: Claim, entry: Entry) -> list[str]:
    """Return the table of budgets and qualities; means over seeds, the end with its interval."""
    numbers = next((arm.revisions for arm in claim.arms if arm.revisions), ())
    columns = f"at the end, with {', '.join(map(str, numbers))} revisions" if numbers else "after each round"
    lines = [
        f"| arm | learning rate | completions | updates | start | {columns} | end |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in claim.arms:
        found = entry["arms"][arm.name]
        if "curves" not in found:
            lines.append(f"| {arm.name} | {found['rate']:g} | – | – | – | every run diverged | – |")
            continue
        means = [estimate(column).value for column in zip(*found["curves"], strict=True)]
        end = estimate([curve[-1] for curve in found["curves"]])
        sampled = f"{found['completions']:.0f}" if claim.data == "prompts" else "the file's"
        failed = f", {found['diverged']} diverged" if found["diverged"] else ""
        lines.append(
            f"| {arm.name} | {found['rate']:g}{_edge(found)} | {sampled} | {found['updates']:.0f} | {means[0]:.1f} | "
            f"{' → '.join(f'{m:.1f}' for m in means[1:])} | {_interval(end.value, end.low, end.high)}{failed} |"
        )
    return lines


def _unequal_budgets(claim: Claim, entry: Entry) -> list[str]:
    """Return a warning where the arms did not get the same."""
    whole = [found for found in entry["arms"].values() if "curves" in found]
    spent = {"updates": [found["updates"] for found in whole]}
    if claim.data == "prompts":
        spent["completions"] = [found["completions"] for found in whole]
    unequal = {what: values for what, values in spent.items() if values and max(values) > UNEQUAL * min(values)}
    if not unequal:
        return []
    found = _list(f"{what} from {min(values):.0f} to {max(values):.0f}" for what, values in unequal.items())
    return [f"**Unequal budgets**: {found}.", ""]


def _edge(found: Entry) -> str:
    """Say how the learning rate was chosen, and whether a better one may lie outside the grid."""
    if len(found["tuning"]) == 1:
        return ""
    values = ", ".join(f"{rate}: {'diverged' if q is None else f'{q:.1f}'}" for rate, q in found["tuning"].items())
    rates = [float(rate) for rate in found["tuning"]]
    return f" ({values}{'; end of the grid' if found['rate'] in (min(rates), max(rates)) else ''})"


def _looks(claim: Claim, entry: Entry) -> list[str]:
    names = claim.judges()
    lines = [
        f"| raw scores, text at the end | {' | '.join(names)} | tokens | repetition | ended by itself | KL to start |",
        "|---" * (len(names) + 5) + "|",
    ]
    whole = {name: found for name, found in entry["arms"].items() if "end" in found}
    rows = [("start", found["start"], None) for found in list(whole.values())[:1]]
    rows += [(name, found["end"], found["kl"]) for name, found in whole.items()]
    for name, look, kl in rows:
        scores = " | ".join(f"{look[judge]:.3f}" for judge in names)
        distance = "–" if kl is None else f"{kl:.2f}"
        text = f"{look['length']:.0f} | {look['repetition']:.3f} | {look['stopped']:.0f} %"
        lines.append(f"| {name} | {scores} | {text} | {distance} |")
    return lines


def _comparisons(claim: Claim, entry: Entry) -> list[str]:
    lines = ["| comparison | of | difference | by seed | p (Holm) | verdict |", "|---|---|---|---|---|---|"]
    for comparison, found in zip(claim.comparisons, entry["comparisons"], strict=False):
        words, against = _statistics_in_words(comparison), " − ".join(_sides(comparison))
        shown = "–" if found["value"] is None else _interval(found["value"], found["low"], found["high"])
        seeds = ", ".join(f"{d:+.1f}" for d in found["differences"])
        p = "–" if found.get("p_holm") is None else f"{found['p_holm']:.2g}"
        lines.append(f"| {comparison.words} | {words}: {against} | {shown} | {seeds} | {p} | **{found['verdict']}** |")
    return lines


def _sides(comparison: Comparison) -> tuple[str, str]:
    """Return both sides in words, each with its statistic if these differ."""
    better, than = " and ".join(comparison.better), " and ".join(comparison.than) or "0"
    if comparison.than_statistic is None:
        return better, than
    return f"{better}, {STATISTICS[comparison.statistic][0]}", f"{than}, {STATISTICS[comparison.than_statistic][0]}"


def _statistics_in_words(comparison: Comparison) -> str:
    words = STATISTICS[comparison.statistic][0] if comparison.than_statistic is None else "quality"
    other = f", in {comparison.quality.words}" if comparison.quality else ""
    more = f", more than {comparison.by:g}" if comparison.by else ""
    return words + other + more


def _rounds_made_worse(claim: Claim, entry: Entry) -> list[str]:
    if all(comparison.statistic != "regressions" for comparison in claim.comparisons):
        return []
    lines = ["| over all seeds | worse, promoted | worse, refused | not worse, refused |", "|---|---|---|---|"]
    for name, found in entry["arms"].items():
        if "worse" in found:
            lines.append(f"| {name} | {' | '.join(map(str, found['worse']))} |")
    return [*lines, ""]


def _interval(value: float, low: float | None, high: float | None) -> str:
    bounded = low is not None and high is not None and abs(low) != float("inf")
    text = f"{value:.1f} [{low:.1f}, {high:.1f}]" if bounded else f"{value:.1f}, no interval"
    return text.replace("-", "−")


def _start_in_words(claim: Claim) -> str:
    return "" if claim.start == "shipped" else ", fine-tuned on the human answers of the training prompts first"


def _rates_in_words(claim: Claim) -> str:
    if all(arm.rate is not None for arm in claim.arms):
        return "Learning rates are part of the claim."
    if len(claim.rates) == 1:
        return f"One learning rate, {claim.rates[0]:g}."
    return f"Learning rate of each arm: the best of {', '.join(f'{rate:g}' for rate in claim.rates)}."


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _list(texts: Iterable[str]) -> str:
    return "; ".join(texts)


def _code(settings: Sequence[str]) -> str:
    return " ".join(f"`{setting}`" for setting in settings)


def _head(sizes: Sizes) -> str:
    facts = [
        f"**Worlds**: {_list(worlds.IN_WORDS.values())}; a world of nine answers whose optima are known. What holds "
        "here need not hold for a model of billions of parameters, nor the reverse: a claim that is not reproduced "
        "here is not refuted.",
        "**Same budget**: the arms of a claim draw the same number of completions and take the same number of updates, "
        "but for prompts that give no pair; the tables show both. Settings of every arm of every claim: "
        f"{_code(worlds.BASE)}. The learning rate is constant within a round, so that several short rounds and a long "
        "one differ in nothing else.",
        "**Learning rates** are chosen for each arm from one grid, the same for all arms of a claim, by quality on "
        f"{sizes.validation} validation prompts with {len(sizes.tuning_seeds)} seeds that are not reported. Nothing "
        "else is tuned. The tables show the qualities, and say where the best lies at the end of the grid.",
        "**Quality** is measured on held-out prompts that were used for nothing else, by judges that no arm sees in "
        "training (unless right and wrong is a matter of rule). A rank is a completion's standing among the starting "
        "policy's, 0–100; of several judges the lowest rank counts, so that no text can please one at the cost of "
        "another. Judges add average text to short completions, so that these cannot win by luck.",
        "**Verdict**: differences are paired by seed. `reproduced`: the 95 % interval (Student's t over seeds) lies on "
        "the claim's side of 0. `opposite`: it lies on the other side. `not reproduced`: it holds 0. A seed changes "
        "samples, order and made data, not prompts or the starting policy, so intervals say nothing of other models. "
        "A claim's comparisons are corrected for their number by Holm's method: `reproduced` and `opposite` need a "
        "corrected p below 0.05 too. Claims are not corrected for the number of claims.",
        "Worlds, judges, budgets and grids were settled on the seeds that choose learning rates, before any reported "
        "seed was run.",
    ]
    return HEAD + "\n".join(_wrapped(f"- {fact}", "  ") for fact in facts) + "\n"


HEAD = """# The papers' claims, tested

`make claims` runs the headline claims of the self-training papers on small worlds, `make claims-more` those of other
papers, and both write this page and [claims.json](claims.json), which has the numbers of every seed. Finished runs stay
in `runs/claims` and are reused, so that a stopped command goes on where it was. `python -m benchmarks.claims --help`
lists the choices. A claim is one file in `benchmarks/claims/`.

## How it is tested

"""
