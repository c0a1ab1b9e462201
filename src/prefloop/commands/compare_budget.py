"""One budget for methods that are compared: the same held-out evaluation, and as many samples and updates for each.

Samples are rounds × prompts × completions. All methods draw as many as the one that draws most, or as there are prompts
for: those with fewer rounds or completions get more prompts a round. Updates are optimizer steps of the whole run. All
methods take as many as the one that takes most, by whole further passes over their pairs. How many pairs a rule makes
is known beforehand for some rules only; for the others the passes stay as they are. What was really drawn and taken is
in the report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Any

from prefloop.components import component_class
from prefloop.errors import ConfigError
from prefloop.recipe import Recipe, Spec, for_round

MODES = ("equal", "own")


@dataclass(frozen=True)
class Entry:
    """A method with its settings, as it is about to run. `target` is what the user named, `varied` a sweep's values."""

    name: str
    target: str
    recipe: Recipe
    origins: Mapping[str, str]
    varied: Mapping[str, Any]


def equalise(
    entries: Sequence[Entry], mode: str, available: Mapping[str, int] | None = None
) -> tuple[list[Entry], list[str]]:
    """Return the entries under one evaluation and, if `mode` is equal, one budget; and what was changed, in words.

    Args:
        entries: the methods.
        mode: equal or own.
        available: training prompts by an entry's name, where known: no round can have more.

    Raises:
        ConfigError: another mode, or methods whose judges of the evaluation, prompts or policies differ.

    """
    if mode not in MODES:
        raise ConfigError(f"--budget: must be one of {', '.join(MODES)}, got {mode!r}")
    judge, sampler = _eval_judge(entries), _eval_sampler(entries)
    shared = {"eval_judge": judge, "eval_sampler": sampler}
    made = [replace(e, recipe=e.recipe.model_copy(update=shared)) for e in entries]
    notes = [
        f"Held-out completions of all methods: judge {judge.kind}, {_words(sampler)}.",
    ]
    if mode == "equal":
        made, said = _same_samples(made, available or {})
        made, more = _same_updates(made)
        notes += said + more
    return made, notes


def _eval_judge(entries: Sequence[Entry]) -> Spec:
    """Return the judge of all evaluations: the one that entries ask for, or else their common judge."""
    asked = [e.recipe.eval_judge for e in entries if e.recipe.eval_judge is not None]
    judges = asked or [e.recipe.judge for e in entries if e.recipe.judge is not None and e.recipe.judge.kind != "given"]
    if not judges:
        raise ConfigError("compare: no judge of new completions is named; set eval_judge.kind for all methods")
    if any(judge != judges[0] for judge in judges):
        kinds = sorted({judge.kind for judge in judges})
        settings = ", with different settings" if len(kinds) == 1 else ""
        raise ConfigError(
            f"compare: the methods would be judged by different judges ({', '.join(kinds)}{settings}); scores of "
            "different judges cannot be compared. Set eval_judge=… for all of them"
        )
    return judges[0]


def _eval_sampler(entries: Sequence[Entry]) -> Spec:
    """Return how held-out completions are drawn: as asked for, or at temperature 1, for which the KL is exact."""
    named = [
        e.recipe.eval_sampler
        for e in entries
        if e.recipe.eval_sampler is not None and "command line" in _origins_of(e, "eval_sampler")
    ]
    if named:
        return named[0]
    drawing = [e.recipe.sampler for e in entries if e.recipe.sampler.kind != "given"]
    drawing = drawing or [e.recipe.eval_sampler for e in entries if e.recipe.eval_sampler is not None]
    if not drawing:
        raise ConfigError("compare: no method draws completions; set eval_sampler.kind=hf for the evaluation")
    if any(s.kind != drawing[0].kind for s in drawing):
        raise ConfigError(
            f"compare: the methods draw with different samplers ({', '.join(sorted({s.kind for s in drawing}))}); set "
            "eval_sampler.kind for the evaluation of all of them"
        )
    kind, settings = drawing[0].kind, drawing[0].settings()
    if not getattr(component_class("sampler", kind), "draws_from_policy", True):
        # Search says what a decoder can find, not what the policy is: the KL needs draws of the policy itself.
        known = {field.name for field in fields(component_class("sampler", "hf"))}
        kind, settings = "hf", {name: value for name, value in settings.items() if name in known}
    settings |= {"temperature": 1.0, "top_p": 1.0}
    lengths = [s.settings()["max_new_tokens"] for s in drawing if "max_new_tokens" in s.settings()]
    settings |= {"max_new_tokens": max(lengths)} if lengths else {}
    settings.pop("completions", None)
    return Spec.model_validate({"kind": kind, **settings})


