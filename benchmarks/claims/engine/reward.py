"""Reward models that stand between preference data and methods that need a score: one for each seed, for every arm."""

import os
import shutil
from pathlib import Path

from prefloop import loop
from prefloop.launch import read_recipe

SETTINGS = (
    "policy=embedded",
    "sampler.kind=given",
    "judge.kind=given",
    "eval_judge.kind=lexicon",
    "evaluate.completions=1",
    "train.learning_rate=3e-4",
    "train.epochs=2",
    "train.pairs_per_step=16",
    "threads=1",
)
"""What the recipe has on the story model."""


def reward_model(rated: Path, seed: int, folder: Path, holdout: float) -> str:
    """Return the folder of a reward model that learned from the training prompts of `rated`; makes it if need be."""
    run = folder / f"reward-{rated.stem}"
    if not run.exists():
        recipe, origins = read_recipe(
            "reward_model", [*SETTINGS, f"prompts.path={rated}", f"prompts.holdout={holdout}", f"seed={seed}"]
        )
        unfinished = folder / f"reward-{rated.stem}.{os.getpid()}"
        loop.run(recipe, unfinished, origins=origins)
        try:
            unfinished.rename(run)
        except OSError:  # another process was faster: its model is the same
            shutil.rmtree(unfinished)
    return str(run / "round-000" / "5-policy")
