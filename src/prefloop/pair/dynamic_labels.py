"""Human and own answer, the better one chosen: the labelling of DNPO (Yang et al. 2025, arXiv 2502.05400)."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from prefloop.errors import ConfigError
from prefloop.protocols import RoundContext
from prefloop.rows import GOLD, JudgedGroup, PreferencePair, digest_of


@dataclass(frozen=True)
class DynamicLabels:
    """Dynamic sample labelling: the judge decides for each pair whether the human or the own answer is chosen.

        y⁺, y⁻ = y^h, y^g  if s(y^h) > s(y^g),  else y^g, y^h        y^h gold, y^g sampled, s = the judge's score

    The gold answer is one of the group's completions, with source `gold`, judged by the same judge; it meets every
    other completion once. `flipped` is true where the own answer is the chosen one, so that the share of flipped
    pairs is what SPIN would have labelled the other way round. A side without a score, a group without a gold
    answer, and an own answer with the text of the gold one make no pair; the same text twice makes one.

    Departs from the paper: it samples one own answer for each prompt; here every own answer of the group meets the
    gold one. Its tie rule and its judge's prompt are not known (not in the text, by all reviews that were found).

    Raises:
        ConfigError: a field is out of range.

    """

    ties: Literal["keep_human", "drop"] = "keep_human"
    """What equal scores mean. keep_human: the gold answer is chosen, as in SPIN. drop: no pair. The paper's rule was
    not found; this default is ours, so that a judge that cannot tell gives SPIN."""
    prefer: Literal["score", "human"] = "score"
    """score: as above. human: the gold answer is chosen whatever the scores, and none is needed, which is SPIN: the
    paper's warm-up round, and what its ablation of the labels compares with. Margins are then 0 where the own answer
    scored higher."""
    tie_margin: float = 0.0
    """Scores this close count as equal, in the judge's units, ≥ 0. 0 is the paper as far as it is known; a noisy
    judge may want more. A tie that keeps the human answer has margin 0 if the own one scored higher."""

    needs_scores: ClassVar[bool] = True
    needs_gold: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.ties not in ("keep_human", "drop"):
            raise ConfigError(f"pair_builder.ties: must be keep_human or drop, got {self.ties!r}")
        if self.prefer not in ("score", "human"):
            raise ConfigError(f"pair_builder.prefer: must be score or human, got {self.prefer!r}")
        if not (math.isfinite(self.tie_margin) and self.tie_margin >= 0):
            raise ConfigError(f"pair_builder.tie_margin: must be a number ≥ 0, got {self.tie_margin!r}")

    def __call__(self, groups: Iterable[JudgedGroup], context: RoundContext) -> Iterator[PreferencePair]:
        """Yield the pairs of each group, in the order of its completions."""
        for group in groups:
            gold = next((i for i, c in enumerate(group.completions) if c.source == GOLD), None)
            if gold is None:
                continue
            seen = {_content(group, gold)}
            for own, completion in enumerate(group.completions):
                if completion.source == GOLD or _content(group, own) in seen:
                    continue
                pair = self._pair(group, gold, own)
                if pair is not None:
                    seen.add(_content(group, own))
                    yield pair

    def _pair(self, group: JudgedGroup, gold: int, own: int) -> PreferencePair | None:
        flipped = self._flips(group.scores[gold], group.scores[own])
        if flipped is None:
            return None
        chosen, rejected = (own, gold) if flipped else (gold, own)
        winner, loser = group.completions[chosen], group.completions[rejected]
        chosen_score, rejected_score = group.scores[chosen], group.scores[rejected]
        return PreferencePair(
            pair_id=digest_of(winner.completion_id, loser.completion_id),
            prompt=group.prompt,
            chosen=winner,
            rejected=loser,
            chosen_score=chosen_score,
            rejected_score=rejected_score,
            margin=0.0 if chosen_score is None or rejected_score is None else max(0.0, chosen_score - rejected_score),
            win_prob=None if group.win_prob is None else group.win_prob[chosen][rejected],
            weight=1.0,
            builder="dynamic_labels",
            round=group.round,
            flipped=flipped,
        )

    def _flips(self, human: float | None, own: float | None) -> bool | None:
        """Return whether the own answer is chosen; `None`: no pair."""
        if self.prefer == "human":
            return False
        if human is None or own is None:
            return None
        if abs(human - own) <= self.tie_margin:
            return None if self.ties == "drop" else False
        return own > human


def _content(group: JudgedGroup, index: int) -> tuple[str, tuple[str, ...]]:
    return group.completions[index].text, group.completions[index].media