def _origins_of(entry: Entry, field: str) -> set[str]:
    return {origin for key, origin in entry.origins.items() if key == field or key.startswith(f"{field}.")}


def _words(sampler: Spec) -> str:
    settings = sampler.settings()
    length = f", at most {settings['max_new_tokens']} tokens" if "max_new_tokens" in settings else ""
    return f"sampler {sampler.kind} at temperature {settings.get('temperature', 1.0):g}{length}"


def completions_of(recipe: Recipe) -> int | None:
    """Return how many completions of each prompt a round draws; 0 where the data bring them, `None` if unknown."""
    if recipe.sampler.kind == "given":
        return 0
    found = recipe.sampler.settings().get("completions")
    if found is None and recipe.sampler.kind == "hf":
        return 4
    return found if isinstance(found, int) else None


def _same_samples(entries: Sequence[Entry], available: Mapping[str, int]) -> tuple[list[Entry], list[str]]:
    each = {e.name: (completions_of(e.recipe) or 0) * e.recipe.rounds for e in entries}  # of one prompt a round
    prompts = {e.name: _prompts(e.recipe, available.get(e.name)) for e in entries}
    drawn = {name: each[name] * prompts[name] for name in each}
    possible = [each[name] * available[name] for name in each if drawn[name] and name in available]
    most = min([max(drawn.values()), *possible])
    made, notes = [], []
    for entry in entries:
        if not drawn[entry.name]:
            why = "takes its completions from the data" if completions_of(entry.recipe) == 0 else "names no number"
            notes.append(f"{entry.name}: {why}, so its samples cannot be made equal; they are in the budget table.")
            made.append(entry)
            continue
        fitting = max(1, round(most / each[entry.name]))
        if fitting != prompts[entry.name]:
            notes.append(
                f"{entry.name}: {fitting} prompts a round instead of {prompts[entry.name]}, so that it draws about "
                f"{most} completions in all like the rest."
            )
        made.append(_with(entry, {"prompts_per_round": fitting}))
    return made, notes


def _prompts(recipe: Recipe, available: int | None) -> int:
    """Return the prompts of a round; 0 where that is not known."""
    asked = recipe.prompts_per_round or available or 0
    return asked if available is None else min(asked, available)


def _same_updates(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    planned = {e.name: planned_updates(e.recipe) for e in entries}
    most = max((u for u in planned.values() if u), default=0)
    made, notes = [], []
    for entry in entries:
        updates = planned[entry.name]
        if not updates:
            notes.append(f"{entry.name}: how many pairs it will make is not known, so its updates are as they come.")
            made.append(entry)
            continue
        passes = max(1, round(entry.recipe.train.epochs * most / updates))
        if passes == entry.recipe.train.epochs or "train.epochs" in entry.recipe.per_round:
            made.append(entry)
            continue
        notes.append(
            f"{entry.name}: {passes} passes over its pairs instead of {entry.recipe.train.epochs}, for about "
            f"{updates * passes // entry.recipe.train.epochs} updates (the most of any method: {most})."
        )
        train = entry.recipe.train.model_copy(update={"epochs": passes})
        made.append(_with(entry, {"train": train}))
    return made, notes


def planned_updates(recipe: Recipe) -> int | None:
    """Return the optimizer steps of a run, if every prompt gives the pairs that it can; `None` if that is unknown."""
    total, history = 0, []
    for number in range(recipe.rounds):
        here = for_round(recipe, number)
        pairs = _pairs(here)
        if pairs is None:
            return None
        history.append(pairs)
        trained = sum(history[max(0, number - here.replay) :])
        total += ceil(trained / here.train.pairs_per_step) * here.train.epochs
    return total


def _pairs(recipe: Recipe) -> int | None:
    """Return the pairs that a round's prompts give at most, for rules of which that is known."""
    builder, prompts = recipe.pair_builder, recipe.prompts_per_round
    if prompts is None or recipe.corrector is not None or recipe.order.kind != "shuffled":
        return None
    if builder.kind in ("versus_gold", "dynamic_labels", "rollouts"):
        return prompts * (completions_of(recipe) or 1)
    rule = builder.settings().get("rule", "best_vs_worst")
    return prompts if builder.kind == "ranked" and rule in ("best_vs_worst", "best_vs_random") else None


def _with(entry: Entry, update: Mapping[str, Any]) -> Entry:
    origins = {**entry.origins, **dict.fromkeys(update, "compare: one budget")}
    return replace(entry, recipe=entry.recipe.model_copy(update=dict(update)), origins=origins)
