"""No judging: for pair rules that know which completion is better without a score, such as SPIN's."""

from collections.abc import Sequence
from dataclasses import dataclass

from prefloop.protocols import RoundContext
from prefloop.rows import SampleGroup, Verdict


@dataclass(frozen=True)
class Unscored:
    """Gives no score to any completion, and says so. Has no settings."""

    def __call__(self, groups: Sequence[SampleGroup], context: RoundContext) -> list[Verdict]:
        """Return a verdict without scores for each group."""
        return [
            Verdict(scores=(None,) * len(group.completions), notes=("not judged",) * len(group.completions))
            for group in groups
        ]
