"""Evaluation judge: sentiment by Hu and Liu's opinion lexicon, another word list than the training judge's."""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from prefloop.evaluate.heldout import words
from prefloop.protocols import RoundContext
from prefloop.rows import SampleGroup, Verdict


@dataclass(frozen=True)
class Opinion:
    """Positive minus negative words of a completion, for each 100 words, drawn to 0 if there are few words.

    Word list: Hu and Liu 2004 (KDD), CC BY 4.0. Negations are not read: "not happy" counts as positive.
    """

    path: str
    """The lexicon's zip file, with `positive-words.txt` and `negative-words.txt` in it."""
    prior_words: float = 20.0
    """So many neutral words are thought to follow, ≥ 0, so that a short text cannot win by luck."""

    @cached_property
    def polarity(self) -> dict[str, int]:
        """1 or −1 for each word of the lexicon."""
        found: dict[str, int] = {}
        with zipfile.ZipFile(self.path) as archive:
            for name, sign in (("negative", -1), ("positive", 1)):
                text = archive.read(f"opinion_lexicon/{name}-words.txt").decode("latin-1")
                found |= {w: sign for w in text.splitlines() if w and not w.startswith(";")}
        return found

    def __call__(self, groups: Sequence[SampleGroup], context: RoundContext) -> list[Verdict]:
        """Return one verdict for each group, in order; every completion has a score."""
        return [
            Verdict(tuple(self._score(c.text) for c in group.completions), (None,) * len(group.completions))
            for group in groups
        ]

    def _score(self, text: str) -> float:
        spoken = [word for word in words(text.lower()) if word[0].isalnum()]
        return 100 * sum(self.polarity.get(word, 0) for word in spoken) / (len(spoken) + self.prior_words)
