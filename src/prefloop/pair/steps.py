"""Pairs of single steps: the first wrong step of a solution against a step of a right one, after the same steps."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import ClassVar

from prefloop.errors import ConfigError
from prefloop.protocols import RoundContext
from prefloop.rows import Completion, JudgedGroup, PreferencePair, digest_of

_Pair = tuple[int, int]
"""Places of a right and a wrong solution."""


@dataclass(frozen=True)
class Steps:
    """Step-DPO's pairs, Lai et al. 2024, arXiv 2406.18629: (x, s₁ … s_{k−1}; s_win, s_lose).

    For a solution whose first wrong step k `corrector.kind=steps` has found, and every solution of the prompt with a
    higher score whose first k − 1 steps have the same token ids:

        prefix = s₁ … s_{k−1}, in the context and not trained on
        chosen = step k of the other solution, rejected = step k of the wrong one

    Steps are slices of the sampled ids and hold no end token, which would teach to stop after one step. Equal steps
    make no pair, and equal pairs are made once. Every wrong solution of a prompt makes its first pair before any makes
    a second one. Scores and margin of a pair are those of the whole solutions.
    """

    max_pairs: int | None = 1
    """At most this many pairs for each prompt, ≥ 1. None: all. Default 1: the authors' code says 1 (and, as written,
    lets two through)."""

    needs_scores: ClassVar[bool] = True
    needs_gold: ClassVar[bool] = False
    needs_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.max_pairs is not None and self.max_pairs < 1:
            raise ConfigError(f"pair_builder.max_pairs: must be ≥ 1, or null for all, got {self.max_pairs!r}")

    def __call__(self, groups: Iterable[JudgedGroup], context: RoundContext) -> Iterator[PreferencePair]:
        """Yield the pairs of each group, in the order of `groups`; a group that no corrector has cut yields none."""
        for group in groups:
            made: dict[tuple[str, str, str], PreferencePair] = {}
            for right, wrong in _places(group):
                pair = _pair(group, right, wrong)
                prefix = "" if pair.prefix is None else pair.prefix.text
                made.setdefault((prefix, pair.chosen.text, pair.rejected.text), pair)
            yield from list(made.values())[: self.max_pairs]


def _places(group: JudgedGroup) -> Iterator[_Pair]:
    """Yield places of a right and a wrong solution, first the first right one of each wrong one."""
    wrong = [place for place, one in enumerate(group.solutions) if one.first_wrong is not None]
    found = [[(right, place) for right in _right_ones(group, place)] for place in wrong]
    for some in zip_longest(*found):
        yield from (pair for pair in some if pair is not None)


def _right_ones(group: JudgedGroup, wrong: int) -> Iterator[int]:
    """Yield places of better solutions that share the steps before the first wrong one and go on differently."""
    number = group.solutions[wrong].first_wrong
    score = group.scores[wrong]
    if number is None or score is None or number > len(group.solutions[wrong].steps):
        return
    before, step = _ids(group, wrong, number)
    for place, solution in enumerate(group.solutions):
        better = group.scores[place]
        if better is None or better <= score or solution.first_wrong is not None or len(solution.steps) < number:
            continue
        shared, other = _ids(group, place, number)
        # Different ids may spell one text, and such a pair would teach spelling.
        if shared == before and other != step and _text(group, place, number) != _text(group, wrong, number):
            yield place


def _pair(group: JudgedGroup, right: int, wrong: int) -> PreferencePair:
    number = group.solutions[wrong].first_wrong
    better, worse = group.scores[right], group.scores[wrong]
    assert number is not None  # as `_right_ones` has seen to
    assert better is not None
    assert worse is not None
    chosen, rejected = _side(group, right, number), _side(group, wrong, number)
    return PreferencePair(
        pair_id=digest_of(chosen.completion_id, rejected.completion_id),
        prompt=group.prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_score=better,
        rejected_score=worse,
        margin=better - worse,
        win_prob=None,
        weight=1.0,
        builder="steps",
        round=group.round,
        prefix=_slice(group, wrong, 0, number - 1) if number > 1 else None,
    )


def _side(group: JudgedGroup, place: int, number: int) -> Completion:
    return _slice(group, place, number - 1, number)


def _slice(group: JudgedGroup, place: int, first: int, last: int) -> Completion:
    """Return steps `first` + 1 to `last` as a completion of their own, which goes on: it holds no end token."""
    whole, steps = group.completions[place], group.solutions[place].steps
    begin = sum(step.tokens for step in steps[:first])
    end = sum(step.tokens for step in steps[:last])
    return replace(
        whole,
        completion_id=digest_of("steps", whole.completion_id, first, last),
        text="".join(step.text for step in steps[first:last]),
        token_ids=None if whole.token_ids is None else whole.token_ids[begin:end],
        sampler_logps=None if whole.sampler_logps is None else whole.sampler_logps[begin:end],
        finish_reason="length",
    )


def _ids(group: JudgedGroup, place: int, number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the token ids before step `number`, and its own."""
    before = _slice(group, place, 0, number - 1).token_ids or ()
    return before, _side(group, place, number).token_ids or ()


def _text(group: JudgedGroup, place: int, number: int) -> str:
    return group.solutions[place].steps[number - 1].text
