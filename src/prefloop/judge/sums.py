"""Right or wrong in the embedded sums world, by recomputation; also which step of a worked solution is the first wrong.

A question is `Q: 27+8-5=?`. A worked solution goes from left to right, one operation a line, and ends with the
answer:

    Step 1: 27+8=35
    Step 2: 35-5=30
    Answer: 30
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from prefloop.protocols import RoundContext
from prefloop.rows import SampleGroup, Verdict

_QUESTION = re.compile(r"Q: ([0-9]{1,9}(?:[+-][0-9]{1,9})+)=\?")


@dataclass(frozen=True)
class Sums:
    """1.0 for a completion whose final answer is right, 0.0 for any other; `None` where the prompt asks for no sum.

    The final answer is the completion's last line, `Answer: N`, and its only such line, so that several guesses count
    as wrong. Steps are not read, unless `partial`. The prompt's gold answer is not read: the sum is computed.
    """

    partial: bool = False
    """False (default): the final answer alone decides. True: the share of the solution's lines, the answer's line
    among them, that stand before the first wrong one, in [0, 1]; it is 1 only for a solution right in every line."""

    def __call__(self, groups: Sequence[SampleGroup], context: RoundContext) -> list[Verdict]:
        """Return one verdict for each group, in order."""
        return [self._verdict(group) for group in groups]

    def _verdict(self, group: SampleGroup) -> Verdict:
        count = len(group.completions)
        lines = solution_lines(group.prompt.text)
        if lines is None:
            return Verdict((None,) * count, (f"{group.prompt.source}: the prompt asks for no sum",) * count)
        score = _share_right if self.partial else _answer_right
        return Verdict(tuple(score(completion.text, lines) for completion in group.completions), (None,) * count)


def first_wrong_step(prompt_text: str, completion_text: str) -> int | None:
    """Return the number, from 1, of the first line that is not that of the right solution; `None` if all are right.

    Lines are counted as `steps` gives them: line k of a solution with n operations is `Step k` for k ≤ n, and the
    answer for k = n + 1. A completion that ends too early is wrong at the line that is missing, one that goes on after
    the answer at the line n + 2. Since all lines before the first wrong one are right, recomputing the sum from left to
    right says of each line whether it is right; spaces at its ends and repeated ones do not count.

    Raises:
        ValueError: the prompt asks for no sum.

    """
    lines = solution_lines(prompt_text)
    if lines is None:
        raise ValueError(f"not a question of the sums world: {prompt_text[-80:]!r}; its form is 'Q: 27+8-5=?'")
    right = _count_right(completion_text, lines)
    return None if right == len(lines) == len(steps(completion_text)) else right + 1


def steps(completion_text: str) -> list[str]:
    """Split a completion into its lines, each with its line end, so that joined they are the completion again.

    Blank lines belong to the line before them.
    """
    return re.findall(r"[^\n]*\n*", completion_text)[:-1] if completion_text else []


def solution(prompt_text: str) -> str | None:
    """Return the right solution, without a line end after the answer; `None` if the prompt asks for no sum."""
    lines = solution_lines(prompt_text)
    return None if lines is None else "\n".join(lines)


def solution_lines(prompt_text: str) -> list[str] | None:
    """Return the lines of the right solution of the prompt's last question; `None` if the prompt asks for no sum."""
    found = _QUESTION.findall(prompt_text)
    if not found:
        return None
    first, *rest = re.split("([+-])", found[-1])
    value, lines = int(first), []
    for number, (sign, term) in enumerate(zip(rest[::2], rest[1::2], strict=True), 1):
        after = value + int(term) if sign == "+" else value - int(term)
        lines.append(f"Step {number}: {value}{sign}{int(term)}={after}")
        value = after
    return [*lines, f"Answer: {value}"]


def _count_right(text: str, lines: Sequence[str]) -> int:
    """Return how many lines of `text` are right before the first that is wrong or missing."""
    right = 0
    for given, wanted in zip(steps(text), lines, strict=False):
        if _normal(given) != wanted:
            break
        right += 1
    return right


def _share_right(text: str, lines: Sequence[str]) -> float:
    right = _count_right(text, lines)
    beyond = len(steps(text)) - len(lines)
    return (right - (right == len(lines) and beyond > 0)) / len(lines)


def _answer_right(text: str, lines: Sequence[str]) -> float:
    given = [_normal(line) for line in steps(text)]
    answers = sum(line.startswith("Answer") for line in given)
    return float(bool(given) and given[-1] == lines[-1] and answers == 1)


def _normal(line: str) -> str:
    return " ".join(line.split())
