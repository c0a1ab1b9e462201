"""Two ranks with one thread each against one rank, on W2's model: `python -m benchmarks.ranks [--ranks 2]`, on a CPU.

Each number of ranks trains the same steps in processes of its own, one thread each, and rank 0 times those after the
first. SimPO stands for DPO, whose reference log-probs are stored and cost no time in a step.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.meter import build_model
from benchmarks.prefloop_side import unscored
from benchmarks.records import Options
from benchmarks.specs import ModelSpec, TrainSpec, token_pairs
from prefloop.losses.simpo import SimPO
from prefloop.models.logps import choose_layout
from prefloop.ranks import joined
from prefloop.train.job import Job
from prefloop.train.settings import TrainSettings
from prefloop.train.sharding import shard
from prefloop.train.update import Update


class Clock:
    """A progress that notes when each step ended."""

    def __init__(self) -> None:
        """Begin without a step."""
        self.ends: list[float] = []

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Do nothing."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Note the end of a step."""
        self.ends.append(time.perf_counter())

    def finish(self) -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""


def work(asked: Any) -> None:
    """Train as one rank of several, or alone, and write seconds a step and the losses to a file."""
    torch.set_num_threads(1)
    spec = TrainSpec(ModelSpec(), asked.prompt, asked.completion, pairs=asked.pairs)
    pairs = [unscored(f"p{i}", tuple(c), tuple(y), tuple(n)) for i, (c, y, n) in enumerate(token_pairs(spec))]
    settings = TrainSettings.model_validate(
        {"pairs_per_step": len(pairs), "epochs": asked.steps + 1, "sharding": asked.sharding, "checkpoint_every": 1000}
    )
    model = build_model(spec.model, Options())
    layout = choose_layout(model)[0]
    clock = Clock()
    with joined() as team, tempfile.TemporaryDirectory() as folder:
        shard(model, team, settings, layout)
        job = Job(model, pairs, SimPO(), settings, layout, 0, Path(folder), None, starts_at_reference=False, team=team)
        curve = Update()(job, clock, lambda: False)
        if team.main:
            seconds = (clock.ends[-1] - clock.ends[0]) / (len(clock.ends) - 1)
            Path(asked.result).write_text(json.dumps([seconds, [row.loss for row in curve]]), encoding="utf-8")


def main() -> None:
    """Measure one rank and several, and print seconds a step, the gain, and how far the losses are apart."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--completion", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sharding", default="replicate")
    parser.add_argument("--result", help="for the processes that this starts")
    asked = parser.parse_args()
    if asked.result:
        work(asked)
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, asked.ranks):
            result = Path(folder) / f"{ranks}.json"
            own = ["-m", "benchmarks.ranks", "--result", str(result), *sys.argv[1:]]
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            subprocess.run([sys.executable, *(launcher if ranks > 1 else []), *own], check=True)
            found.append(json.loads(result.read_text(encoding="utf-8")))
    (one, losses), (several, others) = found
    apart = max(abs(a - b) for a, b in zip(losses, others, strict=True))
    sys.stdout.write(
        f"1 rank {one:.3f} s a step, {asked.ranks} ranks {several:.3f} s a step: {one / several:.2f} times as fast; "
        f"losses at most {apart:.1e} apart\n"
    )


if __name__ == "__main__":
    main()
