"""`python -m benchmarks`: measure, print tables, write docs/benchmarks.md."""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import machine, page, table
from benchmarks.measure import ROOT, ChildFailed, compare
from benchmarks.records import Case, Options, Results
from benchmarks.workloads import LOOPS, WORKLOADS, scaling

STORIES = "../shared/data/tinylm_stories260k/hf"
console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 150)


def main(arguments: list[str]) -> int:
    """Run what the command line asks for; return the exit status."""
    asked = parser().parse_args(arguments)
    stories = "" if asked.quick else story_folder(asked.stories260k)
    options = Options(asked.threads, asked.device, asked.quick, stories)
    names = [name for name in asked.workloads.split(",") if name]
    if unknown := [name for name in names if name not in WORKLOADS]:
        console.print(f"--workloads: {', '.join(unknown)} unknown; choose from {', '.join(WORKLOADS)}")
        return 2
    failed = False
    for name in [*names, *(["scaling"] if asked.scaling else [])]:
        if name in LOOPS and not stories and not asked.quick:
            console.print(f"{name}: no folder {asked.stories260k}: the story model that prefloop ships is used")
        cases = scaling(asked.quick) if name == "scaling" else WORKLOADS[name][1](asked.device, asked.quick)
        for case in cases:
            if asked.cases in case.name:
                failed |= not run_case(case, options, asked, arguments)
    return int(failed)


def parser() -> argparse.ArgumentParser:
    """Return the command line's description."""
    found = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    found.add_argument("--workloads", default=",".join(WORKLOADS), help="comma-separated, default all; '' for none")
    found.add_argument("--cases", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    found.add_argument("--scaling", action="store_true", help="also train on 1k, 10k and 100k pairs")
    found.add_argument("--threads", type=int, default=1, help="CPU threads of every side, default 1")
    found.add_argument("--repeats", type=int, default=3, help="runs of every side, in turn, default 3")
    found.add_argument("--quick", action="store_true", help="tiny sizes: a smoke test, no figures")
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    found.add_argument("--stories260k", default=STORIES, help="model folder of W1 and W5")
    found.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md")
    return found


def story_folder(named: str) -> str:
    """Return the folder of stories260K, or "" for the model that prefloop ships."""
    folder = (ROOT / named).resolve()
    return str(folder) if (folder / "config.json").is_file() else ""


def run_case(case: Case, options: Options, asked: argparse.Namespace, arguments: list[str]) -> bool:
    """Measure one case, print and store it; say whether all went well."""
    entry = page.Entry(
        device=options.device,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=machine.command(arguments),
        machine=machine.machine(options.device),
        versions=machine.versions(),
        threads=options.threads,
        load=machine.load(),
    )
    try:
        results = compare(case, options, asked.repeats, lambda text: console.print(text, style="dim"))
    except ChildFailed as error:
        console.print(str(error), style="red", markup=False)
        return False
    show(case, results, options.device)
    page.store(entry, case, results, asked.out)
    page.write(asked.out)
    return True


def show(case: Case, results: Results, device: str) -> None:
    """Print a measured case."""
    shown = Table(*table.COLUMNS, title=f"{case.workload}: {case.name}")
    for cells in table.rows(results, device):
        shown.add_row(*cells)
    console.print(shown)
    for line in [
        *table.ratio_lines(results),
        *table.bound_lines(results, device),
        *table.detail_lines(results),
    ]:
        console.print(f"  {line}")
    for bar in case.bars:
        console.print(f"  {table.verdict(bar, case, results, device).replace('**', '')}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
