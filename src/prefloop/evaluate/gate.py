"""The gate: is a round's policy better than the best so far, and is its text still sound?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from math import inf, isfinite

from prefloop.errors import ConfigError
from prefloop.evaluate.looks import ALPHA, SPENDING, looks
from prefloop.evaluate.summary import number, with_interval, with_unit
from prefloop.rows import Decision, Metric

TIES = {
    "win_rate_vs_best": 50.0,
    "win_rate_vs_start": 50.0,
    "judge_score_gain_best": 0.0,
    "judge_score_gain": 0.0,
}
"""The metrics that a gate can decide by, each with its value between equal policies."""

EACH = "each"
"""Value of `gate.spending` that shares nothing: every round is tested as if it were the only one."""


@dataclass(frozen=True)
class Gate:
    """Accept a round when its gain is beyond chance and no guard objects.

    The gain must be shown on held-out prompts: the interval of `metric` lies above `threshold`. All rounds look at the
    same prompts, so they share one error rate, `alpha`: the interval that decides is a 95 % interval in a run of one
    round, and wider where there are more (98.3 % in each of three; see docs/evidence.md). Guards compare the candidate
    with the start policy and refuse a round that raises the score by wrecking the text: a judge that counts happy words
    is content with a text of nothing else. Guards use values, not intervals.
    A guard whose metric was not measured does not refuse; the decision says so.

    Departs from the papers: none of them gates a round; use `gate: {kind: always}` for their behaviour.
    """

    metric: str = "win_rate_vs_best"
    """What must rise: win_rate_vs_best, win_rate_vs_start (0–100 %), judge_score_gain_best, judge_score_gain
    (score). Default `win_rate_vs_best`: each round must improve on the last accepted one, and a win rate does
    not depend on the judge's scale or on a few extreme scores."""

    threshold: float | None = None
    """The interval's low end must be above this, in the metric's unit. Default none: 50 for win rates, 0 for
    gains, the value between equal policies. Higher asks for a larger gain; −∞ is not allowed, use `kind:
    always`."""

    alpha: float = ALPHA
    """Two-sided error rate of all rounds together, in (0, 0.5]: the chance that any round of equal policies is called
    better or worse. Half of it is for "better": a run whose rounds are no better than what they start from promotes
    one with a chance of `alpha` / 2 at most, 2.5 % by default. Default 0.05: one round is tested by the 95 %
    interval of the report."""

    spending: str = "even"
    """How `alpha` is shared among rounds. even: equal shares, right whatever the rounds have in common (Bonferroni).
    pocock, obrien_fleming: shares that fall or rise from round to round (Lan and DeMets 1983). each: not shared, every
    round is tested at `alpha` alone, and the more rounds, the likelier one is promoted by chance. Default even:
    every round has the same chance to be seen as better."""

    rounds: int | None = None
    """Rounds that share `alpha`. Default: the recipe's. Set it above the recipe's to be able to add rounds later
    without deciding the earlier ones anew."""

    max_kl: float | None = 1.0
    """Largest `kl_policy_start`, nats per token, > 0; none switches it off. Default 1.0 (ours): at it the
    policy gives its own tokens on average (geometric mean) e times the start's probability. Measured on the
    embedded story model: three sound rounds 0.05, 0.16, 0.21; a collapsed one, of happy words only, 5.5.
    Loops of words that the start finds likely can stay below; they are what `max_repetition_increase` is
    for."""

    max_repetition_increase: float | None = 0.1
    """Largest rise of `repetition` above the start's, share 0–1, ≥ 0; none switches it off. Default 0.1
    (ours): one more 3-gram in ten is repeated, which a reader sees. Measured on the embedded story model, 80
    tokens: start 0.03, three sound rounds 0.03, 0.03, 0.06, a collapsed one 0.16; loops of whole sentences
    have 0.5 and more."""

    max_length_ratio: float | None = 2.0
    """Largest `length` over the start's, > 0; none switches it off. Default 2.0 (ours): completions grow over
    rounds of iterated training (arXiv 2401.10020 reports it), and beyond twice the length a win rate mostly
    measures length."""

    min_length_ratio: float | None = 0.5
    """Smallest `length` over the start's, 0–1; none switches it off. Default 0.5 (ours): the mirror of the
    above, for policies that learn to stop before they can be wrong."""

    max_stopped_drop: float | None = 20.0
    """Largest fall of `stopped` below the start's, percentage points, ≥ 0; none switches it off. Default 20
    (ours): more than the sampling noise of 20 prompts (about 11 points, one standard error at 50 %), less
    than a policy that no longer ends its text."""

    def __post_init__(self) -> None:
        if self.metric not in TIES:
            near = get_close_matches(self.metric, TIES, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"gate.metric must be one of {', '.join(TIES)}, got {self.metric!r}{hint}")
        self._check_sharing()
        for name, value in (("threshold", self.threshold), *self._limits().items()):
            if value is not None and not isfinite(value):
                raise ConfigError(f"gate.{name} must be a finite number or none, got {value}")
        self._check_range("max_kl", self.max_kl, above=0)
        self._check_range("max_repetition_increase", self.max_repetition_increase, least=0, most=1)
        self._check_range("max_length_ratio", self.max_length_ratio, above=0)
        self._check_range("min_length_ratio", self.min_length_ratio, least=0, most=1)
        self._check_range("max_stopped_drop", self.max_stopped_drop, least=0, most=100)
        if self.max_length_ratio is not None and self.max_length_ratio <= (self.min_length_ratio or 0):
            raise ConfigError(
                f"gate.max_length_ratio must be above gate.min_length_ratio, got {self.max_length_ratio} and "
                f"{self.min_length_ratio}"
            )
        if "win_rate" in self.metric and self.threshold is not None and not 0 <= self.threshold < 100:
            raise ConfigError(f"gate.threshold must be 0 or more and below 100 for a win rate, got {self.threshold}")

    def __call__(self, metrics: Mapping[str, Metric], baseline: Mapping[str, Metric]) -> Decision:
        """Return the decision. The first reason is the one that decides: a guard's objection, else the gain.

        Args:
            metrics: the candidate's, from `heldout.candidate_metrics`.
            baseline: the start policy's, from `heldout.baseline_metrics`.

        """
        better, reason = self._gain(metrics)
        held, unchecked, objections = [], [], []
        for setting, limit in self._limits().items():
            if limit is None:
                continue
            name, judge = GUARDS[setting]
            found, start = metrics.get(name), baseline.get(name)
            if found is None or (start is None and name != "kl_policy_start"):
                unchecked.append(f"gate.{setting} was not checked: {name} was not measured")
                continue
            fine, fact = judge(found.value, start.value if start else 0.0, limit)
            if fine:
                held.append(fact)
            else:
                objections.append(f"{fact}; gate.{setting} allows {limit:g}")
        why = [*objections, reason, *unchecked]
        if held and not objections:
            why.append(f"within all guards: {'; '.join(dict.fromkeys(held))}")
        return Decision(better and not objections, tuple(why))

    def level(self, number: int, rounds: int) -> float:
        """Return the level of the interval by which round `number`, from 0, of a run of `rounds` is decided.

        Raises:
            ConfigError: `gate.rounds` are fewer than the run has.

        """
        if self.spending == EACH:
            return 1 - self.alpha
        planned = rounds if self.rounds is None else self.rounds
        if planned < rounds:
            raise ConfigError(
                f"gate.rounds: {planned} rounds share gate.alpha, and the run has {rounds}: nothing is left for round "
                f"{planned}; raise gate.rounds"
            )
        return (
            1 - self.alpha if planned == 1 else looks(planned, alpha=self.alpha, spending=self.spending)[number].level
        )

    def _check_sharing(self) -> None:
        if not 0 < self.alpha <= 0.5:
            raise ConfigError(f"gate.alpha must be in (0, 0.5], got {self.alpha}")
        if self.spending not in (*SPENDING, EACH):
            raise ConfigError(f"gate.spending must be one of {', '.join((*SPENDING, EACH))}, got {self.spending!r}")
        if self.rounds is not None and self.rounds < 1:
            raise ConfigError(f"gate.rounds must be ≥ 1, or none for the recipe's; got {self.rounds}")

    def _limits(self) -> dict[str, float | None]:
        return {
            "max_kl": self.max_kl,
            "max_repetition_increase": self.max_repetition_increase,
            "max_length_ratio": self.max_length_ratio,
            "min_length_ratio": self.min_length_ratio,
            "max_stopped_drop": self.max_stopped_drop,
        }

    def _check_range(
        self,
        name: str,
        value: float | None,
        least: float | None = None,
        above: float | None = None,
        most: float | None = None,
    ) -> None:
        if value is None:
            return
        low = f"> {above:g}" if above is not None else f"≥ {least:g}"
        high = f" and ≤ {most:g}" if most is not None else ""
        if (
            (above is not None and value <= above)
            or (least is not None and value < least)
            or (most is not None and value > most)
        ):
            raise ConfigError(f"gate.{name} must be {low}{high}, or none to switch it off; got {value}")

    def _gain(self, metrics: Mapping[str, Metric]) -> tuple[bool, str]:
        found = metrics.get(self.metric)
        if found is None or not isfinite(found.value):
            return False, f"{self.metric} was not measured: nothing shows that the round is better (gate.metric)"
        tie = TIES[self.metric] if self.threshold is None else self.threshold
        line = with_unit(tie, found.unit) if self.threshold is not None else f"{tie:g}{' %' * (found.unit == '%')}"
        setting = "" if self.threshold is None else " (gate.threshold)"
        other = "the best so far" if self.metric.endswith("_best") else "the start"
        text = f"{self.metric} {with_interval(found)}"
        if found.low > tie:
            return True, f"{text} excludes {line}{setting}: better than {other}"
        if found.high < tie:
            return False, f"{text} lies below {line}{setting}: worse than {other}"
        return False, f"{text} does not exclude {line}{setting}: not shown to be better than {other}"


