"""`prefloop run --smoke`: every stage on four prompts and one optimizer step, with the user's own model and judge."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prefloop.artifact import set_aside
from prefloop.commands.small import shrunk
from prefloop.components import build_parts
from prefloop.data_needs import check_data
from prefloop.errors import DataError
from prefloop.inputs import held_out, resolve_policy, resolve_prompts
from prefloop.loop import run
from prefloop.protocols import Progress
from prefloop.recipe import Recipe

PROMPTS = (4, 16, 64)
"""Prompts of the first attempt, and of the next ones where no two completions got different scores."""
FOLDER = "smoke"
"""Sub-folder of the run folder."""
ONE_STEP = 1_000_000
"""Pairs of an optimizer step: more than there are, so that there is one step."""
HELD_OUT = 4


@dataclass(frozen=True)
class Smoke:
    """What a smoke run did. `kept` says whether its folder is still there."""

    folder: Path
    kept: bool
    prompts: int
    pairs: int
    steps: int
    seconds: float


def smoke(
    recipe: Recipe,
    root: Path,
    keep: bool = False,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Smoke:
    """Run every stage once in `root`/smoke and remove that folder, unless `keep`; after an error it stays to be read.

    Raises:
        PrefloopError: a stage failed: see `loop.run`.

    """
    folder = root / FOLDER
    began = time.monotonic()
    found = resolve_prompts(recipe)
    check_data(recipe, resolve_policy(recipe), found.train, held_out(recipe, found))
    for number, prompts in enumerate(PROMPTS):
        if folder.exists():
            set_aside(folder, "earlier")
        try:
            summary = run(_small(recipe, prompts), folder, progress=progress, stop=stop)
            break
        except DataError as error:
            if "no pairs" not in str(error) or number == len(PROMPTS) - 1:
                raise
            shutil.rmtree(folder, ignore_errors=True)  # where the data themselves make none, nothing was written
    facts = summary["rounds"][0]["facts"]
    if not keep:
        shutil.rmtree(folder)
        if not any(root.iterdir()):
            root.rmdir()
    seconds = time.monotonic() - began
    return Smoke(folder, keep, prompts, facts["batches"]["pairs"], facts["policy"]["steps"], seconds)


def _small(recipe: Recipe, prompts: int) -> Recipe:
    train = recipe.train.model_copy(update={"pairs_per_step": ONE_STEP, "epochs": 1})
    per_round = {k: v for k, v in recipe.per_round.items() if k not in ("train.pairs_per_step", "train.epochs")}
    needs_margins = build_parts(recipe).order.needs_margins
    return shrunk(recipe, prompts, HELD_OUT, needs_margins, train=train, per_round=per_round)
