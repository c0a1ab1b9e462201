"""The texts that the report shows: few, cut to a length, chosen by rules that do not depend on who looks."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from prefloop.evaluate.text_marks import Marked, likeness, marked
from prefloop.rows import JudgedGroup, PreferencePair

TEXT = 1200
"""Characters of a prompt or completion that the page shows."""

NOTE = 600
"""Characters of a reason or note that the page shows."""

_EACH = 4  # prompts that gained most, lost most, changed most, and by fixed order
UNSEEN = 2
"""Pairs that are shown by the order of their ids."""

OUTCOMES = {
    "gained": "Gained most",
    "lost": "Lost most",
    "changed": "Changed most",
    "blind": "Chosen without looking at scores",
}
"""Why a prompt is shown, by the word that the page filters by."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The same prompt before and after training, first completion of each. `note` is the judge's on the later one.

    `outcomes` says why it is shown: keys of `OUTCOMES`, one at least. `marked` are both texts with what differs.
    """

    prompt: str
    before: str
    after: str
    before_score: float | None
    after_score: float | None
    note: str
    outcomes: tuple[str, ...] = ()

    @property
    def gain(self) -> float | None:
        """Score after minus score before, where both are known."""
        if self.before_score is None or self.after_score is None:
            return None
        return self.after_score - self.before_score

    @property
    def titles(self) -> list[str]:
        """Why it is shown, in words."""
        return [OUTCOMES[name] for name in self.outcomes]

    @property
    def marked(self) -> Marked:
        """Both texts with what differs."""
        return marked(self.before, self.after)


@dataclass(frozen=True, slots=True)
class PairExample:
    """A training pair, its texts cut. `rule` says why this one is shown."""

    rule: str
    prompt: str
    pair: PreferencePair

    @property
    def marked(self) -> Marked:
        """Both sides with what differs, rejected first."""
        return marked(self.pair.rejected.text, self.pair.chosen.text)


def samples(start: Sequence[JudgedGroup], after: Sequence[JudgedGroup]) -> list[Sample]:
    """Return the prompts that gained most, lost most, whose text changed most, and a choice blind to scores.

    None is returned twice: a prompt can be there for several reasons, which `outcomes` names.

    Args:
        start: the start policy's judged completions.
        after: those of a later policy, for the same prompts.

    """
    later = {g.prompt.prompt_id: g for g in after}
    # The id is a hash of the prompt: its order is arbitrary, and the same in every run.
    both = sorted((g for g in start if g.prompt.prompt_id in later), key=lambda g: g.prompt.prompt_id)
    rivals = [later[g.prompt.prompt_id] for g in both]
    gains = {
        i: gain for i, (one, two) in enumerate(zip(both, rivals, strict=True)) if (gain := _gain(one, two)) is not None
    }
    ranked = sorted(gains, key=lambda i: gains[i])
    changes = [1 - likeness(a.completions[0].text, b.completions[0].text) for a, b in zip(both, rivals, strict=True)]
    found = {
        "gained": [i for i in reversed(ranked[-_EACH:]) if gains[i] > 0],
        "lost": [i for i in ranked[:_EACH] if gains[i] < 0],
        "changed": [i for i in sorted(range(len(both)), key=lambda i: -changes[i])[:_EACH] if changes[i] > 0],
    }
    taken = {i for chosen in found.values() for i in chosen}
    found["blind"] = [i for i in range(len(both)) if i not in taken][:_EACH]
    order = dict.fromkeys(i for chosen in found.values() for i in chosen)
    return [_sample(both[i], rivals[i], tuple(k for k, chosen in found.items() if i in chosen)) for i in order]


def _gain(before: JudgedGroup, after: JudgedGroup) -> float | None:
    once, now = before.scores[0], after.scores[0]
    return None if once is None or now is None else now - once


def outcomes_of(found: Sequence[Sample]) -> list[tuple[str, str, int]]:
    """Return the outcomes that occur: word, title, and how many samples have it."""
    counts = Counter(name for sample in found for name in sample.outcomes)
    return [(name, title, counts[name]) for name, title in OUTCOMES.items() if counts[name]]


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


def _sample(before: JudgedGroup, after: JudgedGroup, outcomes: tuple[str, ...]) -> Sample:
    return Sample(
        prompt=clip(before.prompt.text, TEXT),
        before=clip(before.completions[0].text, TEXT),
        after=clip(after.completions[0].text, TEXT),
        before_score=before.scores[0],
        after_score=after.scores[0],
        note=clip(after.notes[0] or "", NOTE) if after.notes else "",
        outcomes=outcomes,
    )


def _choose(pairs: Sequence[PreferencePair]) -> list[tuple[str, PreferencePair]]:
    if not pairs:
        return []
    by_margin = sorted(pairs, key=lambda p: (p.margin, p.pair_id))
    extremes = {by_margin[-1].pair_id: ("largest margin", by_margin[-1])}
    extremes.setdefault(by_margin[0].pair_id, ("smallest margin", by_margin[0]))
    rest = sorted((p for p in pairs if p.pair_id not in extremes), key=lambda p: p.pair_id)
    return [*extremes.values(), *(("chosen without looking", pair) for pair in rest[:UNSEEN])]


def _cut(pair: PreferencePair) -> PreferencePair:
    shared = pair.prefix.text if pair.prefix else ""
    chosen, rejected = (replace(side, text=clip(shared + side.text, TEXT)) for side in (pair.chosen, pair.rejected))
    return replace(pair, chosen=chosen, rejected=rejected)
