"""The human answer against the policy's own: the pairs of SPIN (Chen et al. 2024, arXiv 2401.01335)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from prefloop.protocols import RoundContext
from prefloop.rows import JudgedGroup, PreferencePair, digest_of, gold_completion


@dataclass(frozen=True)
class VersusGold:
    """Chosen is the prompt's gold answer, rejected each completion that the policy sampled; no judge is asked.

    A completion whose text equals the gold answer teaches nothing and makes no pair; the same text twice makes one.
    Has no settings.
    """

    needs_scores: ClassVar[bool] = False
    needs_gold: ClassVar[bool] = True

    def __call__(self, groups: Iterable[JudgedGroup], context: RoundContext) -> Iterator[PreferencePair]:
        """Yield one pair for each completion of a prompt that has a gold answer."""
        for group in groups:
            if group.prompt.gold is None:
                continue
            gold = gold_completion(group.prompt)
            for own in {c.text: c for c in reversed(group.completions) if c.text != gold.text}.values():
                yield PreferencePair(
                    pair_id=digest_of(gold.completion_id, own.completion_id),
                    prompt=group.prompt,
                    chosen=gold,
                    rejected=own,
                    chosen_score=None,
                    rejected_score=None,
                    margin=0.0,
                    win_prob=None,
                    weight=1.0,
                    builder="versus_gold",
                    round=context.round,
                )
