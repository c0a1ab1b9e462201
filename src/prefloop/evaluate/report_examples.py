"""The texts that the report shows: few, cut to a length, chosen by rules that do not depend on who looks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from prefloop.rows import JudgedGroup, PreferencePair

TEXT = 1200
"""Characters of a prompt or completion that the page shows."""

NOTE = 600
"""Characters of a reason or note that the page shows."""

_EACH = 3  # prompts that gained most, lost most, and by fixed order
_UNSEEN = 2  # pairs by the order of their ids


@dataclass(frozen=True, slots=True)
class Sample:
    """The same prompt before and after training, first completion of each. `note` is the judge's on the later one."""

    prompt: str
    before: str
    after: str
    before_score: float | None
    after_score: float | None
    note: str

    @property
    def gain(self) -> float | None:
        """Score after minus score before, where both are known."""
        if self.before_score is None or self.after_score is None:
            return None
        return self.after_score - self.before_score


@dataclass(frozen=True, slots=True)
class PairExample:
    """A training pair, its texts cut. `rule` says why this one is shown."""

    rule: str
    prompt: str
    pair: PreferencePair


def samples(start: Sequence[JudgedGroup], after: Sequence[JudgedGroup]) -> list[tuple[str, list[Sample]]]:
    """Return the prompts that gained most, lost most, and a choice blind to scores, none twice, each with a heading."""
    later = {g.prompt.prompt_id: g for g in after}
    # The id is a hash of the prompt: its order is arbitrary, and the same in every run.
    both = sorted((g for g in start if g.prompt.prompt_id in later), key=lambda g: g.prompt.prompt_id)
    found = [_sample(group, later[group.prompt.prompt_id]) for group in both]
    ranked = sorted((i for i, s in enumerate(found) if s.gain is not None), key=lambda i: found[i].gain or 0.0)
    lost = [i for i in ranked[:_EACH] if (found[i].gain or 0.0) < 0]
    gained = [i for i in reversed(ranked[-_EACH:]) if (found[i].gain or 0.0) > 0]
    blind = [i for i in range(len(found)) if i not in {*gained, *lost}][:_EACH]
    kinds = (("Gained most", gained), ("Lost most", lost), ("Chosen without looking at scores", blind))
    return [(title, [found[i] for i in chosen]) for title, chosen in kinds if chosen]


def few_pairs(parts: Iterable[Sequence[PreferencePair]]) -> list[PairExample]:
    """Return the pairs with the largest and the smallest margin, and a few chosen by the order of their ids.

    Args:
        parts: pairs in portions; only one portion at a time is held.

    """
    kept: list[tuple[str, PreferencePair]] = []
    for part in parts:
        kept = _choose([*(pair for _, pair in kept), *part])
    return [PairExample(rule, clip(pair.prompt.text, TEXT), _cut(pair)) for rule, pair in kept]


def clip(text: str, most: int) -> str:
    """Return `text`, or its first `most` characters and how many more there are.

    Example:
        >>> clip("abcdef", 4)
        'abcd… (2 more characters)'

    """
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} more characters)"


def _sample(before: JudgedGroup, after: JudgedGroup) -> Sample:
    return Sample(
        prompt=clip(before.prompt.text, TEXT),
        before=clip(before.completions[0].text, TEXT),
        after=clip(after.completions[0].text, TEXT),
        before_score=before.scores[0],
        after_score=after.scores[0],
        note=clip(after.notes[0] or "", NOTE) if after.notes else "",
    )


def _choose(pairs: Sequence[PreferencePair]) -> list[tuple[str, PreferencePair]]:
    if not pairs:
        return []
    by_margin = sorted(pairs, key=lambda p: (p.margin, p.pair_id))
    extremes = {by_margin[-1].pair_id: ("largest margin", by_margin[-1])}
    extremes.setdefault(by_margin[0].pair_id, ("smallest margin", by_margin[0]))
    rest = sorted((p for p in pairs if p.pair_id not in extremes), key=lambda p: p.pair_id)
    return [*extremes.values(), *(("chosen without looking", pair) for pair in rest[:_UNSEEN])]


def _cut(pair: PreferencePair) -> PreferencePair:
    shared = pair.prefix.text if pair.prefix else ""
    chosen, rejected = (replace(side, text=clip(shared + side.text, TEXT)) for side in (pair.chosen, pair.rejected))
    return replace(pair, chosen=chosen, rejected=rejected)
