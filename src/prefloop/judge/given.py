"""The scores that came with the data: human or other ratings of the prompts' own candidates."""

from collections.abc import Sequence
from dataclasses import dataclass

from prefloop.protocols import RoundContext
from prefloop.rows import SampleGroup, Verdict


@dataclass(frozen=True)
class Given:
    """Score a completion with the rating that its prompt's data give it; `None` for one that the data do not hold.

    A pair of columns `chosen` and `rejected` has the ratings 1 and 0. Has no settings.
    """

    def __call__(self, groups: Sequence[SampleGroup], context: RoundContext) -> list[Verdict]:
        """Return one verdict for each group, in order."""
        verdicts = []
        for group in groups:
            rated = {candidate.text: candidate.score for candidate in group.prompt.candidates}
            scores = tuple(rated.get(completion.text) for completion in group.completions)
            notes = tuple("the data hold no score for it" if score is None else None for score in scores)
            verdicts.append(Verdict(scores=scores, notes=notes))
        return verdicts
