"""Millions of prompts: how long they take to be read, and how much memory. Each is measured in a process of its own.

- read: `prompts.dataset.read_prompts`, in a process without torch;
- plain: the same rows all in memory (`benchmarks.plain_prompts`), right after it, for comparison;
- start: all that a run does with its prompts before it loads a model: reading, warnings, storing, the first rounds.

Times are of the process, in seconds of the processor, as they hold for a machine that does other work too.
"""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from benchmarks.plain_prompts import read_plainly
from prefloop.prompts.dataset import read_prompts

BYTES = 200
"""Length of a row, about."""
PER_ROUND = 1000
KIB = 1024


def write_prompts(path: Path, rows: int) -> None:
    """Write a JSONL file of `rows` different prompts."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(2000)]
    texts = [" ".join(draw.choices(words, k=40))[: BYTES - 25] for _ in range(997)]
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f'{{"prompt": "{i} {texts[i % 997]}"}}\n' for i in range(rows))


def memory() -> float:
    """Return the largest resident memory of this process so far, GB (10⁹ bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB / 1e9


def measure_read(path: Path) -> dict[str, float]:
    """Read the prompts as a run does, and go through them once."""
    before, began = memory(), time.process_time()
    found = read_prompts(str(path))
    read = time.process_time()
    characters = sum(len(prompt.text) for prompt in found.prompts)
    return {
        "rows": len(found.prompts),
        "GB of rows": characters / 1e9,
        "seconds to read": read - began,
        "seconds to go through": time.process_time() - read,
        "GB before": before,
        "GB at the peak": memory(),
    }


def measure_plain(path: Path) -> dict[str, float]:
    """Read them all into memory."""
    began = time.process_time()
    prompts, _ = read_plainly(str(path))
    return {"seconds, all in memory": time.process_time() - began, "rows": len(prompts), "GB, all in memory": memory()}


def measure_start(path: Path) -> dict[str, float]:
    """Do what a run does with its prompts before it loads a model."""
    from prefloop.check.data import data_warnings  # noqa: PLC0415  torch stays out of the other measurements
    from prefloop.components import build_parts  # noqa: PLC0415
    from prefloop.inputs import held_out, resolve_prompts  # noqa: PLC0415
    from prefloop.launch import read_recipe  # noqa: PLC0415
    from prefloop.protocols import Allotment, Quiet  # noqa: PLC0415
    from prefloop.stages import Run, store_prompts, take_prompts  # noqa: PLC0415

    recipe, _ = read_recipe("iterative_dpo", ["policy=embedded", f"prompts={path}", "judge=lexicon"])
    here = Run(path.parent / "run", recipe, build_parts(recipe), Quiet(), lambda: False, lambda: None)
    before, times = memory(), [time.process_time()]
    prompts = resolve_prompts(recipe)
    held_out(recipe, prompts)
    times.append(time.process_time())
    data_warnings(recipe, prompts)
    times.append(time.process_time())
    store_prompts(here, here.root / "prompts", prompts.prompts, 1)
    times.append(time.process_time())
    for number in range(2):
        take_prompts(here, here.root / f"round-{number:03d}", prompts.train, Allotment(number, 2, PER_ROUND, 0, {}))
    times.append(time.process_time())
    spent = [after - earlier for earlier, after in pairwise(times)]
    return {
        "rows": len(prompts.prompts),
        "seconds to read": spent[0],
        "to look for warnings": spent[1],
        "to store": spent[2],
        f"to choose {PER_ROUND} for a round": spent[3] / 2,
        "GB before": before,
        "GB at the peak": memory(),
    }


MEASURES = {"read": measure_read, "plain": measure_plain, "start": measure_start}


def main() -> None:
    """Measure one thing at one size and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(MEASURES))
    parser.add_argument("rows", type=int)
    parser.add_argument("--file", type=Path, help="where the rows lie, or are to be written; default: made and removed")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = asked.file or Path(folder) / "prompts.jsonl"
        if not path.exists():
            write_prompts(path, asked.rows)
        sys.stdout.write(json.dumps(MEASURES[asked.what](path)) + "\n")


if __name__ == "__main__":
    main()
