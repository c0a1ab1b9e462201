"""Sentiment by a word list: a deterministic judge that needs no model and no network."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from prefloop.errors import ConfigError
from prefloop.protocols import RoundContext
from prefloop.rows import SampleGroup, Verdict


@dataclass(frozen=True)
class Lexicon:
    """VADER sentiment of the completion's text (Hutto and Gilbert 2014, ICWSM), from the `vaderSentiment` package.

    The prompt is not read. A text without a word of the lexicon scores 0.

    Raises:
        ConfigError: a field is out of range.

    """

    sign: float = 1.0
    """1 prefers positive text, -1 negative text."""
    score: Literal["compound", "positive_minus_negative"] = "compound"
    """compound: VADER's normalized sum over words, in [-1, 1]; it nears ±1 on long texts, and so on more words of
    feeling. positive_minus_negative: share of positive minus share of negative words, each weighted by its
    strength, in [-1, 1], which does not grow with length."""

    def __post_init__(self) -> None:
        if self.sign not in (1.0, -1.0):
            raise ConfigError(f"judge.sign: must be 1 (prefer positive text) or -1 (negative), got {self.sign!r}")
        if self.score not in ("compound", "positive_minus_negative"):
            raise ConfigError(f"judge.score: must be compound or positive_minus_negative, got {self.score!r}")

    def __call__(self, groups: Sequence[SampleGroup], context: RoundContext) -> list[Verdict]:
        """Return one verdict for each group, in order; every completion has a score."""
        return [
            Verdict(
                scores=tuple(self._score(completion.text) for completion in group.completions),
                notes=(None,) * len(group.completions),
            )
            for group in groups
        ]

    def _score(self, text: str) -> float:
        polarity = _analyzer().polarity_scores(text)
        value = polarity["compound"] if self.score == "compound" else polarity["pos"] - polarity["neg"]
        return self.sign * float(value) + 0.0  # + 0.0 turns -0.0 into 0.0


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()
