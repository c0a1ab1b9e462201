"""Pairs from scores: best against worst, best against a random loser, or every pair with a clear margin."""

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import ClassVar, Literal

from prefloop.errors import ConfigError
from prefloop.protocols import RoundContext
from prefloop.rows import JudgedGroup, PreferencePair, digest_of


@dataclass(frozen=True)
class Ranked:
    """Pairs of completions of one prompt whose scores differ.

    A pair is usable if its margin, chosen score − rejected score, is positive and above `min_margin`. Ties and
    completions without a score never pair. The result depends on each group alone, not on the order of groups.

    - `best_vs_worst`: the usable pair with the largest margin (Yuan et al. 2024, arXiv:2401.10020, section 2.3).
    - `best_vs_random`: the highest scored completion against a loser drawn uniformly from those it makes a usable
      pair with; the draw depends on the run's seed, the round and the prompt id only.
    - `above_margin`: every usable pair, the largest margins first.

    Equal margins, and equal best scores, go by completion index, the lower one first.

    Raises:
        ConfigError: a field is out of range, or `max_pairs` is set for a rule that makes one pair.

    """

    rule: Literal["best_vs_worst", "best_vs_random", "above_margin"] = "best_vs_worst"
    """Which usable pairs to make."""
    min_margin: float = 0.0
    """A pair needs a margin above this, in the judge's units, ≥ 0."""
    max_pairs: int | None = None
    """above_margin only: at most this many pairs for each prompt, ≥ 1. Default: all."""
    drop_identical: bool = True
    """Never pair two completions with the same content, and make a pair of the same two contents once a prompt."""

    needs_scores: ClassVar[bool] = True
    needs_gold: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rule not in ("best_vs_worst", "best_vs_random", "above_margin"):
            raise ConfigError(
                f"pair_builder.rule: must be best_vs_worst, best_vs_random or above_margin, got {self.rule!r}"
            )
        if not (math.isfinite(self.min_margin) and self.min_margin >= 0):
            raise ConfigError(f"pair_builder.min_margin: must be a number ≥ 0, got {self.min_margin!r}")
        if self.max_pairs is not None and self.rule != "above_margin":
            raise ConfigError(f"pair_builder.max_pairs: {self.rule} makes one pair a prompt; leave it out")
        if self.max_pairs is not None and self.max_pairs < 1:
            raise ConfigError(f"pair_builder.max_pairs: must be ≥ 1, got {self.max_pairs!r}")

    def __call__(self, groups: Iterable[JudgedGroup], context: RoundContext) -> Iterator[PreferencePair]:
        """Yield the pairs of each group, in the order of `groups`; a group without a usable pair yields none."""
        for group in groups:
            usable = self._usable(group)
            if self.rule == "best_vs_worst":
                usable = usable[:1]
            elif self.rule == "above_margin":
                usable = usable[: self.max_pairs]
            elif usable:
                usable = [_best_vs_random(group, usable, context)]
            for chosen, rejected in usable:
                yield self._pair(group, chosen, rejected)

    def _usable(self, group: JudgedGroup) -> list[tuple[int, int]]:
        """Return (chosen, rejected) indices, the largest margin first, then the lower indices."""
        scored = [index for index, score in enumerate(group.scores) if score is not None]
        pairs = [(i, j) for i, j in permutations(scored, 2) if _margin(group, i, j) > self.min_margin]
        pairs.sort(key=lambda pair: (-_margin(group, *pair), pair))
        if not self.drop_identical:
            return pairs
        contents = [(completion.text, completion.media) for completion in group.completions]
        first: dict[object, tuple[int, int]] = {}
        for i, j in pairs:
            if contents[i] != contents[j]:
                first.setdefault((contents[i], contents[j]), (i, j))
        return list(first.values())

    def _pair(self, group: JudgedGroup, chosen: int, rejected: int) -> PreferencePair:
        winner, loser = group.completions[chosen], group.completions[rejected]
        return PreferencePair(
            pair_id=digest_of(winner.completion_id, loser.completion_id),
            prompt=group.prompt,
            chosen=winner,
            rejected=loser,
            chosen_score=group.scores[chosen],
            rejected_score=group.scores[rejected],
            margin=_margin(group, chosen, rejected),
            win_prob=None if group.win_prob is None else group.win_prob[chosen][rejected],
            weight=1.0,
            builder=f"ranked/{self.rule}",
            round=group.round,
        )


def _best_vs_random(group: JudgedGroup, usable: list[tuple[int, int]], context: RoundContext) -> tuple[int, int]:
    best = min((chosen for chosen, _ in usable), key=lambda index: (-_score(group, index), index))
    losers = sorted(rejected for chosen, rejected in usable if chosen == best)
    stream = random.Random(digest_of("best_vs_random", context.seed, context.round, group.prompt.prompt_id))
    return best, losers[stream.randrange(len(losers))]


def _margin(group: JudgedGroup, chosen: int, rejected: int) -> float:
    return _score(group, chosen) - _score(group, rejected)


def _score(group: JudgedGroup, index: int) -> float:
    score = group.scores[index]
    assert score is not None
    return score
