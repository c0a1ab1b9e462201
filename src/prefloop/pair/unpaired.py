"""Completions that are good or bad by themselves, without a rival: what KTO learns from."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from prefloop.errors import ConfigError, DataError
from prefloop.pair._one_sided import content_of, only_side, row_of
from prefloop.protocols import RoundContext
from prefloop.rows import JudgedGroup, PreferencePair, View


@dataclass(frozen=True)
class Unpaired:
    """One-sided pairs: a good completion as the chosen side, a bad one as the rejected side.

    - `threshold`: scores above `threshold` are good, scores below it bad; a completion at it says nothing and is left
      out. Data with a column `label`, or with `chosen` and `rejected`, have the scores 1 and 0, which 0.5 divides.
    - `rank`: of each prompt, the `best` highest scores are good and the `worst` lowest bad. A completion that is in
      both, or has the score of one in the other, is neither.

    Completions without a score are left out; of equal contents on one side of a prompt only the first is kept. Each
    row gets the view `mismatched`, from which KTO (arXiv 2402.01306) estimates its reference point z₀: a completion of
    another prompt of the round under the row's own prompt. The completions go round by as many places as the prompt
    with the most rows has, so that each of them is used once and none meets its own prompt. For that a round's rows
    are held in memory.

    Raises:
        ConfigError: threshold is not a number, or best or worst is below 1.
        DataError: more than half of a round's rows are of one prompt, so that they cannot be mismatched.

    """

    rule: Literal["threshold", "rank"] = "threshold"
    """What makes a completion good or bad: its score, or its place among the completions of its prompt."""
    threshold: float = 0.5
    """threshold only: the score between bad and good, in the judge's units. Default 0.5, for labels 1 and 0."""
    best: int = 1
    """rank only: good completions of each prompt, at most, ≥ 1."""
    worst: int = 1
    """rank only: bad completions of each prompt, at most, ≥ 1."""
    mismatched: bool = True
    """Make the view `mismatched`. Losses that do not read it, such as `apo_zero_unpaired`, need less work without."""

    needs_scores: ClassVar[bool] = True
    needs_gold: ClassVar[bool] = False
    one_sided: ClassVar[bool] = True
    # Of the default settings; an object without `mismatched` has none.
    views: ClassVar[tuple[str, ...]] = ("mismatched",)

    def __post_init__(self) -> None:
        if self.rule not in ("threshold", "rank"):
            raise ConfigError(f"pair_builder.rule (pair/unpaired.py): must be threshold or rank, got {self.rule!r}")
        if not math.isfinite(self.threshold):
            raise ConfigError(f"pair_builder.threshold (pair/unpaired.py): must be a number, got {self.threshold}")
        for name in ("best", "worst"):
            if getattr(self, name) < 1:
                raise ConfigError(f"pair_builder.{name} (pair/unpaired.py): must be ≥ 1, got {getattr(self, name)}")
        object.__setattr__(self, "views", ("mismatched",) if self.mismatched else ())

    def __call__(self, groups: Iterable[JudgedGroup], context: RoundContext) -> Iterator[PreferencePair]:
        """Yield one-sided pairs, in the order of `groups` and then of completions."""
        rows = (row for group in groups for row in self._rows(group, context))
        yield from mismatched(list(rows)) if self.mismatched else rows

    def _rows(self, group: JudgedGroup, context: RoundContext) -> Iterator[PreferencePair]:
        good, bad = self._by_rank(group) if self.rule == "rank" else self._by_threshold(group)
        seen: set[object] = set()
        for index, completion in enumerate(group.completions):
            for indices, is_good in ((good, True), (bad, False)):
                key = (is_good, content_of(completion))
                if index in indices and key not in seen:
                    seen.add(key)
                    yield row_of(group, index, is_good, f"unpaired/{self.rule}", context)

    def _by_threshold(self, group: JudgedGroup) -> tuple[set[int], set[int]]:
        scored = _scored(group)
        good = {index for score, index in scored if score > self.threshold}
        return good, {index for score, index in scored if score < self.threshold}

    def _by_rank(self, group: JudgedGroup) -> tuple[set[int], set[int]]:
        ranked: dict[object, tuple[float, int]] = {}
        for score, index in sorted(_scored(group), key=lambda item: (-item[0], item[1])):
            ranked.setdefault(content_of(group.completions[index]), (score, index))
        places = list(ranked.values())
        top, bottom = places[: self.best], places[-self.worst :]
        good = {index for score, index in top if score > bottom[0][0]}
        return good, {index for score, index in bottom if score < top[-1][0]}


def _scored(group: JudgedGroup) -> list[tuple[float, int]]:
    return [(score, index) for index, score in enumerate(group.scores) if score is not None]


def mismatched(rows: Sequence[PreferencePair]) -> Iterator[PreferencePair]:
    """Yield `rows`, those of one prompt together, each with another prompt's completion as the view `mismatched`.

    Raises:
        DataError: more than half of the rows are of one prompt.

    """
    counts = Counter(row.prompt.prompt_id for row in rows)
    shift = max(counts.values(), default=0)
    if 2 * shift > len(rows):
        raise DataError(
            f"pair_builder.mismatched: {shift} of the round's {len(rows)} completions are of one prompt, so not all of "
            "them can be shown under another one; take more prompts, or set it to false for a loss without z0"
        )
    for place, row in enumerate(rows):
        other = only_side(rows[place - shift])
        yield replace(row, views=(View("mismatched", row.prompt.messages, other),))
