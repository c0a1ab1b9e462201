"""`python -m benchmarks.claims`: run the claims, print verdicts, write docs/claims.md. Finished runs are reused.

Those in `more` are run with --more, or by name.
"""

import argparse
import importlib
import os
import pkgutil
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

from rich.console import Console

from benchmarks import claims, machine
from benchmarks.claims import more
from benchmarks.claims.engine import page, results, worlds
from benchmarks.claims.engine.records import Claim, Sizes
from benchmarks.claims.engine.workers import Workers
from prefloop.errors import PrefloopError

console = Console(soft_wrap=True, highlight=False)


def find_claims() -> dict[str, Claim]:
    """Return the claims by name: every module of this package and of `more` that is no package and has a `CLAIM`."""
    return dict(sorted({**_claims_of(claims), **_claims_of(more)}.items()))


def _claims_of(package: ModuleType) -> dict[str, Claim]:
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.ispkg and m.name != "__main__"]
    return {name: importlib.import_module(f"{package.__name__}.{name}").CLAIM for name in names}


def main(arguments: list[str]) -> int:
    """Run what the command line asks for; return the exit status."""
    known = find_claims()
    asked = parser().parse_args(arguments)
    names = asked.claims.split(",") if asked.claims else list(_claims_of(more if asked.more else claims))
    if unknown := [name for name in names if name not in known]:
        console.print(f"--claims: {', '.join(unknown)} unknown; choose from {', '.join(known)}")
        return 2
    sizes = Sizes(quick=True, completions=1) if asked.quick else Sizes()
    out = (asked.out or worlds.ROOT / "runs" / ("claims-quick" if asked.quick else "claims")).resolve()
    failed = False
    with Workers(asked.workers, out, lambda text: console.print(text, style="dim")) as workers:
        for name in names:
            judges = () if known[name].exact else (known[name].judge, *known[name].judges())
            missing = worlds.missing(known[name].needs, judges)
            if missing:
                console.print(f"{name}: skipped, as ../shared/data has no {', '.join(missing)}")
                continue
            try:
                entry = measure(known[name], name, workers, range(asked.seeds), sizes)
            except PrefloopError as error:
                console.print(f"{name}: failed: {error}", style="red", markup=False)
                failed = True
                continue
            entry |= provenance(arguments, asked.workers)
            console.print(f"{name}: {entry['verdict']}")
            page.store(asked.page, name, entry)
            page.write(asked.page, known, sizes)
    return int(failed)


def parser() -> argparse.ArgumentParser:
    """Return the command line's description."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__)
    found.add_argument("--claims", default="", metavar="A,B", help="names of claims, default those not in `more`")
    found.add_argument("--more", action="store_true", help="the claims in `more`")
    found.add_argument("--seeds", type=int, default=5, help="seeds of every arm, default 5")
    found.add_argument("--workers", type=int, default=2, help="processes of one thread each, default 2")
    found.add_argument("--out", type=Path, help="folder of the runs, default runs/claims")
    found.add_argument("--page", type=Path, default=worlds.ROOT / "docs" / "claims.md")
    found.add_argument("--quick", action="store_true", help="tiny sizes: a smoke test, no figures")
    return found


def measure(claim: Claim, name: str, workers: Workers, seeds: range, sizes: Sizes) -> dict[str, object]:
    """Choose learning rates, run every arm and seed, and return the numbers.

    Raises:
        PrefloopError: a run failed.

    """
    if claim.exact:
        return results.exact(claim, seeds, sizes) | {"runs": 0, "minutes": 0.0}
    choosing = results.tuning_jobs(claim, sizes)
    workers.do(choosing, f"{name}, learning rates")
    rates, tuning = results.tune(claim, sizes, workers.out)
    reported = results.report_jobs(claim, rates, seeds, sizes)
    workers.do(reported, name)
    seconds = sum(results.read(job, workers.out)["seconds"] for job in [*choosing, *reported])
    entry = results.summarise(claim, rates, tuning, seeds, sizes, workers.out)
    return entry | {"runs": len(choosing) + len(reported), "minutes": round(seconds / 60, 1)}


def provenance(arguments: list[str], workers: int) -> dict[str, object]:
    """Return how a claim was measured: date, command, machine, versions, load of the machine by others and us."""
    shown = [os.path.relpath(a) if os.path.isabs(a) else a for a in arguments]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "-m", "benchmarks.claims", *shown]),
        "machine": machine.machine("cpu"),
        "versions": machine.versions(),
        "workers": workers,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
