"""Pairs from statistical rejection sampling: the pairs of RSO (Liu et al. 2023, arXiv 2309.06657)."""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from prefloop.errors import ConfigError
from prefloop.protocols import RoundContext
from prefloop.rows import JudgedGroup, PreferencePair, digest_of


@dataclass(frozen=True)
class Rejection:
    """Thin a prompt's completions out to a sample of π(y|x)·exp(r(x, y)/β), then pair what is left by score.

    Algorithm 1 of Liu et al. 2023, arXiv 2309.06657, with r the judge's score, β = beta and k = accept:

        pool = the scored completions, Y = ()
        until Y holds k completions or the pool is empty:
            r_max = the largest score in the pool
            each y of the pool: goes to Y if u < exp((r(y) − r_max)/β),   u uniform in [0, 1)

    Every pass accepts at least the best of the pool. Where the pool is no larger than k, all of it is accepted.
    The accepted ones play, and the higher score is chosen. A tie makes no pair. The result depends on the group and on
    the run's seed, the round and the prompt id, not on other groups.

    Departs from the paper: one score both thins out and labels (theirs labels with the same model's verdict on the
    two); the pool is visited and the accepted ones are paired in random order, since the paper says neither (for
    samples of one policy the first makes no difference); after a tie the earlier of the two stays in the tournament;
    completions of one content count once, with the first one's score (the paper's code: the last one's).

    Raises:
        ConfigError: a field is out of range.

    """

    beta: float = 0.5
    """β, temperature of the tilt, in the judge's units, ≥ 0. 0: the k best; `.inf`: any k. Default 0.5: the paper's
    best of 0, 0.05, 0.5 and 5, for a score that is a log-odds (its section 5.2). Another judge's scale needs another
    one."""
    accept: int = 8
    """k, completions of each prompt that are kept, ≥ 2. Default 8: the paper's, of 64 samples. It does nothing unless
    `sampler.completions` is larger."""
    pairing: Literal["first_round", "tournament"] = "first_round"
    """Who plays whom. first_round: two by two, at most k // 2 pairs, the odd one sits out. tournament: the winners go
    on until one is left, at most k − 1 pairs. Default first_round: the paper's, whose section 5.2 finds that the
    tournament raises the reward model's win rate and not that of its other judge."""

    needs_scores: ClassVar[bool] = True
    needs_gold: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.beta >= 0:
            raise ConfigError(f"pair_builder.beta (pair/rejection.py): must be a number ≥ 0, got {self.beta!r}")
        if self.accept < 2:
            raise ConfigError(f"pair_builder.accept (pair/rejection.py): must be ≥ 2, got {self.accept!r}")
        if self.pairing not in ("first_round", "tournament"):
            raise ConfigError(
                f"pair_builder.pairing (pair/rejection.py): must be first_round or tournament, got {self.pairing!r}"
            )

    def __call__(self, groups: Iterable[JudgedGroup], context: RoundContext) -> Iterator[PreferencePair]:
        """Yield the pairs of each group, in the order of `groups`; a group without a usable pair yields none."""
        for group in groups:
            scores = _scores(group)
            stream = random.Random(digest_of("rejection", context.seed, context.round, group.prompt.prompt_id))
            accepted = self._accepted(scores, stream)
            stream.shuffle(accepted)
            for chosen, rejected in self._games(accepted, scores):
                yield self._pair(group, scores, chosen, rejected)

    def _accepted(self, scores: dict[int, float], stream: random.Random) -> list[int]:
        """Return the indices of the accepted completions, in the order in which they were accepted."""
        pool = list(scores)
        stream.shuffle(pool)
        accepted: list[int] = []
        while pool and len(accepted) < self.accept:
            top = max(scores[index] for index in pool)
            left = []
            for index in pool:
                if len(accepted) < self.accept and stream.random() < self._chance(scores[index] - top):
                    accepted.append(index)
                else:
                    left.append(index)
            pool = left
        return accepted

    def _chance(self, gap: float) -> float:
        """Return exp(gap/β) for a gap of at most 0; the best of the pool is sure of its place at any β."""
        if gap == 0:
            return 1.0
        return math.exp(gap / self.beta) if self.beta else 0.0

    def _games(self, players: Sequence[int], scores: dict[int, float]) -> Iterator[tuple[int, int]]:
        """Yield (winner, loser) of each game that is not a tie."""
        while len(players) > 1:
            winners = []
            for one, other in zip(players[::2], players[1::2], strict=False):
                winner, loser = (other, one) if scores[other] > scores[one] else (one, other)
                winners.append(winner)
                if scores[winner] > scores[loser]:
                    yield winner, loser
            if self.pairing == "first_round":
                return
            players = winners + list(players[2 * len(winners) :])

    def _pair(self, group: JudgedGroup, scores: dict[int, float], chosen: int, rejected: int) -> PreferencePair:
        winner, loser = group.completions[chosen], group.completions[rejected]
        return PreferencePair(
            pair_id=digest_of(winner.completion_id, loser.completion_id),
            prompt=group.prompt,
            chosen=winner,
            rejected=loser,
            chosen_score=scores[chosen],
            rejected_score=scores[rejected],
            margin=scores[chosen] - scores[rejected],
            win_prob=None if group.win_prob is None else group.win_prob[chosen][rejected],
            weight=1.0,
            builder=f"rejection/{self.pairing}",
            round=group.round,
        )


def _scores(group: JudgedGroup) -> dict[int, float]:
    """Return the score of each completion that has one, by index; of those with one content the first's."""
    first: dict[object, tuple[int, float]] = {}
    for index, (completion, score) in enumerate(zip(group.completions, group.scores, strict=True)):
        if score is not None:
            first.setdefault((completion.text, completion.media), (index, score))
    return dict(first.values())
