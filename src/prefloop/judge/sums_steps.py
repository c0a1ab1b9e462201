"""Whether a beginning of a solution is right so far in the embedded sums world: the exact locator of wrong steps."""

from collections.abc import Sequence
from dataclasses import dataclass

from prefloop.judge.sums import first_wrong_step, solution_lines, steps
from prefloop.protocols import RoundContext
from prefloop.rows import SampleGroup, Verdict


@dataclass(frozen=True)
class SumsSteps:
    """1.0 while every line that is there is right, 0.0 from the first wrong one on; `None` where no sum is asked for.

    For `locator.kind`, which is asked about beginnings of solutions: see `first_wrong_step` in `judge/sums.py`. As
    `judge.kind` it finds an empty completion right; use `sums` there.
    """

    def __call__(self, groups: Sequence[SampleGroup], context: RoundContext) -> list[Verdict]:
        """Return one verdict for each group, in order."""
        return [self._verdict(group) for group in groups]

    def _verdict(self, group: SampleGroup) -> Verdict:
        count = len(group.completions)
        if solution_lines(group.prompt.text) is None:
            return Verdict((None,) * count, (f"{group.prompt.source}: the prompt asks for no sum",) * count)
        scores = tuple(float(_right_so_far(group.prompt.text, c.text)) for c in group.completions)
        return Verdict(scores, (None,) * count)


def _right_so_far(prompt_text: str, text: str) -> bool:
    wrong = first_wrong_step(prompt_text, text)
    return wrong is None or wrong > len(steps(text))
