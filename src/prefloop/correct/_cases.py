"""Wrong solutions on their way to a pair: what is known of each, and what is drawn for it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from prefloop.rows import Completion, JudgedGroup, Solution, digest_of


@dataclass(frozen=True)
class Judged:
    """A completion in steps, with its score."""

    completion: Completion
    solution: Solution
    score: float | None

    def ids(self, depth: int) -> tuple[int, ...]:
        """Return the token ids of the first `depth` steps."""
        return (self.completion.token_ids or ())[: self._tokens(depth)]

    def beginning(self, depth: int) -> Completion:
        """Return the first `depth` steps as a completion: a slice of the sampled ids, without an end token."""
        whole, count = self.completion, self._tokens(depth)
        return replace(
            whole,
            completion_id=digest_of("beginning", whole.completion_id, depth),
            text="".join(step.text for step in self.solution.steps[:depth]),
            token_ids=None if whole.token_ids is None else whole.token_ids[:count],
            sampler_logps=None if whole.sampler_logps is None else whole.sampler_logps[:count],
            finish_reason="length",
        )

    def _tokens(self, depth: int) -> int:
        return sum(step.tokens for step in self.solution.steps[:depth])


@dataclass
class Case:
    """The wrong solution at `place` of a group, whose completions in steps are `solved`.

    `first_wrong` is the number of its first wrong step, once it is known. `siblings` are places of right completions of
    the group that share its right steps; `added` are solutions that were drawn for it. `spare` are right ones that were
    drawn from its beginnings, by number of steps, before it was known which beginning is the last right one.
    """

    group: JudgedGroup
    solved: list[Judged]
    place: int
    first_wrong: int | None = None
    siblings: list[int] = field(default_factory=list)
    added: list[Judged] = field(default_factory=list)
    spare: dict[int, list[Judged]] = field(default_factory=dict)

    @property
    def wrong(self) -> Judged:
        """The wrong solution."""
        return self.solved[self.place]

    @property
    def shared(self) -> int:
        """How many steps stand before the first wrong one."""
        assert self.first_wrong is not None
        return self.first_wrong - 1

    @property
    def served(self) -> bool:
        """Whether a right solution shares its right steps."""
        return bool(self.siblings or self.added)

    def fits(self, other: Judged) -> bool:
        """Whether `other` shares the steps before the first wrong one, token by token, and has another one there."""
        steps, shared = other.solution.steps, self.shared
        if len(steps) <= shared or other.ids(shared) != self.wrong.ids(shared):
            return False
        return steps[shared].text != self.wrong.solution.steps[shared].text

    def add(self, other: Judged) -> None:
        """Add a right solution that fits, unless one with the same next step is there."""
        step = other.solution.steps[self.shared].text
        if all(one.solution.steps[self.shared].text != step for one in self.added):
            self.added.append(other)


def extended(group: JudgedGroup, solved: Sequence[Judged], cases: Sequence[Case]) -> JudgedGroup:
    """Return the group with steps, first wrong steps and added solutions. Comparisons do not cover what is added."""
    first_wrong = {case.place: case.first_wrong for case in cases}
    solutions = [
        replace(one.solution, first_wrong=first_wrong.get(place, one.solution.first_wrong))
        for place, one in enumerate(solved)
    ]
    added = list({one.completion.completion_id: one for case in cases for one in case.added}.values())
    return replace(
        group,
        completions=(*group.completions, *(one.completion for one in added)),
        scores=(*group.scores, *(one.score for one in added)),
        notes=(*group.notes, *(None for _ in added)),
        solutions=(*solutions, *(one.solution for one in added)),
        win_prob=None if added else group.win_prob,
    )
