"""The update loop on data sets of growing size: what a pair costs and what is held, from disk to step."""

import tempfile
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.meter import Meter, build_model
from benchmarks.prefloop_side import StepClock, unscored
from benchmarks.records import Measurement, Options
from benchmarks.workloads import ScalingSpec, TrainSpec, token_pairs
from prefloop.artifact import Artifact, Key, open_artifact
from prefloop.errors import Interrupted
from prefloop.losses.dpo import DPO
from prefloop.models.logps import choose_layout
from prefloop.rows import TokenizedPair
from prefloop.train.job import Job
from prefloop.train.reference import score_reference
from prefloop.train.settings import TrainSettings
from prefloop.train.update import train

PAIRS_PER_PART = 512
DISTINCT = 512
"""Pairs that are really made and scored; a large data set repeats them on disk."""


class TimedClock(StepClock):
    """Also notes how long the loop took before its first step: the plan of all steps."""

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Note that the plan is made."""
        self.planned = time.perf_counter()


def train_large(spec: ScalingSpec, options: Options) -> Measurement:
    """Read `spec.pairs` pairs as a round does, plan their steps, and time the first ones."""
    model = build_model(spec.model, options)
    layout = choose_layout(model)[0]
    meter = Meter(options)
    with tempfile.TemporaryDirectory() as folder:
        stored = write_pairs(spec, options, Path(folder) / "batches")
        began = time.perf_counter()
        pairs = list(stored)
        read = time.perf_counter()
        job = Job(
            model=model,
            pairs=pairs,
            loss=DPO(),
            settings=TrainSettings(pairs_per_step=spec.pairs_per_step, device=options.device),
            layout=layout,
            seed=0,
            state_folder=Path(folder) / "state",
            reference=None,
            starts_at_reference=True,
        )
        clock = TimedClock(meter)
        with suppress(Interrupted):  # as asked: the first steps are enough
            train(job, clock, lambda: clock.steps >= spec.steps)
    trained = (clock.steps - 1) * spec.pairs_per_step
    return meter.measurement(
        trained,
        trained * sum(len(p.context) + len(p.chosen) + len(p.rejected) for p in pairs) // len(pairs),
        **{
            "µs to read a pair": (read - began) / spec.pairs * 1e6,
            "µs to plan a pair": (clock.planned - read) / spec.pairs * 1e6,
            "ms to train a pair": meter.wall / trained * 1e3,
        },
    )


def write_pairs(spec: ScalingSpec, options: Options, path: Path) -> Artifact[TokenizedPair]:
    """Write the data set as stage 4-batches does; never holds more than a few parts."""
    made = token_pairs(TrainSpec(spec.model, 48, 24, min(DISTINCT, spec.pairs)))
    scored = score_reference(
        build_model(spec.model, options),
        [unscored(str(i), *ids) for i, ids in enumerate(made)],
        layout="shared",
        tokens_per_batch=8192,
    )
    building = open_artifact(path, Key("batches", {"pairs": spec.pairs}), TokenizedPair)
    for index, first in enumerate(range(0, spec.pairs, PAIRS_PER_PART)):
        building.write_part(index, scored[: min(PAIRS_PER_PART, spec.pairs - first)])
    return building.finish()
