"""`python -m benchmarks.large_data`: data sets of millions of rows, from disk to verdicts and to training steps.

Each size is measured in a process of its own, and `docs/large_data.md` is written from what they print:

- pairs: the artifact of stage 4-batches. How long until the first step may begin, what a step takes, memory;
- groups: the artifact of stage 1-samples, 8 completions a prompt, judged by the lexicon through the stage of a run;
- prompts and start: files of prompts, see `benchmarks.large_prompts`.

A large set is made in seconds: its rows are those of `DISTINCT` parts over and over. Every part is a file of its own
and is read, checked and decoded like any other, so that reading costs what it would.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, versions
from benchmarks.meter import KIB, Meter, build_model
from benchmarks.records import Options
from benchmarks.scaling import PAIRS_PER_PART, TimedClock, made_pairs
from benchmarks.specs import ScalingSpec
from prefloop.artifact import Artifact, Key, open_artifact, part_name
from prefloop.components import build_parts
from prefloop.errors import Interrupted
from prefloop.inputs import resolve_prompts
from prefloop.judge.lexicon import Lexicon
from prefloop.launch import read_recipe
from prefloop.losses.dpo import DPO
from prefloop.models.logps import choose_layout
from prefloop.protocols import Quiet, RoundContext
from prefloop.rows import Completion, PolicyRef, Prompt, SampleGroup, TokenizedPair
from prefloop.stages import NamedJudge, Run, judge
from prefloop.train.job import Job
from prefloop.train.settings import TrainSettings
from prefloop.train.store import PairStore
from prefloop.train.update import train

DISTINCT = 64
"""Parts with rows of their own."""
COMPLETIONS = 8
GROUPS_PER_PART = 64
OPTIONS = Options(threads=1)
PAGE = Path("docs/large_data.md")


def repeated(path: Path, key: Key, record: type[Any], parts: int, make: Callable[[int], list[Any]]) -> Artifact[Any]:
    """Return an artifact of `parts` parts, the first `DISTINCT` by `make`, the others copies of those."""
    building = open_artifact(path, key, record)
    for index in range(min(parts, DISTINCT)):
        building.write_part(index, make(index))
    for index in range(DISTINCT, parts):
        shutil.copyfile(path / part_name(index % DISTINCT), path / part_name(index))
    return building.finish()


def measure_pairs(count: int, folder: Path) -> dict[str, float]:
    """Index `count` pairs, plan an epoch and train its first steps."""
    spec = ScalingSpec(count, steps=200)
    stored = repeated(
        folder / "batches",
        Key("batches", {}),
        TokenizedPair,
        count // PAIRS_PER_PART,
        lambda index: made_pairs(spec, index, PAIRS_PER_PART),
    )
    model = build_model(spec.model, OPTIONS)
    clock = TimedClock(Meter(OPTIONS))
    before = memory()
    began = time.perf_counter()
    pairs = PairStore(stored)
    indexed = time.perf_counter()
    job = Job(
        model=model,
        pairs=pairs,
        loss=DPO(),
        settings=TrainSettings(pairs_per_step=spec.pairs_per_step, device="cpu"),
        layout=choose_layout(model)[0],
        seed=0,
        state_folder=folder / "state",
        reference=None,
        starts_at_reference=False,
    )
    with suppress(Interrupted):  # as asked: the first steps are enough
        train(job, clock, lambda: clock.steps >= spec.steps)
    return {
        "rows": len(pairs),
        "seconds until the first step may begin": clock.planned - began,
        "of these, reading and checking": indexed - began,
        "rows read a second": len(pairs) / (indexed - began),
        "pairs trained a second": (clock.steps - 1) * spec.pairs_per_step / clock.meter.wall,
        "GB before": before,
        "GB at the peak": memory(),
    }


def measure_groups(count: int, folder: Path) -> dict[str, float]:
    """Judge `count` prompts of `COMPLETIONS` completions by the lexicon, as stage 2-judged does."""
    recipe, _ = read_recipe("iterative_dpo", ["judge=lexicon", "prompts=embedded"])
    prompts = [p for p in resolve_prompts(recipe).prompts if p.gold]
    start = PolicyRef("embedded", "0" * 16, 0)
    samples = repeated(
        folder / "1-samples",
        Key("samples", {}),
        SampleGroup,
        count // GROUPS_PER_PART,
        lambda index: [_group(prompts, index * GROUPS_PER_PART + i) for i in range(GROUPS_PER_PART)],
    )
    here = Run(folder, recipe, build_parts(recipe), Quiet(), lambda: False, lambda: None)
    before = memory()
    began = time.perf_counter()
    judged = judge(
        here, folder / "2-judged", samples, NamedJudge(Lexicon(), "lexicon"), RoundContext(0, 0, start, start)
    )
    seconds = time.perf_counter() - began
    return {
        "rows": judged.rows,
        "seconds": seconds,
        "completions judged a second": judged.rows * COMPLETIONS / seconds,
        "GB before": before,
        "GB at the peak": memory(),
    }


def _group(prompts: Sequence[Prompt], number: int) -> SampleGroup:
    """Return a prompt with the reference answers of 8 others as its completions."""
    texts = [prompts[(number + i) % len(prompts)].gold or "" for i in range(COMPLETIONS)]
    completions = tuple(Completion(f"{number}-{i}", t, None, None, "stop", i, "gold") for i, t in enumerate(texts))
    prompt = prompts[number % len(prompts)]
    return SampleGroup(replace(prompt, prompt_id=f"{number:016x}"), completions, "0" * 16, 0, 1.0, 1.0)


def memory() -> float:
    """Return the largest resident memory of this process so far, GB (10⁹ bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB / 1e9


MEASURES = {"pairs": measure_pairs, "groups": measure_groups}


def table(found: Sequence[dict[str, float]]) -> list[str]:
    """Return measurements of one kind as a Markdown table, one line for each size."""
    names = list(found[0])
    lines = [" | ".join(names), "|".join(["---"] * len(names))]
    lines += [
        " | ".join(f"{row[name]:,.4g}" if row[name] < 1000 else f"{row[name]:,.0f}" for name in names) for row in found
    ]
    return [f"| {line} |" if index != 1 else f"|{line}|" for index, line in enumerate(lines)]


def main() -> None:
    """Measure every size in turn and write the page; with `--one`, measure in this process and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="10240,102400,1024000,10240000", help="sizes, comma-separated")
    parser.add_argument("--groups", default="1024,10240,102400", help="sizes, comma-separated")
    parser.add_argument("--prompts", default="100000,1000000,3000000", help="sizes, comma-separated")
    parser.add_argument("--start", default="100000,1000000", help="sizes, comma-separated")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "ROWS"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        with tempfile.TemporaryDirectory() as folder:
            sys.stdout.write(json.dumps(MEASURES[asked.one[0]](int(asked.one[1]), Path(folder))) + "\n")
        return
    lines = [
        "# Large data",
        "",
        "`python -m benchmarks.large_data` makes artifacts of growing size, and measures each in a process of its own;",
        "its docstring says what is in them. Memory is the largest resident memory of the process so far.",
    ]
    for kind, sizes in (
        ("pairs", asked.pairs),
        ("groups", asked.groups),
        ("prompts", asked.prompts),
        ("start", asked.start),
    ):
        found = [_MEASURED[kind](kind, size) for size in sizes.split(",") if size]
        lines += ["", f"## {kind.capitalize()}", "", *(table(found) if found else [])]
    lines += ["", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC · 1 thread · {machine('cpu')} · {versions()}"]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _in_a_child(kind: str, size: str) -> dict[str, float]:
    return _said_by("benchmarks.large_data", "--one", kind, size)


def _prompts(_: str, size: str) -> dict[str, float]:
    """Read the same file in both ways, one right after the other."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "prompts.jsonl")
        found = [_said_by("benchmarks.large_prompts", kind, size, "--file", file) for kind in ("read", "plain")]
    return found[0] | {name: value for name, value in found[1].items() if name != "rows"}


def _start(_: str, size: str) -> dict[str, float]:
    return _said_by("benchmarks.large_prompts", "start", size)


_MEASURED = {"pairs": _in_a_child, "groups": _in_a_child, "prompts": _prompts, "start": _start}


def _said_by(module: str, *arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    sys.stderr.write(f"{' '.join(arguments[:2])}: {found}\n")
    return found


if __name__ == "__main__":
    main()
