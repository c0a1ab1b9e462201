"""Counts of prompts, repeated ones, and what training shares with held-out and other evaluation prompts. Torch-free."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from prefloop.check.finding import Finding, counted, short
from prefloop.check.scan import Scan, scan
from prefloop.prompt_inputs import held_out
from prefloop.prompts.dataset import PromptSet
from prefloop.recipe import PromptSettings, Recipe
from prefloop.rows import Prompt

LONG_ANSWER = 60
"""Characters from which an answer that training and held-out prompts share is no chance."""
_NOT_WORDS = re.compile(r"[\W_]+")


def normal(text: str) -> str:
    """Return `text` in lower case with one space for everything that is no letter or digit; as it is where none is."""
    return _NOT_WORDS.sub(" ", text.casefold()).strip() or text


def prompt_findings(recipe: Recipe, prompts: PromptSet, found: Scan, against: Sequence[Path]) -> Iterator[Finding]:
    """Yield counts, repeats and overlaps of the prompts; `against` names files of other evaluation sets."""
    evaluated = held_out(recipe, prompts)
    yield Finding(
        "prompts",
        "info",
        f"{len(prompts.train)} to train on, {len(prompts.holdout)} held out, {len(evaluated)} of them evaluated",
        len(prompts.prompts),
    )
    gold = sum(p.gold is not None for p in prompts.prompts)
    yield Finding("gold", "info", f"{gold} of {len(prompts.prompts)} prompts have a reference answer", gold)
    if found.cut:
        yield Finding(
            "rows_looked_at", "info", f"the first {len(found.rows)} rows; later ones were not", len(found.rows)
        )
    yield from _repeated(found)
    yield from _overlap(prompts)
    for path in against:
        yield from _overlap_with(prompts.train, path)


def _repeated(found: Scan) -> Iterator[Finding]:
    first: dict[str, str] = {}
    repeated = []
    for row in found.rows:
        if row.key in first and not row.labelled:
            repeated.append(f"{row.place} repeats {first[row.key]}: {short(row.prompt)}")
        first.setdefault(row.key, row.place)
    yield from counted(
        "duplicate_prompts",
        repeated,
        "rows repeat a prompt; only the first of each is read, with its completions",
        "put all completions of a prompt into one row (completions and scores), or remove the repeats",
    )


def _overlap(prompts: PromptSet) -> Iterator[Finding]:
    trained = {normal(p.text): p.source for p in prompts.train}
    yield from counted(
        "overlap_holdout",
        [
            f"{p.source} is {trained[normal(p.text)]} in other letters or signs"
            for p in prompts.holdout
            if normal(p.text) in trained
        ],
        "held-out prompts are training prompts but for capitals, spaces or punctuation: the evaluation is too good",
        "remove one of each",
    )
    answers = {text: p.source for p in prompts.train for text in _answers(p)}
    yield from counted(
        "shared_answers",
        [
            f"{p.source} has the answer of {answers[text]}: {short(text)}"
            for p in prompts.holdout
            for text in _answers(p)
            if text in answers
        ],
        f"answers of at least {LONG_ANSWER} characters belong to a training and to a held-out prompt",
        "see whether the prompts ask the same thing in other words; remove one of each",
    )


def _answers(prompt: Prompt) -> set[str]:
    texts = [prompt.gold or "", *(c.text for c in prompt.candidates)]
    return {normal(text) for text in texts if len(text) >= LONG_ANSWER}


def _overlap_with(train: Sequence[Prompt], path: Path) -> Iterator[Finding]:
    rows = scan(PromptSettings(path=str(path))).rows
    trained = {normal(p.text): p.source for p in train}
    yield Finding(
        "evaluation_set", "info", f"{path}: {len(rows)} prompts compared with the training prompts", len(rows)
    )
    yield from counted(
        "overlap_evaluation",
        [f"{row.place} is {trained[normal(row.prompt)]}" for row in rows if normal(row.prompt) in trained],
        f"prompts of {path} are trained on",
        "remove them from the training prompts",
    )
