"""Rankings of K completions of one prompt, for losses on lists such as Plackett-Luce DPO."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from prefloop.errors import ConfigError
from prefloop.protocols import RoundContext
from prefloop.rows import JudgedGroup, PreferencePair, View, digest_of


@dataclass(frozen=True)
class Rankings:
    """One ranking of each prompt's completions by score: the best is chosen, the second rejected, the others views.

    The views are called rank_3 … rank_K and stand under the same prompt. Completions without a score, with the content
    of a better one, or too close to the place above do not take part. Of more than K that are left, the best, the
    worst, and K − 2 evenly spread between them by place are taken; a prompt with fewer than K makes no ranking.
    `losses/plackett_luce.py` learns from these.

    Raises:
        ConfigError: completions is below 2, or min_margin is not a number ≥ 0.

    """

    completions: int = 4
    """K, completions of a ranking, ≥ 2; at least the loss's. Default 4: UltraFeedback has four for a prompt."""
    min_margin: float = 0.0
    """Each place scores higher than the next by more than this, in the judge's units, ≥ 0."""

    needs_scores: ClassVar[bool] = True
    needs_gold: ClassVar[bool] = False
    # Of the default K; an object has those of its own.
    views: ClassVar[tuple[str, ...]] = ("rank_3", "rank_4")

    def __post_init__(self) -> None:
        if self.completions < 2:
            raise ConfigError(f"pair_builder.completions (pair/rankings.py): must be ≥ 2, got {self.completions}")
        if not 0 <= self.min_margin < math.inf:
            raise ConfigError(f"pair_builder.min_margin (pair/rankings.py): must be ≥ 0, got {self.min_margin}")
        object.__setattr__(self, "views", tuple(f"rank_{place}" for place in range(3, self.completions + 1)))

    def __call__(self, groups: Iterable[JudgedGroup], context: RoundContext) -> Iterator[PreferencePair]:
        """Yield the ranking of each group, in the order of `groups`; a group with fewer than K places yields none."""
        for group in groups:
            places = self._places(group)
            if len(places) >= self.completions:
                last = self.completions - 1
                spread = [places[round(i * (len(places) - 1) / last)] for i in range(self.completions)]
                yield self._ranking(group, spread, context)

    def _places(self, group: JudgedGroup) -> list[tuple[float, int]]:
        """Return (score, index) of the completions that take part, the best first; equal ones by index."""
        scored = [(score, i) for i, score in enumerate(group.scores) if score is not None]
        places: list[tuple[float, int]] = []
        seen: set[object] = set()
        for score, index in sorted(scored, key=lambda item: (-item[0], item[1])):
            content = (group.completions[index].text, group.completions[index].media)
            if content not in seen and (not places or places[-1][0] - score > self.min_margin):
                places.append((score, index))
            seen.add(content)
        return places

    def _ranking(self, group: JudgedGroup, places: list[tuple[float, int]], context: RoundContext) -> PreferencePair:
        ranked = [group.completions[index] for _, index in places]
        (best, first), (second, other) = places[:2]
        return PreferencePair(
            pair_id=digest_of(*(completion.completion_id for completion in ranked)),
            prompt=group.prompt,
            chosen=ranked[0],
            rejected=ranked[1],
            chosen_score=best,
            rejected_score=second,
            margin=best - second,
            win_prob=None if group.win_prob is None else group.win_prob[first][other],
            weight=1.0,
            builder="rankings",
            round=context.round,
            views=tuple(
                View(name, group.prompt.messages, completion)
                for name, completion in zip(self.views, ranked[2:], strict=True)
            ),
        )
