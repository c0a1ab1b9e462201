"""Easy preference data first, as the starting policy sees them: the order of sDPO (arXiv 2403.19270)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from prefloop.errors import DataError
from prefloop.protocols import Allotment
from prefloop.rows import Prompt, digest_of


@dataclass(frozen=True)
class EasyFirst:
    """Give each round one share of the data, the easiest first; every prompt is used once at most.

    With `prompts_per_round` a round takes that many prompts of its share, drawn by the seed; else all of them.

    Easy means that the starting policy prefers the chosen completion already: log π(chosen) > log π(rejected), summed
    over tokens. The paper speaks of the reward of the starting policy, which is identically 0 where that policy is also
    the reference; the log-prob comparison is our reading of it.
    """

    by: Literal["source", "margin"] = "source"
    """source (the paper's): one round for each data set that the column `source` names, by falling share of easy
    pairs. margin (ours, for data of one source): prompts sorted by log π(chosen) − log π(rejected), largest first, cut
    into as many equal shares as there are rounds."""

    needs_margins: ClassVar[bool] = True

    def __call__(self, prompts: Sequence[Prompt], ask: Allotment) -> list[Prompt]:
        """Return the prompts of round `ask.round`.

        Raises:
            DataError: `by` is source, and rows name no source or not as many as there are rounds.

        """
        if self.by == "source":
            sources = self._sources(prompts, ask.rounds)
            easiest = sorted(sources, key=lambda name: (-accuracy(sources[name], ask.margins), name))
            return _some(sources[easiest[ask.round]], ask)
        ranked = sorted(prompts, key=lambda p: (-ask.margins[p.prompt_id], p.prompt_id))
        share = ranked[len(ranked) * ask.round // ask.rounds : len(ranked) * (ask.round + 1) // ask.rounds]
        return _some(share, ask)

    def check_prompts(self, prompts: Sequence[Prompt], rounds: int) -> None:
        """Refuse data without a difficulty, and, where `by` is source, without as many sources as there are rounds.

        Raises:
            DataError: names the row, or the sources.

        """
        for prompt in prompts:
            if len({candidate.score for candidate in prompt.candidates} - {None}) < 2:
                raise DataError(
                    f"{prompt.source}: needs two completions with different scores to measure its difficulty; give the "
                    "columns chosen and rejected, or set order.kind=shuffled"
                )
        if self.by == "source":
            self._sources(prompts, rounds)

    @staticmethod
    def _sources(prompts: Sequence[Prompt], rounds: int) -> dict[str, list[Prompt]]:
        sources: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            if prompt.origin is None:
                raise DataError(
                    f"{prompt.source}: no column `source`; name each row's data set in it, or set order.by=margin"
                )
            sources.setdefault(prompt.origin, []).append(prompt)
        if len(sources) != rounds:
            raise DataError(
                f"the data have {len(sources)} sources ({', '.join(sorted(sources))}) for {rounds} rounds; set "
                f"rounds={len(sources)}, or order.by=margin"
            )
        return sources


def _some(share: list[Prompt], ask: Allotment) -> list[Prompt]:
    """Return as many prompts of a share as are asked for, in the order of the share."""
    drawn = sorted(share, key=lambda p: digest_of(ask.seed, p.prompt_id))[: ask.per_round]
    kept = {prompt.prompt_id for prompt in drawn}
    return [prompt for prompt in share if prompt.prompt_id in kept]


def accuracy(prompts: Sequence[Prompt], margins: Mapping[str, float]) -> float:
    """Return the share of prompts whose chosen completion the policy finds likelier, ties half."""
    wins = (1.0 if margins[p.prompt_id] > 0 else 0.5 if margins[p.prompt_id] == 0 else 0.0 for p in prompts)
    return sum(wins) / len(prompts)
