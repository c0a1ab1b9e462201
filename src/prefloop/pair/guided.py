"""Pairs from scores, each with a ground-truth completion beside it for guided DPO."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from prefloop.pair.ranked import Ranked
from prefloop.protocols import RoundContext
from prefloop.rows import GOLD, JudgedGroup, PreferencePair, Prompt, View, digest_of, gold_completion


@dataclass(frozen=True)
class Guided:
    """The pairs of `ranked` over the policy's own completions, each with the view `gold`.

    The view is a reference answer under its own prompt: the ground truth of gDPO (video-SALMONN 2, arXiv 2506.15220),
    which `losses/guided.py` learns. The reference answer takes no part in the pair itself.

    Raises:
        ConfigError: a field is out of range.

    """

    rule: Literal["best_vs_worst", "best_vs_random", "above_margin"] = "best_vs_worst"
    """Which pairs to make: see `ranked`."""
    min_margin: float = 0.0
    """A pair needs a margin above this, in the judge's units, ≥ 0. The paper has thresholds for each of its metrics."""
    max_pairs: int | None = None
    """above_margin only: at most this many pairs for each prompt, ≥ 1. Default: all."""
    gold: Literal["own", "random"] = "own"
    """own: the reference answer of the pair's prompt, as the fields of the authors' first code have it. random: that of
    a prompt drawn from the round's, as the ICLR 2025 submission describes."""

    needs_scores: ClassVar[bool] = True
    needs_gold: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("gold",)

    def __post_init__(self) -> None:
        self._ranked()

    def __call__(self, groups: Iterable[JudgedGroup], context: RoundContext) -> Iterator[PreferencePair]:
        """Yield the pairs of each group, in the order of `groups`; a group without a usable pair yields none."""
        own = [_without_gold(group) for group in groups]
        prompts = [group.prompt for group in own if group.prompt.gold is not None]
        for pair in self._ranked()(own, context):
            source = pair.prompt
            if self.gold == "random":
                stream = random.Random(digest_of("gold", context.seed, context.round, pair.pair_id))
                source = prompts[stream.randrange(len(prompts))]
            yield replace(pair, builder=f"guided/{self.rule}", views=(_gold_view(source),))

    def _ranked(self) -> Ranked:
        return Ranked(rule=self.rule, min_margin=self.min_margin, max_pairs=self.max_pairs)


def _without_gold(group: JudgedGroup) -> JudgedGroup:
    kept = [i for i, completion in enumerate(group.completions) if completion.source != GOLD]
    return replace(
        group,
        completions=tuple(group.completions[i] for i in kept),
        scores=tuple(group.scores[i] for i in kept),
        notes=tuple(group.notes[i] for i in kept),
        win_prob=group.win_prob and tuple(tuple(group.win_prob[i][j] for j in kept) for i in kept),
    )


def _gold_view(prompt: Prompt) -> View:
    return View("gold", prompt.messages, gold_completion(prompt))
