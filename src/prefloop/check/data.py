"""The cheap part of `prefloop check`, without torch: names of settings, prompts, and the pairs that data hold."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from prefloop.check.config import check_names
from prefloop.check.finding import Finding, counted
from prefloop.check.pairs import Pairs, pair_findings
from prefloop.check.prompts import Repeated, prompt_findings
from prefloop.check.scan import Readable, scan
from prefloop.errors import ConfigError, DataError
from prefloop.prompt_inputs import resolve_prompts
from prefloop.prompts.dataset import PromptSet
from prefloop.recipe import Recipe

IN_NOTES = ("duplicate_prompts",)
"""Findings that the reader of prompts notes in its own words."""


def trains_on_data(recipe: Recipe) -> bool:
    """Return whether the recipe's pairs come from the data's own completions."""
    return recipe.sampler.kind == "given"


def data_findings(recipe: Recipe, against: Sequence[Path] = (), prompts: PromptSet | None = None) -> Iterator[Finding]:
    """Yield what can be known from recipe and data files alone; `prompts` are the recipe's where they are read already.

    Raises:
        ConfigError: prompts are not set, or there is no such source.

    """
    try:
        check_names(recipe)
        yield Finding("configuration", "info", "every part and the name of every setting is known")
    except ConfigError as error:
        yield Finding("configuration", "error", str(error), advice="correct the settings")
    if recipe.prompts is None:
        raise ConfigError("prompts: not set; give a .jsonl, .parquet or data-set path (prompts=PATH), or `embedded`")
    wrong: DataError | None = None
    readable = Readable()
    try:
        prompts = prompts or resolve_prompts(recipe)
    except DataError as error:
        wrong = error
    repeats, pairs = Repeated(), Pairs()
    found = scan(recipe.prompts, repeats, pairs, *([] if prompts else [readable]))
    if wrong and not found.unreadable and not found.different:
        yield Finding("prompts", "error", str(wrong), advice="correct the data")
    yield from counted("unreadable_rows", found.unreadable, "rows cannot be read", "correct or remove them", "error")
    yield from prompt_findings(recipe, prompts or readable.prompts(), found, repeats, against)
    yield from pair_findings(found, pairs, trains_on_data(recipe))


def data_warnings(recipe: Recipe, prompts: PromptSet | None = None) -> list[str]:
    """Return the cheap warnings that a run notes in its summary; the same data give the same ones."""
    return [
        f"{finding.text}, such as {finding.examples[0]}" if finding.examples else finding.text
        for finding in data_findings(recipe, prompts=prompts)
        if finding.severity == "warning" and finding.name not in IN_NOTES
    ]
