"""Easy preference data first, as the starting policy sees them: the order of sDPO (arXiv 2403.19270)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from prefloop.errors import DataError
from prefloop.prompts.choice import places_by_origin
from prefloop.prompts.store import ids_of, index_of, pick
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

    def __call__(self, prompts: Sequence[Prompt], ask: Allotment) -> Sequence[Prompt]:
        """Return the prompts of round `ask.round`.

        Raises:
            DataError: `by` is source, and rows name no source or not as many as there are rounds.

        """
        if self.by == "source":
            sources = self._sources(prompts, ask.rounds)
            easiest = sorted(sources, key=lambda name: (-accuracy(sources[name], ask.margins), name))
            return _some(sources[easiest[ask.round]], ask)
        ranked = np.lexsort((index_of(prompts).ids, -margins_of(prompts, ask.margins)))
        begin, end = (len(ranked) * number // ask.rounds for number in (ask.round, ask.round + 1))
        return _some(pick(prompts, ranked[begin:end]), ask)

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
    def _sources(prompts: Sequence[Prompt], rounds: int) -> dict[str, Sequence[Prompt]]:
        none = "no column `source`; name each row's data set in it, or set order.by=margin"
        sources: dict[str, Sequence[Prompt]] = {
            name: pick(prompts, places) for name, places in places_by_origin(prompts, none).items()
        }
        if len(sources) != rounds:
            raise DataError(
                f"the data have {len(sources)} sources ({', '.join(sorted(sources))}) for {rounds} rounds; set "
                f"rounds={len(sources)}, or order.by=margin"
            )
        return sources


def _some(share: Sequence[Prompt], ask: Allotment) -> Sequence[Prompt]:
    """Return as many prompts of a share as are asked for, in the order of the share."""
    if ask.per_round is None or ask.per_round >= len(share):
        return share
    draws = [digest_of(ask.seed, name) for name in ids_of(share)]
    return pick(share, np.sort(np.argsort(draws)[: ask.per_round]))


def accuracy(prompts: Sequence[Prompt], margins: Mapping[str, float]) -> float:
    """Return the share of prompts whose chosen completion the policy finds likelier, ties half."""
    found = margins_of(prompts, margins)
    return float(np.sum(found > 0) + 0.5 * np.sum(found == 0)) / len(prompts)


def margins_of(prompts: Sequence[Prompt], margins: Mapping[str, float]) -> NDArray[np.float64]:
    """Return the margin of each prompt, in nats: `[prompt]`."""
    return np.fromiter((margins[name] for name in ids_of(prompts)), np.float64, len(prompts))
