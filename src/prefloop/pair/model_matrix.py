"""Pairs from a ladder of policies and the human answer, corrected by a judge or by people: the pairs of TSO."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from prefloop.artifact import file_digest
from prefloop.errors import ConfigError, DataError
from prefloop.pair._moments import excess_kurtosis, skewness
from prefloop.pair._verdicts import DROP, FLIP, VerdictFile, read_verdicts
from prefloop.protocols import RoundContext
from prefloop.rows import GOLD, Completion, JudgedGroup, PreferencePair, digest_of, gold_completion

GOLD_RUNG = -1
SHAPES: Mapping[str, Callable[[Sequence[float]], float]] = {"skew": skewness, "kurtosis": excess_kurtosis}


@dataclass(frozen=True)
class ModelMatrix:
    """Who wrote a completion says which one of two is chosen; then a judge or people correct that.

    Model matrix of TSO (arXiv 2409.02118). The ladder, from the top: the human answer; the newest promoted policy; the
    older ones in the order of their promotion; every other source, such as a smaller model.

        y_w from M_w = human answer ∪ the `chosen_rungs` highest policies,   y_l from any rung below that of y_w
        correction:  y_w, y_l are exchanged if judged the other way round, and dropped if they tie or are both bad

    A policy never meets itself. Of completions with one text the one on the highest rung counts. `flipped` marks pairs
    that stand against the ladder. People's verdicts come before the judge's.

    How sure: matrix, correction by people and by an AI judge, and that skewness and kurtosis of score distributions
    play a part are from summaries of the paper. Its sampling counts, its rule for skewness and kurtosis and its judge
    were not found. That a version's rank is its order of promotion, that all rungs below y_w serve as y_l, what a tie
    does, and the whole of `select_by` are readings of ours.

    Raises:
        ConfigError: a field is out of range, or the file of corrections cannot be read.
        DataError: a line of that file is wrong.

    """

    human: bool = True
    """Whether the prompt's gold answer is on top of the ladder; only prompts that have one then take part. False:
    policies only, which needs a second rung from the first round on: `sampler.smaller`. Default true, as in the
    paper."""
    chosen_rungs: int = 1
    """How many policies, from the newest down, are good enough to be chosen; ≥ 0. 0: human answers only. Default 1:
    the newest (ours, not found)."""
    correction: Literal["judge", "none"] = "judge"
    """judge: the run's judge scores every completion, the human answer too; a pair that it sees the other way round is
    exchanged, and one that it ties or cannot score is dropped. none: the ladder is believed."""
    tie_margin: float = 0.0
    """Scores this close are a tie, in the judge's units, ≥ 0. Default 0 (ours, not found)."""
    corrections: str | None = None
    """Path of a JSONL file with people's verdicts on the pairs of one round: `pair_id`, or `prompt_id`, `left` and
    `right` (texts), and `verdict` left, right, tie or both_bad. Left of a `pair_id` is its chosen side. A pair that
    does not exist is an error. Give each round its own file by `per_round`."""
    select_by: Literal["none", "skew", "kurtosis"] = "none"
    """Keep only the pools whose margins have the shape nearest to `shape_target`; a pool is the pairs of two sources,
    such as newest against previous policy. skew: m₃/m₂^1.5; kurtosis: m₄/m₂² − 3. Ours: the paper's rule was not
    found. Default none: all pools."""
    shape_target: float = 0.0
    """The skewness or excess kurtosis to be near to. Default 0, a symmetric or a normal distribution (ours)."""
    keep_pools: int = 1
    """Pools kept where `select_by` is set, ≥ 1. Default 1 (ours)."""

    # The content of `corrections`, so that a stage's key notices a changed file.
    corrections_digest: str | None = field(init=False, default=None)

    # Of the class; an object has the values that its settings ask for.
    needs_scores: ClassVar[bool] = True
    needs_gold: ClassVar[bool] = True

    def __post_init__(self) -> None:
        rules: list[tuple[str, object, bool, str]] = [
            ("chosen_rungs", self.chosen_rungs, self.chosen_rungs >= 0, "≥ 0"),
            ("chosen_rungs", self.chosen_rungs, self.human or self.chosen_rungs >= 1, "≥ 1 where human is false"),
            ("correction", self.correction, self.correction in ("judge", "none"), "judge or none"),
            ("tie_margin", self.tie_margin, 0 <= self.tie_margin < math.inf, "a number ≥ 0"),
            ("select_by", self.select_by, self.select_by in ("none", *SHAPES), "none, skew or kurtosis"),
            ("shape_target", self.shape_target, math.isfinite(self.shape_target), "a finite number"),
            ("keep_pools", self.keep_pools, self.keep_pools >= 1, "≥ 1"),
        ]
        for name, value, holds, rule in rules:
            if not holds:
                raise ConfigError(f"pair_builder.{name} (pair/model_matrix.py): must be {rule}, got {value!r}")
        object.__setattr__(self, "needs_scores", self.correction == "judge" or self.select_by != "none")
        object.__setattr__(self, "needs_gold", self.human)
        if self._verdicts is not None:
            object.__setattr__(self, "corrections_digest", file_digest(Path(self._verdicts.path)))

    def check_sampler(self, sampler: object) -> None:
        """Refuse a sampler whose first round has nothing to compare.

        Raises:
            ConfigError: no human answers and no smaller models, so that round 0 has one policy only.

        """
        if not self.human and not getattr(sampler, "smaller", ()):
            raise ConfigError(
                "pair_builder.human (pair/model_matrix.py): false, and sampler.smaller lists no models, so the first "
                "round has one policy and nothing to compare it with; list smaller models, with sampler.kind=matrix, "
                "or set pair_builder.human=true with the answers' column in prompts.gold"
            )

    @cached_property
    def _verdicts(self) -> VerdictFile | None:
        return None if self.corrections is None else read_verdicts(self.corrections)

    def __call__(self, groups: Iterable[JudgedGroup], context: RoundContext) -> Iterator[PreferencePair]:
        """Yield the pairs of each group, from the top of the ladder down.

        Raises:
            DataError: `corrections` names a pair that is not there, or two of its lines disagree on one pair; or
                `human` is false and no prompt has completions of two rungs.

        """
        rungs = _ladder(context)
        used: set[int] = set()
        pairs = self._corrected(self._provisional(groups, rungs, context.round), used)
        if self.select_by != "none":
            pairs = iter(self._selected(list(pairs)))
        for pair in pairs:
            yield self._record(pair)
        if self._verdicts is not None:
            self._verdicts.require_known(used)

    def _provisional(
        self, groups: Iterable[JudgedGroup], rungs: Mapping[str, int], round_: int
    ) -> Iterator["_Provisional"]:
        """Yield what the ladder says of each group."""
        most_rungs = 0
        for group in groups:
            sides = self._sides(group, rungs)
            most_rungs = max(most_rungs, len({side.rung for side in sides}))
            for winner in sides:
                if winner.rung < self.chosen_rungs:
                    yield from (_Provisional(group, winner, loser) for loser in sides if loser.rung > winner.rung)
        if most_rungs == 1 and not self.human:
            raise DataError(
                f"pair_builder (pair/model_matrix.py), round {round_}: all completions of a prompt stand on one rung "
                "of the ladder, so no two can be compared. List smaller models in sampler.smaller, with "
                "sampler.kind=matrix, or let human answers take part: pair_builder.human=true, with their column in "
                "prompts.gold"
            )

    def _sides(self, group: JudgedGroup, rungs: Mapping[str, int]) -> list["_Side"]:
        """Return the completions with their rungs, from the top down, and no text twice."""
        found = [
            _Side(completion, group.scores[index], rungs.get(completion.source, len(rungs)), index)
            for index, completion in enumerate(group.completions)
            if self.human or completion.source != GOLD
        ]
        if self.human and group.prompt.gold is not None and all(side.rung != GOLD_RUNG for side in found):
            found.append(_Side(gold_completion(group.prompt), None, GOLD_RUNG, None))
        found.sort(key=lambda side: side.rung)
        first: dict[object, _Side] = {}
        for side in found:
            first.setdefault((side.completion.text, side.completion.media), side)
        return list(first.values())

    def _corrected(self, pairs: Iterable["_Provisional"], used: set[int]) -> Iterator["_Provisional"]:
        """Yield the pairs that are kept, exchanged where that was judged; note in `used` the lines that spoke."""
        for pair in pairs:
            flips = self._flips(pair, used)
            if flips is not None:
                yield pair.flip() if flips else pair

    def _flips(self, pair: "_Provisional", used: set[int]) -> bool | None:
        """Return whether the sides change places; `None`: no pair."""
        if self._verdicts is not None:
            texts = (pair.winner.completion.text, pair.loser.completion.text)
            ids = (pair.pair_id, pair.flip().pair_id)
            said, lines = self._verdicts.of(pair.group.prompt.prompt_id, ids, texts)
            used |= lines
            if said is not None:
                return None if said == DROP else said == FLIP
        if self.correction == "none":
            return False
        margin = pair.margin
        if margin is None or abs(margin) <= self.tie_margin:
            return None
        return margin < 0

    def _selected(self, pairs: list["_Provisional"]) -> list["_Provisional"]:
        """Return the pairs of the pools whose margins, as they would be trained on, have the wanted shape."""
        margins: dict[frozenset[str], list[float]] = {}
        for pair in pairs:
            margins.setdefault(pair.pool, []).extend([] if pair.margin is None else [pair.margin])
        shape = SHAPES[self.select_by]

        def distance(pool: frozenset[str]) -> float:
            found = shape(margins[pool])
            return math.inf if math.isnan(found) else abs(found - self.shape_target)

        kept = sorted(margins, key=distance)[: self.keep_pools]  # stable: equally near ones from the top down
        return [pair for pair in pairs if pair.pool in kept]

    def _record(self, pair: "_Provisional") -> PreferencePair:
        # A group may have scores that this rule was told not to look at.
        scored = self.needs_scores
        return PreferencePair(
            pair_id=pair.pair_id,
            prompt=pair.group.prompt,
            chosen=pair.winner.completion,
            rejected=pair.loser.completion,
            chosen_score=pair.winner.score if scored else None,
            rejected_score=pair.loser.score if scored else None,
            margin=max(0.0, pair.margin or 0.0) if scored else 0.0,
            win_prob=pair.win_prob if scored else None,
            weight=1.0,
            builder="model_matrix",
            round=pair.group.round,
            flipped=pair.flipped,
        )


