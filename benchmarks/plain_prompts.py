"""Prompts read the plain way, every one in memory: what `prompts.dataset` is compared with, in results and time.

This is what prefloop did before its prompts lay on disk; rows are parsed by the same functions.
"""

from dataclasses import replace

from prefloop.prompts.candidates import candidates, is_labelled, with_explicit_prompt
from prefloop.prompts.dataset import messages_and_gold, origin_of, read_rows, side_of
from prefloop.rows import Prompt, digest_of, prompt_id


def read_plainly(
    path: str, column: str = "prompt", gold: str | None = None, holdout: float = 0.2
) -> tuple[list[Prompt], tuple[str, ...]]:
    """Return the prompts of a source, and what was left out, in words."""
    kept: dict[str, Prompt] = {}
    repeats: list[tuple[str, Prompt, bool]] = []
    for place, row in read_rows(path):
        row = with_explicit_prompt(place, row, column)
        messages, answer = messages_and_gold(place, row, column, gold)
        name = prompt_id(messages)
        if name in kept and is_labelled(row):
            known = kept[name]
            more = tuple(c for c in candidates(place, row) if c not in known.candidates)
            known_gold = answer if known.gold is None else known.gold
            kept[name] = replace(known, candidates=(*known.candidates, *more), gold=known_gold)
        elif name in kept:
            repeats.append((place, kept[name], answer != kept[name].gold))
        else:
            own, origin = candidates(place, row), origin_of(place, row)
            side = side_of(name, holdout)
            kept[name] = Prompt(name, messages, answer, side, place, candidates=own, origin=origin)
    return list(kept.values()), _said(repeats)


def _said(repeats: list[tuple[str, Prompt, bool]]) -> tuple[str, ...]:
    if not repeats:
        return ()
    places = ", ".join(f"{place} repeats {first.source}" for place, first, _ in repeats[:2])
    more = ", …" if len(repeats) > 2 else ""
    others = sum(other for _, _, other in repeats)
    gold = f"; {others} of them with another gold answer, which is not used" if others else ""
    return (f"{len(repeats)} duplicate prompt{'s' if len(repeats) > 1 else ''} dropped: {places}{more}{gold}",)


def shuffled(prompts: list[Prompt], seed: int, first: int, size: int) -> list[Prompt]:
    """Return `size` prompts from place `first` on, in the order of the digests of seed and id."""
    ordered = sorted(prompts, key=lambda p: digest_of(seed, p.prompt_id))
    return [ordered[(first + i) % len(ordered)] for i in range(size)]
