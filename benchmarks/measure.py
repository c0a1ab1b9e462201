"""Runs contenders in turn, each measurement in a child process.

The parent imports no torch: Linux hands the resident memory of a parent down into the `ru_maxrss` of its children.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from benchmarks.records import Case, Contender, Measurement, Options, Results

ROOT = Path(__file__).resolve().parents[1]


class ChildFailed(RuntimeError):
    """A measurement's process ended with an error; the message is the end of what it wrote."""


def present(case: Case) -> list[Contender]:
    """Return the contenders whose packages are installed."""
    return [c for c in case.contenders if not c.needs or find_spec(c.needs) is not None]


def compare(case: Case, options: Options, repeats: int, say: Callable[[str], None]) -> Results:
    """Run every contender of `case` in turn, A B A B …, `repeats` times.

    Raises:
        ChildFailed: a measurement failed.

    """
    sides = present(case)
    results: Results = {side.label: [] for side in sides}
    for repeat in range(repeats):
        for side in sides:
            found = run_child(case, side, options)
            results[side.label].append(found)
            say(
                f"{case.workload} {case.name} · {side.label} · {repeat + 1}/{repeats}: "
                f"{found.wall:.2f} s, {found.cpu:.2f} CPU s, {found.peak / 1e9:.2f} GB"
            )
    return results


def run_child(case: Case, side: Contender, options: Options) -> Measurement:
    """Measure one contender once.

    Raises:
        ChildFailed: its process ended with an error.

    """
    spec = {"workload": case.workload, "case": case.name, "contender": side.label, "options": asdict(options)}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.child", json.dumps(spec), str(result)],
            cwd=ROOT,
            env=_environment(options, folder),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            end = (done.stdout + done.stderr)[-2000:]
            raise ChildFailed(f"{case.workload} {case.name}, {side.label}: exit status {done.returncode}\n{end}")
        return Measurement(**json.loads(result.read_text(encoding="utf-8")))


def _environment(options: Options, folder: str) -> dict[str, str]:
    """Return the same environment for all sides: thread count, no network, no progress bars, caches in `folder`."""
    return os.environ | {
        "OMP_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": folder,
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore",
    }
