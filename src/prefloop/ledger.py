"""`summary.json`: what a run has found so far. Its schema is public and described in docs/artifacts.md."""

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefloop.artifact import Artifact, write_json, write_text
from prefloop.disk import seal_text, sealed
from prefloop.errors import Interrupted, PrefloopError
from prefloop.evaluate.bootstrap import LEVEL
from prefloop.evaluate.summary import verdict
from prefloop.recipe import Recipe
from prefloop.rows import PolicyRef

SUMMARY = "summary.json"
_LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "numpy")
RECIPE = "recipe.yaml"
RECIPE_SEAL = "# {}"


def new_summary(recipe: Recipe, policy: PolicyRef, settings: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return the summary of a run that has done nothing yet."""
    named = recipe.policy.path if recipe.policy else policy.path
    return {
        "prefloop": version("prefloop"),
        "name": recipe.name or recipe.recipe,
        "recipe": recipe.recipe,
        "seed": recipe.seed,
        "state": "running",
        "policy_start": {"path": named, "digest": policy.digest},
        "policy_best": {"path": named, "digest": policy.digest, "round": -1},
        "judge": settings["judge"],
        "eval_judge": settings["eval_judge"] or settings["judge"],
        "reference": recipe.reference,
        "prompts": settings["prompts"],
        "versions": versions(),
        "warnings": notes,
        "start": {},
        "rounds": [],
        "verdict": "",
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries on which a run's numbers depend."""
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}


def add_round(
    summary: dict[str, Any],
    number: int,
    stages: Mapping[str, Artifact[Any]],
    decision: Artifact[Any],
    policy: PolicyRef,
) -> None:
    """Append what a round found."""
    facts = decision.facts
    summary["rounds"].append(
        {
            "round": number,
            "accepted": facts["accepted"],
            "why": facts["why"],
            "level": facts.get("level", LEVEL),
            "metrics": facts["metrics"],
            "by_origin": facts.get("by_origin", {}),
            "facts": {name: stage.facts for name, stage in stages.items() if stage.facts},
            "seconds": {name: round(stage.seconds, 3) for name, stage in stages.items() if stage.seconds is not None},
            "tokens": {name: stage.facts["tokens"] for name, stage in stages.items() if "tokens" in stage.facts},
            "policy": {"path": f"round-{number:03d}/5-policy", "digest": policy.digest},
        }
    )
    for warning in [*facts["warnings"], *_training_warnings(number, stages["policy"].facts)]:
        if warning not in summary["warnings"]:
            summary["warnings"].append(warning)


def _training_warnings(number: int, facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what training noted that a reader should know."""
    if skipped := facts.get("skipped_updates"):
        yield f"round {number}: {skipped} updates were skipped, as loss or gradient was not finite"
    if waived := facts.get("waived_state_parts"):
        yield f"round {number}: training went on without {waived} parts of its state (train.waive_state)"
    if diverged := facts.get("diverged"):
        yield f"round {number}: {diverged}"


def set_best(summary: dict[str, Any], policy: PolicyRef, root: Path) -> None:
    """Note which policy leads; a policy of this run is named relative to the run folder."""
    if policy.round >= 0:
        summary["policy_best"] = {
            "path": os.path.relpath(policy.path, root),
            "digest": policy.digest,
            "round": policy.round,
        }


@dataclass
class Recorder:
    """Writes `summary.json` and `recipe.yaml` of a run, from the moment that it makes something new.

    A run that is refused because its folder holds the results of other settings changes neither. With `silent` nothing
    is written: another process does so.
    """

    root: Path
    summary: dict[str, Any]
    recipe_yaml: str
    begun: bool = False
    silent: bool = False

    def begin(self) -> None:
        """Note that something new is being made."""
        if not self.begun and not self.silent:
            self.begun = True
            write_text(self.root / RECIPE, seal_text(self.recipe_yaml, RECIPE_SEAL))
            self.save("running")

    def save(self, state: str) -> None:
        """Write `summary.json`, if anything new was made; `state` is running, done or failed."""
        self.summary["state"] = state
        self.summary["verdict"] = verdict(self.summary)
        self.write()

    def write(self) -> None:
        """Write `summary.json`, if anything new was made."""
        self.summary |= sealed(self.summary)
        if self.begun:
            write_json(self.root / SUMMARY, self.summary)

    def finish(self) -> None:
        """Write both files: the run is done, whether it made anything new or found all of it."""
        self.begin()
        self.save("done")

    @contextmanager
    def marking_failure(self) -> Iterator[None]:
        """Note in `summary.json` that the run failed, if it does; a stopped run goes on being "running"."""
        try:
            yield
        except PrefloopError as error:
            if not isinstance(error, Interrupted):
                self.save("failed")
            raise
