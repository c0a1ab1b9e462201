"""The stage 2b-corrected: what a recipe's corrector adds to the judged groups, and what it needs for that."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from prefloop.artifact import Artifact, Key
from prefloop.components import Parts, key_of
from prefloop.errors import ConfigError
from prefloop.protocols import CorrectionTools, GoesOn, RoundContext, needs_steps
from prefloop.recipe import Recipe
from prefloop.rows import JudgedGroup
from prefloop.stages import Draw, NamedJudge, Run, divisible, write_parts


def check_corrector(recipe: Recipe, parts: Parts) -> None:
    """Refuse a corrector that cannot work, a locator that nobody asks, and a pair rule that lacks a corrector.

    Raises:
        ConfigError: names the fields and what to change.

    """
    if recipe.corrector is None:
        if recipe.locator is not None:
            raise ConfigError("locator: only a corrector asks it; set corrector.kind=steps, or leave it out")
        if needs_steps(parts.pair_builder):
            raise ConfigError(
                f"pair_builder.kind: {recipe.pair_builder.kind} pairs steps, and nothing cuts completions into steps; "
                "set corrector.kind=steps"
            )
        return
    if not isinstance(parts.sampler, GoesOn):
        raise ConfigError(
            f"corrector.kind: {recipe.corrector.kind} goes on from within completions, which sampler.kind "
            f"{recipe.sampler.kind} cannot; set sampler.kind=hf"
        )
    if not parts.pair_builder.needs_scores:
        raise ConfigError(
            f"corrector.kind: {recipe.corrector.kind} works on what the judge finds wrong, and with pair_builder.kind "
            f"{recipe.pair_builder.kind} nothing is judged; choose another pair builder, or leave the corrector out"
        )


def correct(
    run: Run, path: Path, judged: Artifact[JudgedGroup], draw: Draw, named: NamedJudge, context: RoundContext
) -> Artifact[JudgedGroup]:
    """2b-corrected: the judged groups with what the corrector adds; one part for each part of `judged`.

    Where the recipe names no corrector there is no such stage, and `judged` is returned.
    """
    corrector, locator, recipe = run.parts.corrector, run.parts.locator, run.recipe
    if corrector is None or recipe.corrector is None:
        return judged
    settings = {
        "corrector": key_of(corrector, recipe.corrector.kind),
        "locator": key_of(locator, recipe.locator.kind) if locator is not None and recipe.locator else None,
        "sampler": draw.settings,
        "judge": key_of(named.judge, named.kind),
        "seed": context.seed,
        "round": context.round,
    }
    key = Key("corrected", settings, {"judged": judged.digest, "policy": context.policy.digest})
    together = all(map(divisible, (draw.sampler, named.judge, locator)))
    opened = run.open(path, key, JudgedGroup, together)
    if isinstance(opened, Artifact):
        return opened
    assert isinstance(draw.sampler, GoesOn)  # check_corrector has refused any other
    tools = CorrectionTools(draw.sampler, named.judge, locator)
    parts = judged.stored_parts()
    return write_parts(run, opened, parts, lambda part: corrector(part, tools, context), "correct", _facts)


def _facts(groups: Iterable[JudgedGroup]) -> dict[str, int]:
    facts = Counter(groups=0, completions=0, first_wrong_step_found=0)
    for group in groups:
        facts["groups"] += 1
        facts["completions"] += len(group.completions)
        facts["first_wrong_step_found"] += sum(solution.first_wrong is not None for solution in group.solutions)
    return dict(facts)
