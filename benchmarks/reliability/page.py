"""`docs/reliability.md`: the table is written anew from the results, what people wrote around it stays."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.reliability.records import Outcome

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
GROUPS = {"file ": "damages", "SIG": "kills"}
"""What kinds of faults count as, by how they begin; others are failures of the machine."""


def group_of(kind: str) -> str:
    """Return whether a kind is one of kills, damages, or failures of the machine."""
    return next((group for begin, group in GROUPS.items() if kind.startswith(begin)), "failures of the machine")


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the results as a Markdown table, one row for each kind, with totals."""
    lines = ["| kind | trials | faults injected | faults survived | bytes lost |", "|---|---|---|---|---|"]
    kinds = sorted({o.kind for o in outcomes}, key=lambda kind: (group_of(kind), kind))
    for kind in kinds:
        lines.append(_row(kind, [o for o in outcomes if o.kind == kind]))
    for group in dict.fromkeys(group_of(kind) for kind in kinds):
        lines.append(_row(f"**all {group}**", [o for o in outcomes if group_of(o.kind) == group]))
    return "\n".join(lines)


def _row(name: str, found: Sequence[Outcome]) -> str:
    survived = sum(o.faults for o in found if o.survived)
    return f"| {name} | {len(found)} | {sum(o.faults for o in found)} | {survived} | {sum(o.lost for o in found)} |"


def endings(outcomes: Sequence[Outcome]) -> str:
    """Say in how many damages the rerun made the same bytes, and in how many it refused by name."""
    found = [o for o in outcomes if group_of(o.kind) == "damages"]
    counts = {how: sum(o.ended == how for o in found) for how in ("same bytes", "told clearly")}
    return (
        f"Of {len(found)} damaged files, a rerun ended in the same bytes {counts['same bytes']} times, and in an error "
        f"that names the file {counts['told clearly']} times."
    )


def write(page: Path, outcomes: Sequence[Outcome], provenance: Sequence[str]) -> None:
    """Write the measured part of `page`."""
    text = page.read_text(encoding="utf-8") if page.is_file() else f"# Reliability\n\n{BEGIN}\n{END}\n"
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    failed = [f"- **not survived**: {o.kind}: {o.name}: {'; '.join(o.problems)}" for o in outcomes if not o.survived]
    parts = [table(outcomes), "", endings(outcomes), "", *failed, *[f"- {line}" for line in provenance]]
    page.write_text(f"{head}{BEGIN}\n\n" + "\n".join(parts) + f"\n\n{END}{tail}", encoding="utf-8")