@dataclass(frozen=True, slots=True)
class _Side:
    """A completion on its rung; `index` is its place in the group, `None` for a human answer that is not in it."""

    completion: Completion
    score: float | None
    rung: int
    index: int | None


@dataclass(frozen=True, slots=True)
class _Provisional:
    """A pair before it is a record."""

    group: JudgedGroup
    winner: _Side
    loser: _Side
    flipped: bool = False

    def flip(self) -> "_Provisional":
        """Return the pair with its sides exchanged; twice is the pair itself."""
        return _Provisional(self.group, self.loser, self.winner, not self.flipped)

    @property
    def pair_id(self) -> str:
        """Another one for the exchanged pair."""
        return digest_of(self.winner.completion.completion_id, self.loser.completion.completion_id)

    @property
    def margin(self) -> float | None:
        """Winner's score − loser's; `None` where one has none."""
        if self.winner.score is None or self.loser.score is None:
            return None
        return self.winner.score - self.loser.score

    @property
    def win_prob(self) -> float | None:
        """The judge's probability that the winner is better; `None` where it gave none."""
        table, winner, loser = self.group.win_prob, self.winner.index, self.loser.index
        return None if table is None or winner is None or loser is None else table[winner][loser]

    @property
    def pool(self) -> frozenset[str]:
        """The two sources; the same for the exchanged pair."""
        return frozenset((self.winner.completion.source, self.loser.completion.source))


def _ladder(context: RoundContext) -> dict[str, int]:
    """Return the rung of each known source: −1 the human answer, 0 the newest policy, and so on down."""
    known = [version.digest for version in context.versions]
    if context.policy.digest not in known:
        known.append(context.policy.digest)
    # A policy that was promoted twice stands where it was promoted last.
    policies = list(dict.fromkeys(reversed(known)))
    return {GOLD: GOLD_RUNG, **{digest: rung for rung, digest in enumerate(policies)}}
