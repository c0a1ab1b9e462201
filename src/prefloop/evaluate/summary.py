"""The run's summary in words and numbers: what `summary.json` holds, how a metric reads, and the verdict
sentence.

The schema of `summary.json` is in `docs/artifacts.md`.
"""

from collections.abc import Mapping
from math import inf, isfinite
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from prefloop.artifact import read_json
from prefloop.errors import CorruptArtifact, DataError
from prefloop.evaluate.bootstrap import LEVEL
from prefloop.rows import Metric

FILE = "summary.json"
"""The file's name in a run folder."""

START_ROUND = -1
"""The `round` of the start policy in `policy_best`."""

_DECIMALS = {"%": 1, "tokens": 1}
_UNIT_AFTER = {"%": " %", "tokens": " tokens", "nats per token": " nats per token"}
_TIE = 50.0


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Metric(_Part):
    value: float | None
    low: float | None
    high: float | None
    n: int
    unit: str
    estimator: str = ""


class _Measured(_Part):
    metrics: dict[str, _Metric] = {}
    seconds: dict[str, float] = {}
    tokens: dict[str, int] = {}


class _Round(_Measured):
    round: Annotated[int, Field(ge=0)]
    accepted: bool
    why: list[str]


class _Policy(_Part):
    path: str
    digest: str


def _inside(best: "_Best") -> "_Best":
    path = Path(best.path)
    if best.round != START_ROUND and (path.is_absolute() or ".." in path.parts):
        raise ValueError("the policy of a round lies in the run folder")
    return best


class _Best(_Policy):
    round: Annotated[int, Field(ge=-1)]


class _Summary(_Part):
    prefloop: str
    name: str
    recipe: str
    seed: int
    state: str
    policy_start: _Policy
    policy_best: Annotated[_Best, AfterValidator(_inside)]
    rounds: list[_Round]
    warnings: list[str] = []
    start: _Measured = _Measured()
    verdict: str = ""


def read_summary(root: Path) -> dict[str, Any]:
    """Return what `summary.json` of the run in `root` holds, once every field that prefloop reads is what it should be.

    Raises:
        CorruptArtifact: it is not JSON, or a field is missing or something else; the message names file and field.

    """
    path = root / FILE
    value = read_json(path)
    try:
        _Summary.model_validate(value)
    except ValidationError as error:
        faults = error.errors()
        missing = [".".join(map(str, fault["loc"])) for fault in faults if fault["type"] == "missing"]
        first = faults[0]
        field = ".".join(map(str, first["loc"])) or "the whole"
        said = f"lacks {', '.join(missing[:20])}"
        if not missing:
            said = f"{field[:100]}: {first['msg']}, got {repr(first['input'])[:60]}"
        raise CorruptArtifact(
            f"{path}: {said} (docs/artifacts.md lists the fields); repeat `prefloop run` to write it again"
        ) from None
    return {"warnings": [], "start": {}, "verdict": "", **value}


def metric_json(metric: Metric) -> dict[str, Any]:
    """Return a metric as `summary.json` holds it. An end of the interval that is not finite becomes `None`.

    Example:
        >>> metric_json(Metric(50.0, 40.0, 60.0, 8, "%"))["low"]
        40.0

    """
    return {
        "value": metric.value if isfinite(metric.value) else None,
        "low": metric.low if isfinite(metric.low) else None,
        "high": metric.high if isfinite(metric.high) else None,
        "n": metric.n,
        "unit": metric.unit,
        "estimator": metric.estimator,
        **({} if metric.level == LEVEL else {"level": metric.level}),
    }


