"""The prompts that the user brings, resolved before any work; `embedded…` names prefloop's own. Torch-free."""

from importlib.resources import files
from pathlib import Path

from prefloop.errors import ConfigError, DataError
from prefloop.prompts.choice import first_by_id
from prefloop.prompts.dataset import PromptSet, read_prompts
from prefloop.recipe import Recipe
from prefloop.rows import Prompt

EMBEDDED = "embedded"
EMBEDDED_PREFERENCES = "embedded-preferences"
EMBEDDED_SUMS = "embedded-sums"
MIN_HOLDOUT = 20
"""Fewer held-out prompts than this give intervals that decide nothing."""

_PROMPTS = {
    EMBEDDED: "story_prompts.jsonl",
    EMBEDDED_PREFERENCES: "story_preferences.jsonl",
    EMBEDDED_SUMS: "sums_prompts.jsonl",
}


def embedded_prompts(name: str) -> Path | None:
    """Return the file that `name` means: story openings, pairs of continuations, or sums; `None` for a user's path."""
    return Path(str(files("prefloop") / "assets" / _PROMPTS[name])) if name in _PROMPTS else None


def resolve_prompts(recipe: Recipe) -> PromptSet:
    """Return the prompts that the recipe names, split into training and held-out ones.

    Raises:
        ConfigError: none are named, or there is no such file.
        DataError: a row cannot be used, or there are too few prompts.

    """
    if recipe.prompts is None:
        raise ConfigError("prompts: not set; give a .jsonl, .parquet or data-set path (prompts=PATH), or `embedded`")
    settings = recipe.prompts
    found = read_prompts(
        str(embedded_prompts(settings.path) or settings.path),
        column=settings.column,
        gold=settings.gold,
        split=settings.split,
        holdout=settings.holdout,
        limit=settings.limit,
    )
    rows = len(found.prompts)
    if len(found.holdout) < MIN_HOLDOUT:
        raise DataError(
            f"{settings.path}: {rows} prompts leave {len(found.holdout)} held out at "
            f"prompts.holdout={settings.holdout}; the evaluation needs {MIN_HOLDOUT}. Add prompts, or raise "
            "prompts.holdout"
        )
    if not found.train:
        raise DataError(f"{settings.path}: all {rows} prompts are held out; lower prompts.holdout")
    return found


def held_out(recipe: Recipe, prompts: PromptSet) -> list[Prompt]:
    """Return the held-out prompts that every round is evaluated on: the first `evaluate.prompts` by id."""
    return list(first_by_id(prompts.holdout, recipe.evaluate.prompts))
