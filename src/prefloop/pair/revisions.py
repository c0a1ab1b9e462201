"""Pairs with both completions scored again after each of them as a draft: what SRPO learns from."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from prefloop.pair.ranked import Ranked
from prefloop.protocols import RoundContext
from prefloop.revision import INSTRUCTION, TEMPLATE, RevisionPrompt
from prefloop.rows import JudgedGroup, PreferencePair, View


@dataclass(frozen=True)
class Revisions:
    """The pairs of `ranked`, each with four views: chosen and rejected, after chosen and after rejected as the draft.

    Source: SRPO, arXiv 2406.01660; see `losses/srpo.py`. Pairs whose longest view exceeds `train.max_tokens` are
    dropped, not cut: a cut could delete the draft.

    Raises:
        ConfigError: a field is out of range, or the template lacks a placeholder.

    """

    rule: Literal["best_vs_worst", "best_vs_random", "above_margin"] = "best_vs_worst"
    """Which pairs to make: see `ranked`."""
    min_margin: float = 0.0
    """A pair needs a margin above this, in the judge's units, ≥ 0."""
    max_pairs: int | None = None
    """above_margin only: at most this many pairs for each prompt, ≥ 1. Default: all."""
    instruction: str = INSTRUCTION
    """What a chat model is asked to do with its draft. Our words; the sampler needs the same."""
    template: str = TEMPLATE
    """Plain-text prompts: how {prompt} and {draft} are put together. Ours; the sampler needs the same."""

    needs_scores: ClassVar[bool] = True
    needs_gold: ClassVar[bool] = False
    views: ClassVar[tuple[str, ...]] = (
        "chosen_given_rejected",
        "rejected_given_rejected",
        "chosen_given_chosen",
        "rejected_given_chosen",
    )

    def __post_init__(self) -> None:
        self._ranked()
        self._prompt()

    def __call__(self, groups: Iterable[JudgedGroup], context: RoundContext) -> Iterator[PreferencePair]:
        """Yield the pairs of each group, in the order of `groups`; a group without a usable pair yields none."""
        for pair in self._ranked()(groups, context):
            yield replace(pair, builder=f"revisions/{self.rule}", views=tuple(self._views(pair)))

    def _views(self, pair: PreferencePair) -> Iterator[View]:
        for name in self.views:
            answer, _, draft = name.partition("_given_")
            messages = self._prompt().messages(pair.prompt.messages, getattr(pair, draft).text)
            yield View(name, messages, getattr(pair, answer))

    def _ranked(self) -> Ranked:
        return Ranked(rule=self.rule, min_margin=self.min_margin, max_pairs=self.max_pairs)

    def _prompt(self) -> RevisionPrompt:
        return RevisionPrompt(self.instruction, self.template)
