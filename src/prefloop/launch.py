"""From what a person types to a recipe: a method's name or a YAML file, and key=value pairs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefloop import recipes
from prefloop.errors import ConfigError
from prefloop.evaluate.summary import read_summary
from prefloop.losses._presets import preset
from prefloop.recipe import Layers, Recipe, build_recipe, read_override, read_yaml

EMBEDDED_DEFAULT: Mapping[str, Any] = {
    "policy": "embedded",
    "prompts": "embedded",
    "prompts_per_round": 256,
    "judge": {"kind": "lexicon"},
    "sampler": {"kind": "hf", "completions": 4, "max_new_tokens": 80},
    "train": {"learning_rate": 3e-4, "epochs": 1, "pairs_per_step": 32},
}
"""Settings for the story model that prefloop ships, used where the user names neither policy nor prompts. The
learning rate is that of a tiny model; a method's own is meant for billions of parameters."""

DEMO = ("name=demo",)
"""What `prefloop demo` adds to the embedded default."""
RECKLESS = ("name=demo-reckless", "train.learning_rate=1e-2", "rounds=1")
"""The same with a learning rate that raises the score by wrecking the text."""


def read_target(target: str, overrides: Sequence[str]) -> Layers:
    """Merge what `target` (a method's name or a YAML file) and `overrides` (key=value) say.

    Raises:
        ConfigError: unknown method, unreadable file, or an argument that is not key=value.

    """
    user = Layers()
    if target.endswith((".yaml", ".yml")):
        values, origin = read_yaml(Path(target))
        user.overlay(values, origin)
    else:
        user.overlay({"recipe": target}, "command line")
    for text in overrides:
        user.overlay(read_override(text), "command line")
    name = user.values.get("recipe")
    if not isinstance(name, str):
        raise ConfigError(f"{target}: recipe: not set; choose one of {', '.join(recipes.available())}")
    layers = Layers()
    method = recipes.find(name)
    layers.overlay(method.recipe().model_dump(exclude_unset=True), f"recipe {name}")
    if not _names(user.values.get("policy")) and not _names(user.values.get("prompts")):
        layers.overlay(EMBEDDED_DEFAULT, "embedded default")
        layers.overlay(vars(method).get("EMBEDDED", {}), "embedded default")
    if chosen := user.values.get("preset"):
        published = preset(str(chosen))
        layers.overlay(published.layer(), f"preset {chosen}: {published.source}")
    # A setting that the user fixes does not change by round, unless the user says so too; a kind fixes the component.
    fixed = {key for name in user.origins for key in (name, name.removesuffix(".kind"))}
    for key in fixed & set(layers.values.get("per_round", {})):
        del layers.values["per_round"][key]
    layers.overlay(user.values, lambda key: user.origins[key])
    return layers


def read_policy(target: Path, overrides: Sequence[str]) -> Recipe:
    """Return the recipe by which `prefloop evaluate` measures `target`: a run's folder, or a policy's.

    A run, and a policy inside one, bring their own prompts, judge and sampler; for another policy `overrides` must.

    Raises:
        ConfigError: the run has no readable recipe, or a setting is wrong.

    """
    layers = Layers()
    layers.overlay({"sampler": {"kind": "hf"}}, "default")
    in_run = run_of(target)
    if in_run is not None:
        values, origin = read_yaml(in_run / "recipe.yaml")
        layers.overlay(values, origin)
        if in_run == target:
            best = read_summary(in_run)["policy_best"]
            inside = target / best["path"]
            target = inside if inside.is_dir() else Path(best["path"])
    layers.overlay({"policy": {"path": str(target)}}, "command line")
    for text in overrides:
        layers.overlay(read_override(text), "command line")
    return build_recipe(layers)


def run_of(target: Path) -> Path | None:
    """Return the folder of the run that `target` is, or that it lies in; `None` if it is in none."""
    return next((folder for folder in (target, *target.parents[:3]) if (folder / "summary.json").is_file()), None)


def _names(setting: Any) -> bool:
    """Return whether the user says which policy or prompts; `prompts.limit` alone does not."""
    return isinstance(setting, str) or (isinstance(setting, Mapping) and "path" in setting)


def read_recipe(target: str, overrides: Sequence[str]) -> tuple[Recipe, dict[str, str]]:
    """Return the validated recipe and the origin of every value that was set.

    Raises:
        ConfigError: see `read_target` and `build_recipe`.

    """
    layers = read_target(target, overrides)
    return build_recipe(layers), layers.origins
