"""How often verifiable answers are right: accuracy, pass@k and maj@k, from the scores of a judge such as `verifier`.

A completion is right if its score reaches `threshold`. Values are means over prompts, in %, with 95 % intervals over
prompts. A completion without a score is neither right nor wrong, so a prompt that has one is refused rather than
guessed at.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from math import comb

from prefloop.errors import DataError
from prefloop.evaluate.bootstrap import RESAMPLES
from prefloop.evaluate.text_metrics import PERCENT, mean_metric
from prefloop.rows import JudgedGroup, Metric


def accuracy(
    groups: Iterable[JudgedGroup], threshold: float = 1.0, *, seed: int = 0, resamples: int = RESAMPLES
) -> Metric:
    """Return the share of right completions: pass@1.

    Raises:
        DataError: no prompts, or a completion without a score.

    """
    return pass_at_k(groups, 1, threshold, seed=seed, resamples=resamples)


def pass_at_k(
    groups: Iterable[JudgedGroup], k: int, threshold: float = 1.0, *, seed: int = 0, resamples: int = RESAMPLES
) -> Metric:
    """Return the chance that one of k completions is right, unbiased: see `pass_chance`.

    Raises:
        DataError: no prompts, fewer than k completions of one, or a completion without a score.

    """
    right = [_right(group, k, threshold, "pass@k") for group in groups]
    values = [100 * pass_chance(len(r), sum(r), k) for r in right]
    return mean_metric(f"pass@{k}, unbiased", values, "%", PERCENT, seed=seed, resamples=resamples)


def maj_at_k(
    groups: Iterable[JudgedGroup],
    k: int,
    answer: Callable[[str], str | None],
    threshold: float = 1.0,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Metric:
    """Return the chance that the most frequent answer of k completions is right, ties broken by chance.

    Majority voting of Wang et al. 2022 (self-consistency, arXiv 2203.11171). From n ≥ k completions it is the exact
    mean over all choices of k, so that it is unbiased as pass@k is: see `majority_chance`. That is ours; papers
    commonly vote once over the first k.

    Args:
        groups: judged completions.
        k: votes.
        answer: what a completion's text votes for; `None`: nothing, and if no completion votes, that is wrong.
        threshold: score from which a completion is right.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        DataError: no prompts, fewer than k completions of one, or a completion without a score.

    """
    values = []
    for group in groups:
        right = _right(group, k, threshold, "maj@k")
        votes = defaultdict(list)
        for completion, hit in zip(group.completions, right, strict=True):
            votes[answer(completion.text)].append(hit)
        blank = len(votes.pop(None, []))
        values.append(100 * majority_chance([(len(hits), sum(hits) / len(hits)) for hits in votes.values()], blank, k))
    return mean_metric(f"maj@{k}, over all choices", values, "%", PERCENT, seed=seed, resamples=resamples)


def pass_chance(n: int, right: int, k: int) -> float:
    """Return the chance that k of n completions, drawn without replacement, hold one of the `right` ones.

    1 − C(n − c, k) / C(n, k), the unbiased estimator of pass@k (Chen et al. 2021, arXiv 2107.03374, equation 1).

    Example:
        >>> pass_chance(4, 1, 2)
        0.5

    """
    return 1 - comb(n - right, k) / comb(n, k)


def majority_chance(answers: Sequence[tuple[int, float]], blank: int, k: int) -> float:
    """Return the chance that the most frequent answer among k completions, drawn without replacement, is right.

    For each answer that can be right: over its count c among the k, the ways in which no other answer has more, a tie
    of t answers counting 1 / t.

    Args:
        answers: for each different answer, how many completions give it, and the share of these that is right.
        blank: completions without an answer; they take a place among the k but no part in the vote.
        k: completions drawn.

    Example:
        >>> majority_chance([(2, 1.0), (1, 0.0)], 0, 1)
        0.6666666666666666

    """
    n = blank + sum(size for size, _ in answers)
    credit = 0.0
    for index, (size, share) in enumerate(answers):
        others = [other for i, (other, _) in enumerate(answers) if i != index]
        for count in range(1, min(size, k) + 1) if share else ():
            ways = _ways(others, blank, k - count, count)
            credit += share * comb(size, count) * sum(number / (ties + 1) for ties, number in ways.items()) / comb(n, k)
    return credit


def _ways(sizes: Sequence[int], blank: int, places: int, most: int) -> dict[int, int]:
    """Return in how many ways `places` are filled, none of `sizes` used above `most`, by how many are used just so."""
    ways = {(0, 0): 1}
    for size in sizes:
        grown: dict[tuple[int, int], int] = defaultdict(int)
        for (used, ties), number in ways.items():
            for taken in range(min(size, most, places - used) + 1):
                grown[used + taken, ties + (taken == most)] += number * comb(size, taken)
        ways = grown
    found: dict[int, int] = defaultdict(int)
    for (used, ties), number in ways.items():
        found[ties] += number * comb(blank, places - used)
    return found


def _right(group: JudgedGroup, k: int, threshold: float, name: str) -> list[bool]:
    if not 1 <= k <= len(group.completions):
        raise DataError(
            f"{name}: k is {k}, and prompt {group.prompt.prompt_id} ({group.prompt.source}) has "
            f"{len(group.completions)} completions; k must be at least 1 and at most that"
        )
    scored = [score for score in group.scores if score is not None]
    if len(scored) < len(group.completions):
        raise DataError(
            f"{name}: prompt {group.prompt.prompt_id} ({group.prompt.source}) has completions without a score; "
            "leave it out, or score them as wrong"
        )
    return [score >= threshold for score in scored]
