"""Completions to imitate, without rivals: what supervised learning on a policy's own samples trains on."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from prefloop.errors import ConfigError
from prefloop.protocols import RoundContext
from prefloop.rows import ABSENT, GOLD, JudgedGroup, PreferencePair, digest_of


@dataclass(frozen=True)
class OwnSamples:
    """One-sided pairs: sampled completions as the chosen side, no rejected one. For losses on unpaired data, as `sft`.

    With `sft` and the first policy as `start_from` this is the rebirth tuning of video-SALMONN 2 (arXiv 2506.15220 and
    its ICLR 2025 submission): the last policy of many rounds labels the data, unnatural completions are dropped, and
    the policy as it was before preference training learns from them.

    Raises:
        ConfigError: min_score is not a number.

    """

    keep: Literal["best", "all"] = "best"
    """Of each prompt's completions: the one with the highest score (the first of equals), or every one."""
    min_score: float | None = None
    """Completions that score below this are dropped, in the judge's units. None: none is."""
    stopped: bool = False
    """Drop completions that were cut at the length limit."""

    needs_scores: ClassVar[bool] = True
    needs_gold: ClassVar[bool] = False
    one_sided: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.min_score is not None and not math.isfinite(self.min_score):
            raise ConfigError(f"pair_builder.min_score: must be a number or null, got {self.min_score}")

    def __call__(self, groups: Iterable[JudgedGroup], context: RoundContext) -> Iterator[PreferencePair]:
        """Yield one-sided pairs, in the order of `groups`; a completion without a score is dropped."""
        for group in groups:
            usable = [
                (score, completion)
                for score, completion in zip(group.scores, group.completions, strict=True)
                if score is not None
                and completion.source != GOLD
                and (self.min_score is None or score >= self.min_score)
                and not (self.stopped and completion.finish_reason == "length")
            ]
            if self.keep == "best":
                usable = sorted(usable, key=lambda item: -item[0])[:1]
            seen: set[str] = set()
            for score, completion in usable:
                if completion.text in seen:
                    continue
                seen.add(completion.text)
                yield PreferencePair(
                    pair_id=digest_of(completion.completion_id, ABSENT.completion_id),
                    prompt=group.prompt,
                    chosen=completion,
                    rejected=ABSENT,
                    chosen_score=score,
                    rejected_score=None,
                    margin=0.0,
                    win_prob=None,
                    weight=1.0,
                    builder=f"own_samples/{self.keep}",
                    round=context.round,
                )
