"""Metrics of a policy on held-out prompts: how good, how far from the start, and whether the text is still
sound.

Every policy completes the same held-out prompts, so comparisons are within a prompt.

- `judge_score`: mean score, over a prompt's completions, then over prompts.
- `judge_score_gain`, `judge_score_gain_best`: the candidate's mean score minus that of the start, or of the
  best policy so far, within each prompt; mean over prompts.
- `win_rate_vs_start`, `win_rate_vs_best` (0–100 %): share of comparisons with a higher score, ties half. Each of a
  prompt's completions is compared with each of the other policy's, all K × K; mean over prompts. Policies that are
  equal get 50 whether or not completions of one index share their random numbers.
- `kl_policy_start` (nats per token): KL(policy ‖ start), estimator k1: Σ (log π − log π_start) / number of
  tokens, over the tokens the policy sampled, the end token included. Log-probs are at temperature 1, so this
  estimates the KL where samples are drawn at temperature 1 without top-p; other settings weight tokens as
  drawn.
- `length` (tokens): tokens sampled, the end token included.
- `repetition` (share, 0–1): 1 − distinct / total of a completion's runs of 3 consecutive words; 0 for fewer
  than 3 words. See `text_metrics.words` for what a word is.
- `distinct_2` (share, 0–1): distinct / total of 2 consecutive words over all completions of all prompts (Li
  et al. 2016, arXiv 1510.03055). It falls with the number of completions, so compare it within a run only.
- `stopped` (0–100 %): share of completions that ended by themselves, `finish_reason` stop.

A completion that the judge gave no score is left out of score metrics and counted in `facts`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

from prefloop.errors import DataError
from prefloop.evaluate.bootstrap import (
    RESAMPLES,
    FloatArray,
    Interval,
    paired_bootstrap,
    ratio_bootstrap,
)
from prefloop.evaluate.text_metrics import PERCENT, SHARE, distinct, per_prompt, repetition, words
from prefloop.rows import Completion, JudgedGroup, Metric

__all__ = [
    "FEW_PROMPTS",
    "PERCENT",
    "SHARE",
    "Findings",
    "baseline_metrics",
    "candidate_metrics",
    "repetition",
    "words",
]

FEW_PROMPTS = 20
"""Below this many prompts an interval is too wide and its coverage too uncertain to decide much; a warning says so."""

_NAMED = 5  # prompt ids that an error lists before it only counts
_MANY_UNSCORED = 0.1


@dataclass(frozen=True, slots=True)
class Findings:
    """Metrics by name; `facts` counts prompts, completions and what was left out; `warnings` are sentences."""

    metrics: dict[str, Metric]
    facts: dict[str, int]
    warnings: tuple[str, ...]


def baseline_metrics(groups: Sequence[JudgedGroup], *, seed: int = 0, resamples: int = RESAMPLES) -> Findings:
    """Return the metrics of the start policy: those that compare with nothing.

    Win rates (50 %), gains (0) and KL (0) of the start against itself hold by definition and are not in the
    result.

    Args:
        groups: the start policy's judged completions of the held-out prompts.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises: DataError: no prompts, a prompt twice, a score that is NaN or infinite, or not one score for each
        completion.

    """
    candidate = _by_prompt(groups, "the policy")
    bench = _Bench(seed, resamples)
    _own(bench, candidate)
    return _findings(bench, candidate, {"unscored": _unscored(candidate)})


def candidate_metrics(
    groups: Sequence[JudgedGroup],
    start: Sequence[JudgedGroup],
    best: Sequence[JudgedGroup],
    start_logps: Mapping[str, Sequence[float] | None],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Findings:
    """Return all metrics of a round's policy; see the module's docstring for what each means.

    A metric that cannot be measured (no scores, no log-probs) is absent and a warning says why.

    Args: groups: the candidate's judged completions of the held-out prompts. start: the start policy's, for
        the same prompts. best: those of the best policy so far, for the same prompts; the start's while
        nothing was accepted. start_logps: by `completion_id` of the candidate's completions, the start
        policy's log-prob of each sampled
            token in nats, at temperature 1; `None` or absent where it is not known.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises: DataError: prompts of the three do not match, or were scored by different judges; a prompt twice
        or none; a
            score or log-prob that is NaN or infinite; not one score or log-prob for each completion or token.

    """
    candidate = _by_prompt(groups, "the policy")
    bench = _Bench(seed, resamples)
    facts = {"unscored": _unscored(candidate)}
    _own(bench, candidate)
    for name, suffix, other in (
        ("start", "", _by_prompt(start, "the start")),
        ("best", "_best", _by_prompt(best, "the best so far")),
    ):
        whom = "the start" if name == "start" else "the best so far"
        _check_paired(candidate, other, whom)
        facts[f"unscored_{name}"] = _unscored(other)
        gains, wins = _over(candidate, other, _gain), _over(candidate, other, _wins)
        bench.mean(f"judge_score_gain{suffix}", gains, "score", f"difference to {whom}, mean over prompts")
        bench.mean(f"win_rate_vs_{name}", wins, "%", "all K × K pairs of a prompt, ties half", PERCENT)
        bench.warnings += _unlike(candidate, other, whom)
    facts["without_logps"] = _kl(bench, candidate, start_logps)
    return _findings(bench, candidate, facts)


def differences(name: str, groups: Sequence[JudgedGroup], rival: Sequence[JudgedGroup]) -> list[float]:
    """Return what a win rate or a gain is the mean of: a value for each prompt that both sides have a score of.

    Args:
        name: of the metric, `win_rate_…` (0–100) or `judge_score_gain…` (score).
        groups: the candidate's judged completions.
        rival: those that the metric compares with.

    Raises:
        DataError: as `candidate_metrics`.

    """
    candidate, other = _by_prompt(groups, "the policy"), _by_prompt(rival, "the rival")
    _check_paired(candidate, other, "the rival")
    return _over(candidate, other, _wins if name.startswith("win_rate") else _gain)


def by_origin(
    groups: Sequence[JudgedGroup], start: Sequence[JudgedGroup], *, seed: int = 0
) -> dict[str, dict[str, Metric]]:
    """Return score and win rate against the start on the prompts of each data set that the rows come from.

    Empty where the prompts name fewer than two (`Prompt.origin`). What a policy forgets of one domain while it learns
    another shows here from round to round.
    """
    found: dict[str, dict[str, Metric]] = {}
    for origin in sorted({group.prompt.origin for group in groups if group.prompt.origin is not None}):
        of_origin = [[g for g in some if g.prompt.origin == origin] for some in (groups, start)]
        metrics = candidate_metrics(of_origin[0], of_origin[1], of_origin[1], {}, seed=seed).metrics
        found[origin] = {str(k): metrics[k] for k in ("judge_score", "win_rate_vs_start") if k in metrics}
    return found if len(found) > 1 else {}


class _Bench:
    """Collects metrics and warnings: what a metric has no values for becomes a warning."""

    def __init__(self, seed: int, resamples: int) -> None:
        self.seed = seed
        self.resamples = resamples
        self.metrics: dict[str, Metric] = {}
        self.warnings: list[str] = []

    def add(self, name: str, interval: Interval, unit: str, estimator: str) -> None:
        self.metrics[name] = Metric(interval.value, interval.low, interval.high, interval.n, unit, estimator)

    def mean(
        self,
        name: str,
        values: Sequence[float],
        unit: str,
        estimator: str,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        if values:
            interval = paired_bootstrap(values, seed=self.seed, resamples=self.resamples, bounds=bounds)
            self.add(name, interval, unit, estimator)
        else:
            self.warnings.append(f"{name} was not measured: no held-out prompt has what it needs")


def _by_prompt(groups: Sequence[JudgedGroup], whose: str) -> dict[str, JudgedGroup]:
    """Return checked groups by prompt id, sorted, so that the bootstrap does not depend on the order given."""
    if not groups:
        raise DataError(f"heldout: {whose} has no held-out prompts; raise prompts.holdout or give more prompts")
    found: dict[str, JudgedGroup] = {}
    for group in sorted(groups, key=lambda g: g.prompt.prompt_id):
        prompt_id = group.prompt.prompt_id
        if prompt_id in found:
            raise DataError(f"heldout: prompt {prompt_id} stands twice in the groups of {whose}")
        if len(group.scores) != len(group.completions) or not group.completions:
            raise DataError(
                f"heldout: prompt {prompt_id} of {whose} has {len(group.completions)} completions and "
                f"{len(group.scores)} scores; there must be "
                "one score, or none, for each of at least one completion"
            )
        for index, score in enumerate(group.scores):
            if score is not None and not isfinite(score):
                raise DataError(
                    f"heldout: completion {index} of prompt {prompt_id} of {whose} has score {score}; "
                    "a judge must return a finite number, or None with a note"
                )
        found[prompt_id] = group
    return found


def _check_paired(candidate: Mapping[str, JudgedGroup], other: Mapping[str, JudgedGroup], name: str) -> None:
    for where, ids in (
        (f"the policy but not {name}", candidate.keys() - other.keys()),
        (f"{name} but not the policy", other.keys() - candidate.keys()),
    ):
        if ids:
            listed = ", ".join(sorted(ids)[:_NAMED]) + (", …" if len(ids) > _NAMED else "")
            raise DataError(
                f"heldout: {len(ids)} held-out prompts have completions of {where} ({listed}); "
                "both must be evaluated on the same prompts"
            )
    judges = sorted({g.judge for g in candidate.values()} | {g.judge for g in other.values()})
    if len(judges) > 1:
        raise DataError(
            f"heldout: the policy and {name} were scored by different judges ({', '.join(judges)}); "
            "their scores cannot be compared"
        )


def _unlike(candidate: Mapping[str, JudgedGroup], other: Mapping[str, JudgedGroup], name: str) -> list[str]:
    ours, theirs = _sampling(candidate), _sampling(other)
    return (
        []
        if ours == theirs
        else [f"the policy was sampled at {ours}, {name} at {theirs}: they differ in more than the policy"]
    )


def _sampling(groups: Mapping[str, JudgedGroup]) -> str:
    """Return how completions were drawn, in words."""
    return " and ".join(
        sorted(
            {
                f"temperature {g.temperature:g}" + (f", top-p {g.top_p:g}" if g.top_p < 1 else "")
                for g in groups.values()
            }
        )
    )


def _own(bench: _Bench, groups: Mapping[str, JudgedGroup]) -> None:
    """Measure what needs no other policy."""
    scored = [_scores(g) for g in groups.values()]
    bench.mean("judge_score", [_average(s) for s in scored if s], "score", "mean over prompts")
    bench.mean("length", per_prompt(groups.values(), _length), "tokens", "mean over prompts, end token included")
    bench.mean(
        "repetition",
        per_prompt(groups.values(), lambda c: repetition(c.text)),
        "share",
        "repeated 3-grams of words, mean over prompts",
        SHARE,
    )
    bench.mean(
        "stopped",
        per_prompt(groups.values(), lambda c: 100.0 * (c.finish_reason == "stop")),
        "%",
        "mean over prompts",
        PERCENT,
    )
    _distinct(bench, groups)


def _distinct(bench: _Bench, groups: Mapping[str, JudgedGroup]) -> None:
    try:
        bench.metrics["distinct_2"] = distinct(list(groups.values()), 2)
    except DataError:
        bench.warnings.append("distinct_2 was not measured: fewer than two prompts have a completion of two words")


def _kl(bench: _Bench, groups: Mapping[str, JudgedGroup], start_logps: Mapping[str, Sequence[float] | None]) -> int:
    """Measure `kl_policy_start` and return how many completions lack log-probs."""
    sums, tokens, missing = [], [], 0
    for group in groups.values():
        ratios: list[float] = []
        for completion in group.completions:
            start = start_logps.get(completion.completion_id)
            if completion.sampler_logps is None or start is None:
                missing += 1
            else:
                ratios += _log_ratios(completion, start)
        if ratios:
            sums.append(float(np.sum(ratios)))
            tokens.append(float(len(ratios)))
    if tokens:
        interval = ratio_bootstrap(sums, tokens, seed=bench.seed, resamples=bench.resamples)
        bench.add("kl_policy_start", interval, "nats per token", f"k1, samples at {_sampling(groups)}")
    else:
        bench.warnings.append("kl_policy_start was not measured: no completion has log-probs of both policies")
    return missing


def _log_ratios(completion: Completion, start: Sequence[float]) -> list[float]:
    ours = completion.sampler_logps or ()
    if len(ours) != len(start):
        raise DataError(
            f"heldout: completion {completion.completion_id} has {len(ours)} sampler log-probs and {len(start)} of "
            "the start policy; there must be one for each token"
        )
    ratios = [a - b for a, b in zip(ours, start, strict=True)]
    if not all(isfinite(r) for r in ratios):
        raise DataError(
            f"heldout: completion {completion.completion_id} has a log-prob that is NaN or infinite; was it "
            "scored with top-p or top-k applied?"
        )
    return ratios


def _findings(bench: _Bench, candidate: Mapping[str, JudgedGroup], facts: Mapping[str, int]) -> Findings:
    counts = {
        "prompts": len(candidate),
        "completions": sum(len(g.completions) for g in candidate.values()),
        "without_token_ids": sum(c.token_ids is None for g in candidate.values() for c in g.completions),
        **facts,
    }
    if counts["prompts"] < FEW_PROMPTS:
        bench.warnings.append(
            f"only {counts['prompts']} held-out prompts: intervals below {FEW_PROMPTS} prompts are wide and unreliable"
        )
    if counts["unscored"] > _MANY_UNSCORED * counts["completions"]:
        bench.warnings.append(
            f"the judge gave no score to {counts['unscored']} of {counts['completions']} held-out "
            "completions; their notes say why"
        )
    return Findings(bench.metrics, counts, tuple(bench.warnings))


def _over(
    candidate: Mapping[str, JudgedGroup],
    other: Mapping[str, JudgedGroup],
    compare: Callable[[FloatArray, FloatArray], float],
) -> list[float]:
    """Return `compare` of the scores of each prompt where both sides have one at least."""
    sides = ((_scores(candidate[name]), _scores(other[name])) for name in candidate)
    return [compare(np.array(ours), np.array(theirs)) for ours, theirs in sides if ours and theirs]


def _gain(ours: FloatArray, theirs: FloatArray) -> float:
    return float(ours.mean() - theirs.mean())


def _wins(ours: FloatArray, theirs: FloatArray) -> float:
    difference = ours[:, None] - theirs[None, :]
    return float(100 * ((difference > 0) + 0.5 * (difference == 0)).mean())


def _scores(group: JudgedGroup) -> list[float]:
    return [s for s in group.scores if s is not None]


def _unscored(groups: Mapping[str, JudgedGroup]) -> int:
    return sum(score is None for g in groups.values() for score in g.scores)


def _length(completion: Completion) -> float | None:
    return None if completion.token_ids is None else float(len(completion.token_ids))


def _average(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
