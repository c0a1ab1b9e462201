"""Wrong solutions corrected from their first wrong step on: what Step-DPO learns from (arXiv 2406.18629)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from prefloop.correct import _locating
from prefloop.correct._cases import Case, Judged, extended
from prefloop.correct._splitting import separator
from prefloop.correct._work import Work
from prefloop.errors import ConfigError
from prefloop.protocols import CorrectionTools, RoundContext
from prefloop.rows import JudgedGroup


@dataclass(frozen=True)
class Steps:
    """Cut solutions into steps, find the first wrong one of wrong solutions, and go on from before it until right.

    Source: Step-DPO, Lai et al. 2024, arXiv 2406.18629. For each wrong solution s₁ … sₙ:

        k = the first wrong step:  the recipe's locator, a judge, is asked about s₁ … s_j for j = 1, 2, …;
            without a locator, k is the first j such that none of `continuations` solutions that go on from s₁ … s_j
            is right
        draw y ~ π(· | x, s₁ … s_{k−1}) until y is right, at most `tries` times

    Right solutions are added to the group, with the first k − 1 steps' own token ids; `pair_builder.kind=steps` makes
    pairs of them. A right sample that begins with the same steps is as good as one that is drawn for it, and then
    none is.

    Departs from the source: a locator is asked about one step at a time instead of all in one reply, so that a
    verdict is one grade and cannot miscount; solutions are split by `split`, not always at the words "Step k:"; drawing
    stops at the first right solution (`tries_at_once` at a time), where the paper draws 20. Locating without a judge is
    not in the paper; it is how process labels are made elsewhere (recalled: Math-Shepherd, arXiv 2312.08935).

    Raises:
        ConfigError: a field is out of range, or `split` is no regular expression.

    """

    split: str = "lines"
    """What ends a step: lines, sentences, labels (a new line with `Step 3:`, the paper's), or a regular expression of
    what stands between steps."""
    right_above: float = 0.5
    """A solution is right if the judge scores it above this, and wrong if not."""
    step_right_above: float = 0.5
    """The same for the locator's scores of beginnings."""
    per_prompt: int | None = 1
    """Wrong solutions of each prompt to work on, the first ones, ≥ 1. None: all. Default 1 (the paper: 2 samples of
    each problem)."""
    continuations: int = 8
    """Without a locator: solutions that go on from each beginning, ≥ 1. Default 8, ours; fewer call right steps wrong
    more often."""
    tries: int = 20
    """At most this many draws for each wrong solution, ≥ 1; the paper's."""
    tries_at_once: int = 4
    """Draws between two looks whether one is right, ≥ 1; ours."""
    check: bool = False
    """Ask the locator about the corrected step too, and leave out what it does not find right: the paper's optional
    check against right answers by wrong steps."""

    def __post_init__(self) -> None:
        rules: list[tuple[str, bool, str]] = [
            ("right_above", math.isfinite(self.right_above), "a finite number"),
            ("step_right_above", math.isfinite(self.step_right_above), "a finite number"),
            ("per_prompt", self.per_prompt is None or self.per_prompt >= 1, "≥ 1, or null for all"),
            ("continuations", self.continuations >= 1, "≥ 1"),
            ("tries", self.tries >= 1, "≥ 1"),
            ("tries_at_once", self.tries_at_once >= 1, "≥ 1"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise ConfigError(f"corrector.{name}: must be {rule}, got {getattr(self, name)!r}")
        separator(self.split)

    def __call__(
        self, groups: Sequence[JudgedGroup], tools: CorrectionTools, context: RoundContext
    ) -> list[JudgedGroup]:
        """Return the groups, in order, with every completion's steps and with the right solutions that were drawn.

        Raises:
            ConfigError: `check` without a locator.
            DataError, JudgeError, SamplerError: a tool failed for good.

        """
        if self.check and tools.locator is None:
            raise ConfigError("corrector.check: asks the locator, and there is none; set locator.kind, or leave it out")
        work = Work(separator(self.split), tools, context)
        solved = [
            [work.in_steps(group.prompt, *one) for one in zip(group.completions, group.scores, strict=True)]
            for group in groups
        ]
        cases = [self._cases(group, mine) for group, mine in zip(groups, solved, strict=True)]
        everyone = [case for some in cases for case in some]
        self._locate(everyone, work)
        located = [case for case in everyone if case.first_wrong is not None]
        self._find_siblings(located, work)
        self._draw_rest(located, work)
        return [extended(*one) for one in zip(groups, solved, cases, strict=True)]

    def _is_right(self, score: float | None) -> bool:
        return score is not None and score > self.right_above

    def _cases(self, group: JudgedGroup, solved: list[Judged]) -> list[Case]:
        """Return the first wrong solutions, equal ones once; one without a verdict is neither right nor wrong."""
        wrong: dict[object, Case] = {}
        for place, one in enumerate(solved):
            if one.solution.steps and one.score is not None and not self._is_right(one.score):
                wrong.setdefault(one.completion.token_ids, Case(group, solved, place))
        return list(wrong.values())[: self.per_prompt]

    def _locate(self, cases: Sequence[Case], work: Work) -> None:
        if work.tools.locator is not None:
            _locating.by_judge(cases, work.score, self.step_right_above)
        else:
            numbers = range(self.continuations)
            _locating.by_continuation(cases, lambda asked: work.draw("locate", asked, numbers), self._is_right)

    def _find_siblings(self, cases: Sequence[Case], work: Work) -> None:
        found = [
            (case, other, place)
            for case in cases
            for place, other in enumerate(case.solved)
            if self._is_right(other.score) and case.fits(other)
        ]
        sound = self._sound([(case, other) for case, other, _ in found], work)
        for (case, other, place), good in zip(found, sound, strict=True):
            if good:
                case.siblings.append(place)
            else:  # the pair rule must not choose it
                unsound = replace(other.solution, first_wrong=case.first_wrong)
                case.solved[place] = replace(other, solution=unsound)

    def _draw_rest(self, cases: Sequence[Case], work: Work) -> None:
        waiting = [case for case in cases if not case.served]
        self._take(waiting, [case.spare.get(case.shared, []) for case in waiting], work)
        for begin in range(0, self.tries, self.tries_at_once):
            waiting = [case for case in cases if not case.served]
            numbers = range(begin, min(begin + self.tries_at_once, self.tries))
            self._take(waiting, work.draw("correct", [(case, case.shared) for case in waiting], numbers), work)

    def _take(self, cases: Sequence[Case], drawn: Sequence[Sequence[Judged]], work: Work) -> None:
        found = [
            (case, one)
            for case, some in zip(cases, drawn, strict=True)
            for one in some
            if self._is_right(one.score) and case.fits(one)
        ]
        for (case, one), good in zip(found, self._sound(found, work), strict=True):
            if good:
                case.add(one)

    def _sound(self, found: Sequence[tuple[Case, Judged]], work: Work) -> list[bool]:
        """Whether the locator finds each solution right up to its corrected step; with `check` off all are."""
        if not self.check:
            return [True] * len(found)
        scores = work.score([(case, one, case.shared + 1) for case, one in found])
        return [score is not None and score > self.step_right_above for score in scores]
