"""The policy that the user brings, resolved to a folder before any work; prompts are in `prompt_inputs`."""

from importlib.resources import files
from pathlib import Path

from prefloop.errors import ConfigError
from prefloop.models import causal_lm
from prefloop.prompt_inputs import (
    EMBEDDED,
    EMBEDDED_PREFERENCES,
    EMBEDDED_SUMS,
    MIN_HOLDOUT,
    embedded_prompts,
    held_out,
    resolve_prompts,
)
from prefloop.recipe import Recipe
from prefloop.remote import fetched_folder, is_address
from prefloop.rows import PolicyRef

__all__ = [
    "EMBEDDED",
    "EMBEDDED_PREFERENCES",
    "EMBEDDED_SUMS",
    "MIN_HOLDOUT",
    "embedded_policy",
    "embedded_prompts",
    "held_out",
    "policy_folder",
    "resolve_policy",
    "resolve_prompts",
]

_POLICIES = {EMBEDDED: "story_model", EMBEDDED_SUMS: "sums_model"}


def embedded_policy(name: str = EMBEDDED) -> Path:
    """Return the folder of a model that prefloop ships: the story model, or the one that does sums step by step.

    Raises:
        ValueError: prefloop ships no model of this name.

    """
    if name not in _POLICIES:
        raise ValueError(f"no embedded model {name!r}; there are {', '.join(_POLICIES)}")
    return Path(str(files("prefloop") / "assets" / _POLICIES[name]))


def policy_folder(recipe: Recipe) -> Path:
    """Return the folder of the policy that the recipe names; fetches it if it is a hub id or an address.

    Raises:
        ConfigError: none is named, or there is no such folder, hub id or address.
        DataError: the folder is not a causal language model with safetensors and a tokenizer.

    """
    if recipe.policy is None:
        raise ConfigError("policy: not set; give a save_pretrained folder or a hub id (policy=PATH), or `embedded`")
    named = recipe.policy.path
    if named in _POLICIES:
        folder = embedded_policy(named)
    elif is_address(named):
        if recipe.policy.revision is not None:
            raise ConfigError(f"policy.revision: {named} is no hub id; leave it out")
        folder = fetched_folder(named)
    else:
        folder = causal_lm.locate(named, recipe.policy.revision)
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
