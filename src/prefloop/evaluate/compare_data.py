"""What a comparison reads of its runs, and the checks that say whether they can be compared and what it costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, sqrt
from typing import Any

from prefloop.errors import DataError
from prefloop.evaluate.comparison import START, Scores
from prefloop.evaluate.heldout import FEW_PROMPTS

RawScores = Mapping[str, Sequence[float | None]]
"""By prompt id, a score for each completion; `None` where the judge gave none."""

_SETTING = 80  # characters of a judge's setting that a message shows
_CLOSE = 0.1  # budgets that differ by less count as equal


@dataclass(frozen=True)
class Ended:
    """A finished run: scores of the policy in force at its end and of the start, metrics, curve by round, and cost."""

    scores: RawScores
    start: RawScores
    judge: str
    sampling: str
    start_digest: str
    metrics: Mapping[str, Any]
    curve: tuple[Mapping[str, Any], ...]
    accepted: int
    rounds: int
    samples: int
    pairs: int
    updates: int
    tokens_sampled: int
    tokens_trained: int
    tokens_evaluated: int
    seconds: float
    judge_settings: Mapping[str, Any] = field(default_factory=dict)
    """What makes this judge differ from another of its kind: all settings that its verdicts depend on."""


@dataclass(frozen=True)
class Measured:
    """A run of one seed; without `ended` it failed, and `failed` says why."""

    seed: int
    folder: str
    ended: Ended | None = None
    failed: str = ""


@dataclass(frozen=True)
class Method:
    """A method, or one setting of it in a sweep: its runs by seed."""

    name: str
    target: str
    runs: tuple[Measured, ...]
    varied: Mapping[str, Any] = field(default_factory=dict)

    def finished(self) -> list[Ended]:
        """Return the runs that came to an end."""
        return [run.ended for run in self.runs if run.ended is not None]


@dataclass(frozen=True)
class Elsewhere:
    """The same methods on prompts of another distribution, whose source is `name`."""

    name: str
    methods: Sequence[Method]


def common_scores(methods: Sequence[Method]) -> tuple[dict[str, list[Scores]], list[str]]:
    """Return the scores of every method and of the start on the prompts that all have, and warnings in words.

    Raises:
        DataError: different judges, fewer than two common prompts, a score that is NaN or infinite, or fewer than two
            methods with a finished run.

    """
    alive = [m for m in methods if m.finished()]
    if not alive:
        raise DataError("compare: every run diverged; lower train.learning_rate")
    runs = [run for m in alive for run in m.finished()]
    judges = sorted({run.judge for run in runs})
    if len(judges) > 1:
        raise DataError(
            f"compare: the runs were judged by different judges ({', '.join(judges)}); their scores have no common "
            "scale, so no interval would mean anything. Run them again with one eval_judge"
        )
    _refuse_other_settings(judges[0], [run.judge_settings for run in runs])
    _refuse_bad_scores(alive)
    everyone = [table for run in runs for table in (run.scores, run.start)]
    shared = set(everyone[0]).intersection(*everyone[1:])
    scored = sorted(p for p in shared if all(any(s is not None for s in table[p]) for table in everyone))
    largest = max(len(table) for table in everyone)
    warnings = _prompt_warnings(largest, len(shared), len(scored)) + _alike(alive, runs)
    arms: dict[str, list[Scores]] = {m.name: [_kept(run.scores, scored) for run in m.finished()] for m in alive}
    # The start of each seed is the same policy drawn with another seed's random numbers.
    starts = {m_run.seed: m_run.ended.start for m in alive for m_run in m.runs if m_run.ended is not None}
    arms[START] = [_kept(table, scored) for table in starts.values()]
    return arms, warnings


def _refuse_other_settings(judge: str, settings: Sequence[Mapping[str, Any]]) -> None:
    names = sorted({name for one in settings for name in one})
    differ = {name: list(dict.fromkeys(str(one.get(name)) for one in settings)) for name in names}
    differ = {name: values for name, values in differ.items() if len(values) > 1}
    if differ:
        listed = "; ".join(f"{name}: {' and '.join(v[:_SETTING] for v in values)}" for name, values in differ.items())
        raise DataError(
            f"compare: all runs were judged by {judge}, but with different settings ({listed}): different judges, "
            "whose scores have no common scale, so no interval would mean anything. Run them again with one eval_judge"
        )


def _refuse_bad_scores(methods: Sequence[Method]) -> None:
    for method in methods:
        for run in method.finished():
            for prompt, scores in run.scores.items():
                if any(s is not None and not isfinite(s) for s in scores):
                    raise DataError(
                        f"compare: {method.name}: prompt {prompt} has a score that is NaN or infinite; one such value "
                        "makes every mean and interval NaN. Judge the run again"
                    )


def _prompt_warnings(largest: int, shared: int, scored: int) -> list[str]:
    if scored < 2:
        raise DataError(
            f"compare: the runs have {scored} held-out prompts in common; unpaired prompts cannot be compared, since "
            "their difficulty would hide the methods'. Run them with the same prompts and prompts.holdout"
        )
    warnings = []
    if shared < largest:
        wider = sqrt(largest / shared)
        warnings.append(
            f"The runs have different holdouts: only the {shared} prompts that all of them have are compared, so "
            f"intervals over prompts are about {wider:.1f} times as wide as with all {largest}."
        )
    if scored < shared:
        warnings.append(f"{shared - scored} prompts without a score in some run are left out of all.")
    if scored < FEW_PROMPTS:
        warnings.append(
            f"Only {scored} held-out prompts: below {FEW_PROMPTS} intervals are wide and may miss the truth more often "
            "than they say."
        )
    return warnings


def _alike(methods: Sequence[Method], runs: Sequence[Ended]) -> list[str]:
    """Return warnings where runs differ in more than the method."""
    warnings = []
    if len({run.start_digest for run in runs}) > 1:
        warnings.append(
            "The runs began with different policies: win rates over the start and KL are each over its own start, and "
            "differences between methods are also those between the starts."
        )
    if len({run.sampling for run in runs}) > 1:
        ways = "; ".join(f"{m.name} at {m.finished()[0].sampling}" for m in methods)
        warnings.append(f"Held-out completions were drawn differently ({ways}): that alone changes scores.")
    single = [m.name for m in methods if len(m.finished()) == 1]
    if single:
        warnings.append(
            f"{_few(single)} {'has' if len(single) == 1 else 'have'} one seed: intervals cover the choice of prompts "
            "only, not what another seed would give, and are too narrow for a claim about the method."
        )
    for method in methods:
        lost = len(method.runs) - len(method.finished())
        if lost:
            warnings.append(
                f"{method.name}: {lost} of {len(method.runs)} runs diverged and {'is' if lost == 1 else 'are'} left "
                "out, which flatters it."
            )
    return warnings + _budgets(methods)


def _budgets(methods: Sequence[Method]) -> list[str]:
    warnings = []
    for what, value in (("samples", lambda r: r.samples), ("updates", lambda r: r.updates)):
        spent = {m.name: sum(value(r) for r in m.finished()) / len(m.finished()) for m in methods}
        low, high = min(spent, key=lambda n: spent[n]), max(spent, key=lambda n: spent[n])
        if spent[high] > (1 + _CLOSE) * spent[low]:
            warnings.append(
                f"Budgets differ in {what}: from {spent[low]:,.0f} ({low}) to {spent[high]:,.0f} ({high}) a run. A "
                "difference between these methods may be the budget's."
            )
    return warnings


def _kept(table: RawScores, prompts: Sequence[str]) -> Scores:
    return {p: [s for s in table[p] if s is not None] for p in prompts}


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 5 else f"{', '.join(names[:3])} and {len(names) - 3} more"
