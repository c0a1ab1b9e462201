"""What the user brings: policy and prompts, resolved to files before any work; `embedded…` names prefloop's own."""

from importlib.resources import files
from pathlib import Path

from prefloop.errors import ConfigError, DataError
from prefloop.models import causal_lm
from prefloop.prompts.dataset import PromptSet, read_prompts
from prefloop.recipe import Recipe
from prefloop.rows import PolicyRef, Prompt

EMBEDDED = "embedded"
EMBEDDED_PREFERENCES = "embedded-preferences"
EMBEDDED_SUMS = "embedded-sums"
MIN_HOLDOUT = 20
"""Fewer held-out prompts than this give intervals that decide nothing."""

_POLICIES = {EMBEDDED: "story_model", EMBEDDED_SUMS: "sums_model"}
_PROMPTS = {
    EMBEDDED: "story_prompts.jsonl",
    EMBEDDED_PREFERENCES: "story_preferences.jsonl",
    EMBEDDED_SUMS: "sums_prompts.jsonl",
}


def embedded_policy(name: str = EMBEDDED) -> Path:
    """Return the folder of a model that prefloop ships: the story model, or the one that does sums step by step.

    Raises:
        ValueError: prefloop ships no model of this name.

    """
    if name not in _POLICIES:
        raise ValueError(f"no embedded model {name!r}; there are {', '.join(_POLICIES)}")
    return Path(str(files("prefloop") / "assets" / _POLICIES[name]))


def embedded_prompts(name: str) -> Path | None:
    """Return the file that `name` means: story openings, pairs of continuations, or sums; `None` for a user's path."""
    return Path(str(files("prefloop") / "assets" / _PROMPTS[name])) if name in _PROMPTS else None


def policy_folder(recipe: Recipe) -> Path:
    """Return the folder of the policy that the recipe names; fetches it if it is a hub id.

    Raises:
        ConfigError: none is named, or there is no such folder or hub id.
        DataError: the folder is not a causal language model with safetensors and a tokenizer.

    """
    if recipe.policy is None:
        raise ConfigError("policy: not set; give a save_pretrained folder or a hub id (policy=PATH), or `embedded`")
    named = recipe.policy.path
    folder = embedded_policy(named) if named in _POLICIES else causal_lm.locate(named, recipe.policy.revision)
    causal_lm.check_folder(folder)
    return folder


def resolve_policy(recipe: Recipe) -> PolicyRef:
    """Return the policy that the recipe names, with the digest of its files.

    Raises:
        ConfigError: none is named, or there is no such folder or hub id.
        DataError: the folder is not a causal language model with safetensors and a tokenizer.

    """
    folder = policy_folder(recipe)
    return PolicyRef(str(folder), causal_lm.folder_digest(folder), round=-1)


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
    return sorted(prompts.holdout, key=lambda p: p.prompt_id)[: recipe.evaluate.prompts]
