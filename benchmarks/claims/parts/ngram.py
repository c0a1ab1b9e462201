"""How likely a word trigram model of real stories finds a completion; one half of the stories trains, one evaluates."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from prefloop.evaluate.heldout import words
from prefloop.protocols import RoundContext
from prefloop.rows import SampleGroup, Verdict

Gram = tuple[str, ...]
ORDER = 3


@dataclass(frozen=True)
class Counts:
    """How often each word follows each context of up to `ORDER` − 1 words."""

    follows: dict[Gram, Counter[str]]
    total: dict[Gram, int]

    def probability(self, context: Gram, word: str) -> float:
        """Return p(word | context), interpolated over shorter contexts (Witten and Bell 1991, method C)."""
        vocabulary = len(self.follows[()]) + 1  # one for all unknown words together
        shorter = self.probability(context[1:], word) if context else 1 / vocabulary
        if context not in self.total:
            return shorter
        kinds = len(self.follows[context])
        return (self.follows[context][word] + kinds * shorter) / (self.total[context] + kinds)


@dataclass(frozen=True)
class Ngram:
    """Mean log-probability of the completion's words after its prompt, nats per word, drawn to `prior` if they are few.

    Two of these on disjoint stories agree on most pairs and are yet independently made: a training and an evaluation
    judge of one thing.
    """

    path: str
    """Text file of stories with `<|endoftext|>` between them: TinyStories, by GPT-3.5 and GPT-4 (arXiv 2305.07759)."""
    half: Literal["even", "odd"]
    """Which stories are counted, by their number in the file: two judges of the two halves share no story."""
    prior_words: float = 50.0
    """So many words of average text are thought to follow, ≥ 0, so that a short text cannot win by luck."""
    prior: float = -3.4
    """Log-probability of such a word, nats: what the story model's own completions have."""

    @cached_property
    def counts(self) -> Counts:
        """The trigram counts of the file; the last story, which is cut, is left out."""
        stories = Path(self.path).read_text(encoding="utf-8").split("<|endoftext|>")[:-1]
        stories = stories[self.half == "odd" :: 2]
        follows: dict[Gram, Counter[str]] = defaultdict(Counter)
        for story in stories:
            found = _words(story)
            for at, word in enumerate(found):
                for size in range(min(at, ORDER - 1) + 1):
                    follows[tuple(found[at - size : at])][word] += 1
        return Counts(dict(follows), {context: found.total() for context, found in follows.items()})

    def __call__(self, groups: Sequence[SampleGroup], context: RoundContext) -> list[Verdict]:
        """Return one verdict for each group, in order; every completion has a score."""
        verdicts = []
        for group in groups:
            scores = tuple(self._score(group.prompt.text, c.text) for c in group.completions)
            verdicts.append(Verdict(scores, (None,) * len(scores)))
        return verdicts

    def _score(self, prompt: str, completion: str) -> float:
        before, found = _words(prompt), _words(completion)
        whole = [*before, *found]
        terms = [
            math.log(self.counts.probability(tuple(whole[max(0, at - ORDER + 1) : at]), whole[at]))
            for at in range(len(before), len(whole))
        ]
        return (sum(terms) + self.prior_words * self.prior) / (len(terms) + self.prior_words)


def _words(text: str) -> list[str]:
    return words(re.sub(r"[“”]", '"', text.lower()))
