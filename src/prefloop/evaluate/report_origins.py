"""What a run learnt and forgot of each domain: a table for rounds on data of several sources."""

from collections.abc import Mapping, Sequence
from typing import Any

from prefloop.evaluate.summary import interval, metric_from_json, number

METRIC = "win_rate_vs_start"


def origin_table(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return win rates against the start by round and domain; `None` where the prompts come from one source only.

    `forgotten` is a domain's best value over the rounds minus its last one, in points: 0 where nothing was lost.
    """
    found = [(entry["round"], entry.get("by_origin") or {}) for entry in rounds]
    names = sorted({name for _, origins in found for name, metrics in origins.items() if METRIC in metrics})
    if len(names) < 2:
        return None
    rows = []
    for number_of_round, origins in found:
        metrics = [metric_from_json(origins[name][METRIC]) if name in origins else None for name in names]
        cells = [None if m is None else (number(m.value, m.unit), interval(m)) for m in metrics]
        rows.append({"round": number_of_round, "cells": cells})
    values = {name: [origins[name][METRIC]["value"] for _, origins in found if name in origins] for name in names}
    forgotten = [number(max(values[name]) - values[name][-1], "%") for name in names]
    return {"names": names, "rows": rows, "forgotten": forgotten}
