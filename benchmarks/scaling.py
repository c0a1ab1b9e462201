"""The update loop on data sets of growing size: what a pair costs and what is held, from disk to step."""

import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from benchmarks.meter import Meter, build_model
from benchmarks.prefloop_side import StepClock, unscored
from benchmarks.records import Measurement, Options
from benchmarks.specs import ScalingSpec, Tokens, TrainSpec, token_pairs
from prefloop.artifact import Artifact, Key, open_artifact
from prefloop.errors import Interrupted
from prefloop.losses.dpo import DPO
from prefloop.models.logps import choose_layout
from prefloop.rows import TokenizedPair
from prefloop.train.job import Job
from prefloop.train.settings import TrainSettings
from prefloop.train.store import PairStore
from prefloop.train.update import train

PAIRS_PER_PART = 512


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
        stored = write_pairs(spec, Path(folder) / "batches")
        began = time.perf_counter()
        pairs = PairStore(stored)
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
            starts_at_reference=False,
        )
        clock = TimedClock(meter)
        with suppress(Interrupted):  # as asked: the first steps are enough
            train(job, clock, lambda: clock.steps >= spec.steps)
    trained = (clock.steps - 1) * spec.pairs_per_step
    return meter.measurement(
        trained,
        trained * int(pairs.pairs.lengths.sum()) // len(pairs),
        **{
            "µs to index a pair": (read - began) / spec.pairs * 1e6,
            "µs to plan a pair": (clock.planned - read) / spec.pairs * 1e6,
            "ms to train a pair": meter.wall / trained * 1e3,
        },
    )


def write_pairs(spec: ScalingSpec, path: Path) -> Artifact[TokenizedPair]:
    """Write the data set part by part as stage 4-batches does; reference log-probs are made up, as cost is all."""
    building = open_artifact(path, Key("batches", {"pairs": spec.pairs}), TokenizedPair)
    for index, first in enumerate(range(0, spec.pairs, PAIRS_PER_PART)):
        count = min(PAIRS_PER_PART, spec.pairs - first)
        building.write_part(index, made_pairs(spec, index, count))
    return building.finish()


def made_pairs(spec: ScalingSpec, part: int, count: int) -> list[TokenizedPair]:
    """Return the `count` pairs of a part."""
    made = token_pairs(TrainSpec(spec.model, 48, 24, count), seed=part)
    return [_scored(f"{part}-{i}", *ids) for i, ids in enumerate(made)]


def _scored(name: str, context: Tokens, chosen: Tokens, rejected: Tokens) -> TokenizedPair:
    pair = unscored(name, context, chosen, rejected)
    # Numbers of their own, not one number many times: they are to take the room that real ones take.
    values = tuple(-6.0 - place / 100 for place in range(len(chosen) + len(rejected)))
    return replace(pair, reference_chosen=values[: len(chosen)], reference_rejected=values[len(chosen) :])
