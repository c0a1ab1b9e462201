"""Curry-DPO's pairs in random order: what the order is compared with."""

import random
from dataclasses import dataclass

from prefloop.pair.curriculum import Curriculum
from prefloop.protocols import RoundContext
from prefloop.rows import JudgedGroup, PreferencePair, digest_of


@dataclass(frozen=True)
class ShuffledLadder(Curriculum):
    """Each round trains on another pair of each prompt, as in `Curriculum`; the order is drawn for each prompt."""

    seed: int = 0
    """Of the draw; the prompt takes part in it."""

    def _ladder(self, group: JudgedGroup, context: RoundContext) -> list[PreferencePair]:
        pairs = super()._ladder(group, context)
        random.Random(digest_of("shuffled ladder", self.seed, group.prompt.prompt_id)).shuffle(pairs)
        return pairs
