"""Pairs of which one side is absent: a completion that stands by itself. Not a pair rule: no `kind` names this file."""

from prefloop.protocols import RoundContext
from prefloop.rows import ABSENT, Completion, JudgedGroup, PreferencePair, digest_of


def row_of(
    group: JudgedGroup,
    index: int,
    good: bool,
    builder: str,
    context: RoundContext,
    win_prob: float | None = None,
) -> PreferencePair:
    """Return completion `index` of a group as the chosen side, or as the rejected one, without a rival."""
    completion, score = group.completions[index], group.scores[index]
    return PreferencePair(
        pair_id=digest_of(completion.completion_id, "good" if good else "bad"),
        prompt=group.prompt,
        chosen=completion if good else ABSENT,
        rejected=ABSENT if good else completion,
        chosen_score=score if good else None,
        rejected_score=None if good else score,
        margin=0.0,
        win_prob=win_prob,
        weight=1.0,
        builder=builder,
        round=context.round,
    )


def only_side(pair: PreferencePair) -> Completion:
    """Return the side that a one-sided pair has."""
    return pair.rejected if pair.chosen == ABSENT else pair.chosen


def content_of(completion: Completion) -> tuple[str, tuple[str, ...]]:
    """Return what makes two completions the same."""
    return completion.text, completion.media
