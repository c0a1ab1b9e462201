"""Missing and invented events: the method card's toy, micro against macro by hand, and against a loop."""

import random

import pytest

from prefloop.errors import DataError
from prefloop.evaluate.event_errors import EventCounts, event_errors

NAMES = ("missing", "hallucination", "total")


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_the_toy_of_the_card(average):
    """Four events, one missed, two invented: 0.25, 0.5, 0.75."""
    found = event_errors([EventCounts(4, 1, 2)], average)
    assert {name: metric.value for name, metric in found.items()} == dict(zip(NAMES, (0.25, 0.5, 0.75), strict=True))
    assert {(metric.n, metric.unit) for metric in found.values()} == {(1, "share")}


def test_micro_weighs_events_and_macro_prompts():
    counts = [EventCounts(4, 1, 2), EventCounts(16, 0, 24)]
    micro, macro = (event_errors(counts, average) for average in ("micro", "macro"))
    assert [micro[name].value for name in NAMES] == pytest.approx([1 / 20, 26 / 20, 27 / 20])
    assert [macro[name].value for name in NAMES] == pytest.approx([0.125, 1.0, 1.125])
    equal = [EventCounts(5, 1, 2), EventCounts(5, 4, 0)]
    assert event_errors(equal)["total"].value == pytest.approx(event_errors(equal, "macro")["total"].value)


def test_intervals_hold_the_value_and_narrow_with_more_prompts():
    draw = random.Random(0)
    counts = [EventCounts(n := draw.randrange(1, 30), draw.randrange(n + 1), draw.randrange(20)) for _ in range(400)]
    for average in ("micro", "macro"):
        few, many = event_errors(counts[:40], average), event_errors(counts, average)
        for name in NAMES:
            assert many[name].low < many[name].value < many[name].high
            assert many[name].high - many[name].low < 0.6 * (few[name].high - few[name].low)
    missing, hallucination, total = (event_errors(counts)[name].value for name in NAMES)
    assert total == pytest.approx(missing + hallucination)
    assert missing == pytest.approx(sum(c.missed for c in counts) / sum(c.reference for c in counts))


@pytest.mark.parametrize("counts", [(0, 0, 0), (4, 5, 0), (4, -1, 0), (4, 0, -1)])
def test_counts_that_cannot_be_are_refused(counts):
    with pytest.raises(DataError, match="missed from 0 to reference"):
        EventCounts(*counts)


def test_no_counts_are_refused():
    with pytest.raises(DataError, match="no counts"):
        event_errors([])
