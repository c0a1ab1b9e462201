"""`docs/benchmarks.md`: the measured part is written anew, what people wrote around it stays.

The measurements themselves lie beside the page as JSON, so that a run of some workloads leaves the others in place.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import table
from benchmarks.records import Case, Results
from benchmarks.workloads import SCALING, WORKLOADS, case_names

BEGIN = "<!-- measured: begin -->"
END = "<!-- measured: end -->"
NEW_PAGE = f"# Benchmarks\n\n{BEGIN}\n{END}\n"
TITLES = {name: title for name, (title, _) in WORKLOADS.items()} | {"scaling": SCALING}


@dataclass
class Entry:
    """How one case was measured."""

    device: str
    date: str
    command: str
    machine: str
    versions: str
    threads: int
    load: float
    """Load average before the case began."""


def text_of(entry: Entry, case: Case, results: Results) -> str:
    """Return a measured case as Markdown."""
    threads = f"{entry.threads} thread{'s' if entry.threads > 1 else ''}"
    lines = [f"### {case.name}", "", *([case.note, ""] if case.note else [])]
    lines += [_row(table.COLUMNS), "|---" * len(table.COLUMNS) + "|"]
    lines += [_row(cells) for cells in table.rows(results, entry.device)]
    facts = [*table.ratio_lines(results), *table.bound_lines(results, entry.device), *table.detail_lines(results)]
    facts += [table.verdict(bar, case, results, entry.device) for bar in case.bars]
    lines += ["", *[f"- {fact}" for fact in facts]]
    lines += [f"- {entry.date} · {threads} · load before {entry.load:.1f} · `{entry.command}`"]
    lines += [f"- {entry.machine} · {entry.versions}", ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def store(entry: Entry, case: Case, results: Results, out: Path) -> None:
    """Put a case's measurements into the JSON file beside `out`."""
    path = out.with_suffix(".json")
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # A case that was renamed or removed does not stay on the page for ever.
    known = {name: e for name, e in known.items() if e["case"] in case_names(e["workload"], e["device"])}
    known[f"{case.workload} {entry.device} {case.name}"] = {
        "workload": case.workload,
        "case": case.name,
        **asdict(entry),
        "results": {label: [m.as_dict() for m in found] for label, found in results.items()},
        "text": text_of(entry, case, results),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write(out: Path) -> None:
    """Write the measured part of the page `out` from the JSON file beside it."""
    known = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    page = out.read_text(encoding="utf-8") if out.is_file() else NEW_PAGE
    if BEGIN not in page or END not in page:
        page += f"\n{BEGIN}\n{END}\n"
    head, tail = page.partition(BEGIN)[0], page.partition(END)[2]
    parts = []
    for name, title in TITLES.items():
        if found := [entry["text"] for entry in known.values() if entry["workload"] == name]:
            parts += [f"## {name}: {title}\n", *found]
    measured = "\n".join(parts)
    out.write_text(f"{head}{BEGIN}\n\n{measured}\n{END}{tail}", encoding="utf-8")
