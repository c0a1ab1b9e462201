"""Counts of prompts, repeated ones, and what training shares with held-out and other evaluation prompts. Torch-free."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from prefloop.check.finding import Finding, Seen, counted, short
from prefloop.check.scan import Row, Scan, scan
from prefloop.check.shared import Texts
from prefloop.prompt_inputs import held_out
from prefloop.prompts.dataset import PromptSet
from prefloop.prompts.store import index_of
from prefloop.recipe import PromptSettings, Recipe
from prefloop.rows import HOLDOUT, Prompt

LONG_ANSWER = 60
"""Characters from which an answer that training and held-out prompts share is no chance."""
_NOT_WORDS = re.compile(r"[\W_]+")


def normal(text: str) -> str:
    """Return `text` in lower case with one space for everything that is no letter or digit; as it is where none is."""
    return _NOT_WORDS.sub(" ", text.casefold()).strip() or text


class Repeated:
    """Rows that repeat a prompt."""

    def __init__(self) -> None:
        """Begin without rows."""
        self.rows = Seen()
        self._first: dict[int, str] = {}

    def __call__(self, row: Row) -> None:
        """Take in a row."""
        first = self._first.setdefault(row.key, row.place)
        if first is not row.place and not row.labelled:
            self.rows.add(f"{row.place} repeats {first}: {short(row.prompt)}")


def prompt_findings(
    recipe: Recipe, prompts: PromptSet, found: Scan, repeats: Repeated, against: Sequence[Path]
) -> Iterator[Finding]:
    """Yield counts, repeats and overlaps of the prompts; `against` names files of other evaluation sets."""
    evaluated, known = held_out(recipe, prompts), index_of(prompts.prompts)
    out, rows = int(known.held_out.sum()), len(known)
    yield Finding(
        "prompts", "info", f"{rows - out} to train on, {out} held out, {len(evaluated)} of them evaluated", rows
    )
    gold = int(known.has_gold.sum())
    yield Finding("gold", "info", f"{gold} of {rows} prompts have a reference answer", gold)
    if found.cut:
        yield Finding("rows_looked_at", "info", f"the first {found.rows} rows; later ones were not", found.rows)
    yield from counted(
        "duplicate_prompts",
        repeats.rows,
        "rows repeat a prompt; only the first of each is read, with its completions",
        "put all completions of a prompt into one row (completions and scores), or remove the repeats",
    )
    trained, held = (_Sides(prompts.prompts) for _ in range(2))
    for place, prompt in enumerate(prompts.prompts):
        (held if prompt.split == HOLDOUT else trained).note(place, prompt)
    yield from _overlap(trained, held)
    for path in against:
        yield from _overlap_with(trained.asked, path)


class _Sides:
    """What prompts ask, and their answers, on one side of the split."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.asked = Texts(prompts, lambda p: (normal(p.text),))
        self.answers = Texts(prompts, _answers)

    def note(self, place: int, prompt: Prompt) -> None:
        self.asked.note(place, prompt)
        self.answers.note(place, prompt)


def _overlap(trained: _Sides, held: _Sides) -> Iterator[Finding]:
    asked, answered = Seen(), Seen()
    for prompt, other, _ in held.asked.in_common(trained.asked):
        asked.add(f"{prompt.source} is {other.source} in other letters or signs")
    for prompt, other, text in held.answers.in_common(trained.answers):
        answered.add(f"{prompt.source} has the answer of {other.source}: {short(text)}")
    yield from counted(
        "overlap_holdout",
        asked,
        "held-out prompts are training prompts but for capitals, spaces or punctuation: the evaluation is too good",
        "remove one of each",
    )
    yield from counted(
        "shared_answers",
        answered,
        f"answers of at least {LONG_ANSWER} characters belong to a training and to a held-out prompt",
        "see whether the prompts ask the same thing in other words; remove one of each",
    )


def _answers(prompt: Prompt) -> dict[str, None]:
    texts = [prompt.gold or "", *(c.text for c in prompt.candidates)]
    return dict.fromkeys(normal(text) for text in texts if len(text) >= LONG_ANSWER)


def _overlap_with(trained: Texts, path: Path) -> Iterator[Finding]:
    shared = Seen()

    def compare(row: Row) -> None:
        owner = trained.owner(normal(row.prompt))
        if owner is not None:
            shared.add(f"{row.place} is {owner.source}")

    rows = scan(PromptSettings(path=str(path)), compare).rows
    yield Finding("evaluation_set", "info", f"{path}: {rows} prompts compared with the training prompts", rows)
    yield from counted(
        "overlap_evaluation",
        shared,
        f"prompts of {path} are trained on",
        "remove them from the training prompts",
    )
