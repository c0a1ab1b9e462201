"""How good a reward model is on held-out pairs: the share that it orders as the data do, and what its choice is worth.

- `accuracy` (0–100 %): share of pairs with r(chosen) > r(rejected), ties half; mean over prompts. Chance is 50.
- `accuracy_length` (0–100 %): the same for the rule "the longer wins", or "the shorter wins" where that was right more
  often on the *training* pairs. Length in characters. What a reward model that saw nothing but length would reach.
- `accuracy_over_length` (points): the difference of both, prompt by prompt.
- `reward_margin` (score): r(chosen) − r(rejected); mean over prompts. Its size depends on training alone.
- `best_of_n_gain` (score): on the policy's own completions of held-out prompts, the judge's score of the one with the
  highest reward less the mean score of all; mean over prompts. 0 is a random choice.
- `best_of_n_share` (share): Σ of these gains / Σ of the largest gains possible, those of the judge's own choice.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from prefloop.errors import DataError
from prefloop.evaluate.bootstrap import Interval, paired_bootstrap, ratio_bootstrap
from prefloop.rows import JudgedGroup, Metric, PreferencePair

PERCENT = (0.0, 100.0)


def longer_wins(pairs: Iterable[PreferencePair]) -> bool:
    """Return whether the longer completion is the chosen one in half of the pairs or more; equal lengths count half."""
    won = [_half(len(p.chosen.text) - len(p.rejected.text)) for p in pairs]
    return sum(won) * 2 >= len(won)


def pair_metrics(
    pairs: Sequence[PreferencePair], rewards: Mapping[str, float], longer: bool, seed: int = 0
) -> dict[str, Metric]:
    """Return the metrics on pairs. `rewards` are by completion id; `longer` is what `longer_wins` says of training.

    Raises:
        DataError: no pairs, or none whose two completions have a reward.

    """
    known = [p for p in pairs if p.chosen.completion_id in rewards and p.rejected.completion_id in rewards]
    if not known:
        raise DataError("reward model: no held-out pair has a reward for both sides; give more prompts to hold out")

    def margin(pair: PreferencePair) -> float:
        return rewards[pair.chosen.completion_id] - rewards[pair.rejected.completion_id]

    def by_length(pair: PreferencePair) -> float:
        return 100 * _half((len(pair.chosen.text) - len(pair.rejected.text)) * (1 if longer else -1))

    def right(pair: PreferencePair) -> float:
        return 100 * _half(margin(pair))

    rule = "longer" if longer else "shorter"
    what = f"{len(known)} held-out pairs, mean over prompts"

    def over_prompts(of: Callable[[PreferencePair], float], bounds: tuple[float, float] | None = None) -> Interval:
        return paired_bootstrap(_by_prompt(known, of), seed=seed, bounds=bounds)

    return {
        "accuracy": _metric(over_prompts(right, PERCENT), "%", f"{what}, ties half"),
        "accuracy_length": _metric(over_prompts(by_length, PERCENT), "%", f"{what}: the {rule} wins"),
        "accuracy_over_length": _metric(over_prompts(lambda p: right(p) - by_length(p)), "%", f"{what}, paired"),
        "reward_margin": _metric(over_prompts(margin), "score", what),
    }


def best_of_n(groups: Sequence[JudgedGroup], rewards: Mapping[str, float], seed: int = 0) -> dict[str, Metric]:
    """Return what the choice by reward is worth in the judge's scores; nothing where no prompt has two completions."""
    gains, possible = [], []
    for group in groups:
        rated = [
            (rewards[c.completion_id], score)
            for c, score in zip(group.completions, group.scores, strict=True)
            if score is not None and c.completion_id in rewards
        ]
        if len(rated) >= 2:
            scores = [score for _, score in rated]
            mean = sum(scores) / len(scores)
            gains.append(max(rated, key=lambda pair: pair[0])[1] - mean)
            possible.append(max(scores) - mean)
    if not gains:
        return {}
    what = f"of {max(len(g.completions) for g in groups)} completions of the policy; mean over prompts"
    found = {"best_of_n_gain": _metric(paired_bootstrap(gains, seed=seed), "score", f"best by reward, {what}")}
    told_apart = [(gain, most) for gain, most in zip(gains, possible, strict=True) if most > 0]
    if told_apart:
        share = ratio_bootstrap(*(list(column) for column in zip(*told_apart, strict=True)), seed=seed)
        found["best_of_n_share"] = _metric(share, "share", "of the gain of the judge's own choice")
    return found


def _half(difference: float) -> float:
    """Return 1 for a win, 0 for a loss, ½ for a tie."""
    return float(difference > 0) + 0.5 * float(difference == 0)


def _by_prompt(pairs: Sequence[PreferencePair], of: Callable[[PreferencePair], float]) -> list[float]:
    found: dict[str, list[float]] = defaultdict(list)
    for pair in pairs:
        found[pair.prompt.prompt_id].append(of(pair))
    return [sum(values) / len(values) for _, values in sorted(found.items())]


def _metric(interval: Interval, unit: str, estimator: str) -> Metric:
    return Metric(interval.value, interval.low, interval.high, interval.n, unit, estimator)