def metric_from_json(entry: Mapping[str, Any]) -> Metric:
    """Return the metric that `metric_json` wrote; an end of the interval that is `None` is −∞ or ∞.

    Raises:
        DataError: a field is missing or not a number.

    """
    try:
        return Metric(
            value=float(entry["value"]),
            low=-inf if entry["low"] is None else float(entry["low"]),
            high=inf if entry["high"] is None else float(entry["high"]),
            n=int(entry["n"]),
            unit=str(entry["unit"]),
            estimator=str(entry.get("estimator", "")),
            level=float(entry.get("level", LEVEL)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"summary.json: a metric needs value, low, high, n and unit, got {dict(entry)!r}; "
            "write it again with `prefloop run`"
        ) from error


def metrics_from_json(entries: Mapping[str, Any]) -> dict[str, Metric]:
    """Return the metrics of one round by name, those without a value left out.

    Raises:
        DataError: a field is missing or not a number.

    """
    return {name: metric_from_json(e) for name, e in entries.items() if e.get("value") is not None}


def number(value: float, unit: str) -> str:
    """Return a number as prefloop shows it: one decimal for percent and tokens, three for the rest.

    Example:
        >>> number(-0.25, "score"), number(61.24, "%")
        ('−0.250', '61.2')

    """
    if not isfinite(value):
        return "∞" if value > 0 else "−∞" if value < 0 else "unknown"
    text = f"{value:.{_DECIMALS.get(unit, 3)}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def with_unit(value: float, unit: str) -> str:
    """Return a number with its unit, where the unit is one that is written: 61.2 %, 0.4 nats per token."""
    return number(value, unit) + _UNIT_AFTER.get(unit, "")


def interval(metric: Metric) -> str:
    """Return the interval in brackets, or "no interval"."""
    if not (isfinite(metric.low) and isfinite(metric.high)):
        return "no interval"
    return f"[{number(metric.low, metric.unit)}, {number(metric.high, metric.unit)}]"


def with_interval(metric: Metric) -> str:
    """Return a metric as it reads in a sentence; the interval's level is named where it is not 95 %.

    Example:
        >>> with_interval(Metric(61.2, 57.0, 65.3, 128, "%"))
        '61.2 % [57.0, 65.3]'

    """
    named = "" if metric.level == LEVEL else f" ({100 * metric.level:.4g} % interval)"
    return f"{with_unit(metric.value, metric.unit)} {interval(metric)}{named}"


def verdict(summary: Mapping[str, Any]) -> str:
    """Return what the run came to, in one or two sentences that claim no more than the intervals allow.

    Args:
        summary: what `summary.json` holds; the field `verdict` itself is not read.

    Raises:
        DataError: a metric of the summary cannot be read.

    """
    rounds = summary["rounds"]
    opening = {"failed": "The run failed", "running": "The run is not finished"}.get(summary["state"], "")
    if not rounds:
        return f"{opening or 'The run is done'}: no round has a result yet."
    accepted = [entry for entry in rounds if entry["accepted"]]
    count = f"{len(accepted)} of {_rounds(len(rounds))} {'was' if len(accepted) == 1 else 'were'} accepted"
    if not accepted:
        count = "the only round was refused" if len(rounds) == 1 else f"none of {_rounds(len(rounds))} was accepted"
    ending = _standing(summary, rounds) if accepted else _refused(rounds)
    text = f"{opening}; so far {count}{ending}" if opening else f"{count}{ending}"
    return f"{text[0].upper()}{text[1:]}."


def _rounds(count: int) -> str:
    return f"{count} round" if count == 1 else f"{count} rounds"


def _refused(rounds: list[Any]) -> str:
    """Say that the start stays best, and the decisive reason, a gate's first, why the last round was refused."""
    why = rounds[-1].get("why") or ()
    reason = f"; round {rounds[-1]['round']}: {str(why[0]).rstrip('.')}" if why else ""
    return f", so the start policy is still the best{reason}"


def _standing(summary: Mapping[str, Any], rounds: list[Any]) -> str:
    """Say where the best policy stands against the start."""
    number_of_best = summary["policy_best"]["round"]
    entry = next((e for e in rounds if e["round"] == number_of_best), None)
    if entry is None:
        return ", and the start policy is still the best"
    final = number_of_best == rounds[-1]["round"] and summary["state"] == "done"
    who = "the final policy" if final else f"the best policy, of round {number_of_best},"
    metrics = metrics_from_json(entry["metrics"])
    start = metrics_from_json((summary.get("start") or {}).get("metrics") or {})
    measured = metrics.get("win_rate_vs_start")
    tie, label = _TIE, "win rate"
    if measured is None:
        measured, tie, label = metrics.get("judge_score_gain"), 0.0, "gain in score"
    if measured is None:
        return f"; {who} was not compared with the start"
    claim = "beats" if measured.low > tie else "is worse than" if measured.high < tie else "cannot be told from"
    scores = ""
    if "judge_score" in metrics and "judge_score" in start:
        unit = metrics["judge_score"].unit
        before, after = start["judge_score"].value, metrics["judge_score"].value
        scores = f"; score {number(before, unit)} → {number(after, unit)}"
    found = f"{label} {with_interval(measured)}{scores}"
    return f"; {who} {claim} the start on {measured.n} held-out prompts: {found}"
