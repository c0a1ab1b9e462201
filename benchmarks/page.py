"""`docs/benchmarks.md`: the measured part is written anew, what people wrote around it stays.

The measurements themselves lie beside the page as JSON, so that a run of some workloads leaves the others in place.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.records import Case, Measurement, Results
from benchmarks.workloads import SCALING, WORKLOADS

BEGIN = "<!-- measured: begin -->"
END = "<!-- measured: end -->"
NEW_PAGE = f"# Benchmarks\n\n{BEGIN}\n{END}\n"
TITLES = {name: title for name, (title, _) in WORKLOADS.items()} | {"scaling": SCALING}


@dataclass
class Section:
    """The results of one workload's cases, and how they came about."""

    workload: str
    device: str
    date: str
    command: str
    machine: str
    versions: str
    threads: int
    load: float
    """Load average before the workload began."""
    cases: list[tuple[Case, Results]]


def text_of(section: Section) -> str:
    """Return a section as Markdown."""
    lines = [f"## {section.workload}: {TITLES[section.workload]}", ""]
    lines += [
        f"{section.date} · {section.machine} · {section.threads} thread{'s' if section.threads > 1 else ''} · "
        f"load before {section.load:.1f} · {section.versions}",
        "",
        f"`{section.command}`",
        "",
    ]
    for case, results in section.cases:
        lines += [f"### {case.name}", ""]
        if case.note:
            lines += [case.note, ""]
        lines += [_row(table.COLUMNS), "|---" * len(table.COLUMNS) + "|"]
        lines += [_row(cells) for cells in table.rows(results, section.device)]
        lines.append("")
        facts = [*table.ratio_lines(results), *table.detail_lines(results)]
        facts += [table.verdict(bar, case, results, section.device) for bar in case.bars]
        lines += [f"- {fact}" for fact in facts] + [""]
    return "\n".join(lines)


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def store(section: Section, out: Path) -> None:
    """Put a section's measurements into the JSON file beside `out`."""
    path = out.with_suffix(".json")
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    facts = {k: v for k, v in asdict(section).items() if k != "cases"}
    facts["cases"] = {case.name: _plain(results) for case, results in section.cases}
    known[f"{section.workload} {section.device}"] = {**facts, "text": text_of(section)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(results: Results) -> dict[str, list[dict[str, Any]]]:
    return {label: [Measurement.as_dict(m) for m in found] for label, found in results.items()}


def write(out: Path) -> None:
    """Write the measured part of the page `out` from the JSON file beside it."""
    known = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    page = out.read_text(encoding="utf-8") if out.is_file() else NEW_PAGE
    if BEGIN not in page or END not in page:
        page += f"\n{BEGIN}\n{END}\n"
    head, tail = page.partition(BEGIN)[0], page.partition(END)[2]
    order = list(TITLES)
    sections = sorted(known.values(), key=lambda s: (s["device"], order.index(s["workload"])))
    measured = "\n".join(section["text"] for section in sections)
    out.write_text(f"{head}{BEGIN}\n\n{measured}\n{END}{tail}", encoding="utf-8")
