"""Completions with their win rate against all completions of the prompt: what SPPO's soft form learns from."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from prefloop.errors import ConfigError
from prefloop.pair._one_sided import content_of, row_of
from prefloop.protocols import RoundContext
from prefloop.rows import JudgedGroup, PreferencePair


@dataclass(frozen=True)
class WinRates:
    """One-sided pairs whose win_prob says how often the completion beats the policy that wrote all K of them.

        P(y_i beats π) = 1/K·Σ_j P_ij,   P_ii = ½,   P_ij = the judge's, else σ(scale·(s_i − s_j))

    Source: SPPO, arXiv 2405.00675, and its code, where a preference model gives s. The absent rival stands for the
    policy: win_prob is P(y beats π) where y is the chosen side, and 1 − P(y beats π) where it is the rejected one.
    Completions without a score are not counted in K. Where two of the same content would be taken, the first is. A
    prompt whose completions all have the same win rate, or with fewer than two, yields none.

    Raises:
        ConfigError: scale is not a number > 0, or keep is unknown.

    """

    keep: Literal["best_and_worst", "all"] = "best_and_worst"
    """best_and_worst: the highest win rate as chosen, the lowest as rejected, the first of equals (the authors' code).
    all: every completion, chosen where it wins at least half, else rejected."""
    scale: float = 1.0
    """Log-odds for each unit of score, > 0, where the judge gives no win probabilities. Default 1: the authors' code,
    whose scores are log-odds; a judge of another scale needs another one."""

    needs_scores: ClassVar[bool] = True
    needs_gold: ClassVar[bool] = False
    one_sided: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.keep not in ("best_and_worst", "all"):
            raise ConfigError(
                f"pair_builder.keep (pair/win_rates.py): must be best_and_worst or all, got {self.keep!r}"
            )
        if not 0 < self.scale < math.inf:
            raise ConfigError(f"pair_builder.scale (pair/win_rates.py): must be > 0, got {self.scale}")

    def __call__(self, groups: Iterable[JudgedGroup], context: RoundContext) -> Iterator[PreferencePair]:
        """Yield one-sided pairs, in the order of `groups`."""
        for group in groups:
            rates = self.rates(group)
            if len(set(rates.values())) < 2:
                continue
            if self.keep == "best_and_worst":
                taken = [(max(rates, key=rates.__getitem__), True), (min(rates, key=rates.__getitem__), False)]
            else:
                taken = [(index, rate >= 0.5) for index, rate in rates.items()]
            seen: set[object] = set()
            for index, good in taken:
                content = content_of(group.completions[index])
                if content not in seen:
                    seen.add(content)
                    rate = rates[index]
                    yield row_of(
                        group, index, good, f"win_rates/{self.keep}", context, win_prob=rate if good else 1 - rate
                    )

    def rates(self, group: JudgedGroup) -> dict[int, float]:
        """Return P(completion beats the policy) by index, of the completions that have a score."""
        scored = [(index, score) for index, score in enumerate(group.scores) if score is not None]
        wins = {}
        for i, mine in scored:
            against = [self._wins(group, i, j, mine - theirs) for j, theirs in scored if j != i]
            wins[i] = (math.fsum(against) + 0.5) / len(scored)
        return wins

    def _wins(self, group: JudgedGroup, i: int, j: int, lead: float) -> float:
        if group.win_prob is not None:
            return group.win_prob[i][j]
        return 0.5 * (1 + math.tanh(self.scale * lead / 2))
