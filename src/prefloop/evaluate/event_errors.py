"""How much of a reference a completion leaves out and how much it invents, from counts of events, with 95 % intervals.

Whoever counts, people or a judging model, splits the reference into events and looks for each in the completion.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prefloop.errors import DataError
from prefloop.evaluate.bootstrap import RESAMPLES, ratio_bootstrap
from prefloop.evaluate.text_metrics import as_metric, mean_metric
from prefloop.rows import Metric


@dataclass(frozen=True, slots=True)
class EventCounts:
    """Events of one completion against its reference.

    Raises:
        DataError: `reference` is below 1, `missed` is not in 0 … `reference`, or `invented` is below 0.

    """

    reference: int
    """N: events of the reference."""
    missed: int
    """M: of these, how many the completion does not tell. One that it tells wrongly is counted in `invented`."""
    invented: int
    """F: events that the completion tells and the reference does not bear out; may exceed N."""

    def __post_init__(self) -> None:
        if self.reference < 1 or not 0 <= self.missed <= self.reference or self.invented < 0:
            raise DataError(
                f"event counts: reference {self.reference}, missed {self.missed}, invented {self.invented}; must be "
                "reference ≥ 1, missed from 0 to reference, invented ≥ 0"
            )

    @property
    def rates(self) -> dict[str, float]:
        """The shares of N: missing, hallucination and their sum, total, which may exceed 1."""
        missing, hallucination = self.missed / self.reference, self.invented / self.reference
        return {"missing": missing, "hallucination": hallucination, "total": missing + hallucination}


def event_errors(
    counts: Sequence[EventCounts],
    average: Literal["micro", "macro"] = "micro",
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Mapping[str, Metric]:
    """Return the rates of missing and hallucinated events and their sum, of one entry of `counts` for each prompt.

        micro:  missing = Σ M / Σ N,   hallucination = Σ F / Σ N,   total = their sum
        macro:  the means over prompts of M / N, F / N and their sum

    Source: video-SALMONN 2, arXiv 2506.15220, and its ICLR 2025 submission, for captions of videos; that it divides by
    all reference events is seen there, so micro is the default. The prompts by which its language model lists and
    matches events were not found, and how its 7 runs for each caption are put together was not either.

    Raises:
        DataError: no counts.

    """
    if not counts:
        raise DataError("event errors: no counts; give those of one completion at least")
    found = {}
    for name in ("missing", "hallucination", "total"):
        rates = [c.rates[name] for c in counts]
        if average == "macro":
            found[name] = mean_metric(f"{name} events", rates, "share", seed=seed, resamples=resamples)
            continue
        events = [c.reference for c in counts]
        sums = [rate * size for rate, size in zip(rates, events, strict=True)]
        interval = ratio_bootstrap(sums, events, seed=seed, resamples=resamples)
        found[name] = as_metric(interval, "share", f"{name} events / reference events, bootstrap over prompts")
    return found
