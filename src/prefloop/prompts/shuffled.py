"""Rounds take successive slices of the prompts, in an order that only the seed decides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from prefloop.protocols import Allotment
from prefloop.rows import Prompt, digest_of


@dataclass(frozen=True)
class Shuffled:
    """Shuffle once, then give each round its slice; after the last prompt comes the first again. Has no settings."""

    needs_margins: ClassVar[bool] = False

    def __call__(self, prompts: Sequence[Prompt], ask: Allotment) -> list[Prompt]:
        """Return the prompts of round `ask.round`."""
        ordered = sorted(prompts, key=lambda p: digest_of(ask.seed, p.prompt_id))
        size = min(ask.per_round or len(ordered), len(ordered))
        first = ask.round * (ask.per_round or len(ordered))
        return [ordered[(first + i) % len(ordered)] for i in range(size)]
