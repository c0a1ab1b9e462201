"""Which step of a wrong solution is the first wrong one: by a judge of beginnings, or by going on from them."""

from collections.abc import Callable, Sequence

from prefloop.correct._cases import Case, Judged

Score = Callable[[Sequence[tuple[Case, Judged, int]]], list[float | None]]
"""Scores the first so many steps of a solution."""
Draw = Callable[[Sequence[tuple[Case, int]]], list[list[Judged]]]
"""Draws solutions that go on from the first so many steps of a case, judged."""


def by_judge(cases: Sequence[Case], score: Score, right_above: float) -> None:
    """Note the first step after which a judge does not find a solution's beginning right.

    One question for each step up to the first wrong one. Where there is no verdict, or all steps are right, none is
    noted.
    """
    depth, waiting = 1, list(cases)
    while waiting:
        scores = score([(case, case.wrong, depth) for case in waiting])
        right = []
        for case, value in zip(waiting, scores, strict=True):
            if value is not None and value > right_above:
                right.append(case)
            elif value is not None:
                case.first_wrong = depth
        depth += 1
        waiting = [case for case in right if depth <= len(case.wrong.solution.steps)]


def by_continuation(cases: Sequence[Case], draw: Draw, is_right: Callable[[float | None], bool]) -> None:
    """Note the first step after which no solution that goes on from there is right; keep the right ones as spare.

    A beginning from which a right solution was drawn is right as far as the judge can tell. One from which none was
    drawn may be so by chance: with n draws and a share p of right ones, with probability (1 − p)ⁿ.
    """
    depth, waiting = 1, list(cases)
    while waiting:
        drawn = draw([(case, depth) for case in waiting])
        for case, solutions in zip(waiting, drawn, strict=True):
            right = [one for one in solutions if is_right(one.score)]
            if right:
                case.spare[depth] = right
            else:
                case.first_wrong = depth
        depth += 1
        waiting = [c for c in waiting if c.first_wrong is None and depth <= len(c.wrong.solution.steps)]