def _kl(value: float, start: float, limit: float) -> tuple[bool, str]:
    return value <= limit, f"kl_policy_start is {with_unit(value, 'nats per token')}"


def _repetition(value: float, start: float, limit: float) -> tuple[bool, str]:
    rise = value - start
    return (
        rise <= limit,
        f"repetition {number(value, 'share')} is {_away(rise, 'share')} the start's {number(start, 'share')}",
    )


def _stopped(value: float, start: float, limit: float) -> tuple[bool, str]:
    rise = value - start
    return (
        -rise <= limit,
        f"stopped {with_unit(value, '%')} is {_away(rise, '%')} the start's {with_unit(start, '%')}",
    )


def _longer(value: float, start: float, limit: float) -> tuple[bool, str]:
    return _times(value, start) <= limit, _length(value, start)


def _shorter(value: float, start: float, limit: float) -> tuple[bool, str]:
    return _times(value, start) >= limit, _length(value, start)


def _length(value: float, start: float) -> str:
    ratio = f"{_times(value, start):.2f} times the start's {number(start, 'tokens')}"
    return f"length {with_unit(value, 'tokens')} is {ratio}"


def _times(value: float, start: float) -> float:
    return value / start if start else inf if value else 1.0


def _away(rise: float, unit: str) -> str:
    points = " points" if unit == "%" else ""
    return f"{number(abs(rise), unit)}{points} {'below' if rise < 0 else 'above'}"


GUARDS: dict[str, tuple[str, Callable[[float, float, float], tuple[bool, str]]]] = {
    "max_kl": ("kl_policy_start", _kl),
    "max_repetition_increase": ("repetition", _repetition),
    "max_length_ratio": ("length", _longer),
    "min_length_ratio": ("length", _shorter),
    "max_stopped_drop": ("stopped", _stopped),
}
"""By setting: the metric it guards, and (candidate's value, start's value, limit) → (held, what was
found)."""
