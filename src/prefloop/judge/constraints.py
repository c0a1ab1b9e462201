"""How many of its prompt's instructions a completion follows, checked by program: see `prefloop.constraints`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prefloop.constraints.instructions import Criterion, instructions_in_gold
from prefloop.errors import ConfigError
from prefloop.protocols import RoundContext
from prefloop.rows import SampleGroup, Verdict


@dataclass(frozen=True)
class Constraints:
    """Share of the prompt's instructions that a completion follows, 0–1; `None` with a note where it has none.

    The instructions are those of IFEval (arXiv 2311.07911), 25 types. They come in the prompt's gold answer, as the
    JSON text that `prefloop.constraints.instructions.gold_of` makes of a row with `instruction_id_list` and `kwargs`;
    name its column in `prompts.gold`. A pair rule that reads the gold answer as a completion cannot be used with it.

    Raises:
        ConfigError: a field is out of range.

    """

    criterion: Criterion = "strict"
    """strict: the completion as it is. loose: without first line, last line or asterisks is enough, the authors' guard
    against false negatives; as a reward it teaches nothing about these."""
    score: Literal["share", "all"] = "share"
    """share: followed / asked, the same weight for each instruction. all: 1 if every one is followed, else 0."""

    def __post_init__(self) -> None:
        if self.criterion not in ("strict", "loose"):
            raise ConfigError(f"judge.criterion: must be strict or loose, got {self.criterion!r}")
        if self.score not in ("share", "all"):
            raise ConfigError(f"judge.score: must be share or all, got {self.score!r}")

    def __call__(self, groups: Sequence[SampleGroup], context: RoundContext) -> list[Verdict]:
        """Return one verdict for each group, in order.

        Raises:
            DataError: a gold answer holds instructions that cannot be read.
            ConfigError: an instruction needs the language detector and it is not installed.

        """
        return [self._verdict(group) for group in groups]

    def _verdict(self, group: SampleGroup) -> Verdict:
        count = len(group.completions)
        asked = instructions_in_gold(group.prompt)
        if not asked:
            note = f"{group.prompt.source}: the gold answer holds no instructions"
            return Verdict((None,) * count, (note,) * count)
        missed = [
            [i.type for i in asked if not i.followed(completion.text, self.criterion)]
            for completion in group.completions
        ]
        scores = tuple(float(not m) if self.score == "all" else (len(asked) - len(m)) / len(asked) for m in missed)
        return Verdict(scores, tuple(f"not followed: {', '.join(m)}" if m else None for m in missed))
