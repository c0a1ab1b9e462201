"""Rounds take successive slices of the prompts, in an order that only the seed decides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from prefloop.prompts.choice import drawn
from prefloop.prompts.store import pick
from prefloop.protocols import Allotment
from prefloop.rows import Prompt


@dataclass(frozen=True)
class Shuffled:
    """Shuffle once, then give each round its slice; after the last prompt comes the first again. Has no settings."""

    needs_margins: ClassVar[bool] = False

    def __call__(self, prompts: Sequence[Prompt], ask: Allotment) -> Sequence[Prompt]:
        """Return the prompts of round `ask.round`."""
        ordered = drawn(prompts, ask.seed)
        size = min(ask.per_round or len(ordered), len(ordered))
        first = ask.round * (ask.per_round or len(ordered))
        return pick(prompts, ordered[(first + np.arange(size)) % max(1, len(ordered))])
