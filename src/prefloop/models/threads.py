"""How many CPU threads a model is fastest with: measured, as it depends on model, machine and who else is at work.

Threads that wait for a core which others use cost far more than a second core can gain: with other work on both cores
of a machine, a pass of a 15 M-parameter model took 10 s on two threads and 0.4 s on one; alone on it, 0.15 and 0.25 s.
"""

import math
import os
import time

import torch
from transformers import PreTrainedModel

from prefloop.models.logps import TokenGroup, completion_logps

SMALL = 5_000_000
"""Parameters below which the answer is one thread, unmeasured: there is little to gain, decoding one token at a time
gains nothing, and runs with models of this size are to give the same bytes every time."""
ROWS = 4
"""Completions of the batch that is timed."""
LENGTH = 64
"""Tokens of each, the context included; fewer of large models."""
WORK = 8_000_000_000
"""Parameters × tokens of the batch, at most: about a fifth of a second on one core."""
GAIN = 1.1
"""Twice the threads must be this many times faster; less is a tie, which goes to fewer threads."""
PASSES = 5
"""Most timed passes for a number of threads; the fastest counts, as whatever disturbs a pass makes it slower."""
SECONDS = 0.15
"""No further pass for a number of threads begins after this time."""
HOPELESS = 4.0
"""A pass this many times slower than the fastest so far is the last one."""


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fastest_threads(model: PreTrainedModel, most: int) -> int:
    """Return the number of threads, 1, 2, 4, … or `most`, that computes log-probs of made-up completions fastest.

    1 where the model is `SMALL`, `most` where it is not on the CPU. Takes about a second. The number of threads is
    put back.
    """
    if model.device.type != "cpu":
        return most
    if most == 1 or model.num_parameters() < SMALL:
        return 1
    before, threads = torch.get_num_threads(), 1
    groups = _made_up_groups(model)
    fastest = _seconds(model, groups, threads, math.inf)
    while threads < most:
        more = min(2 * threads, most)
        seconds = _seconds(model, groups, more, HOPELESS * fastest)
        if seconds * GAIN > fastest:
            break
        threads, fastest = more, seconds
    torch.set_num_threads(before)
    return threads


def _made_up_groups(model: PreTrainedModel) -> list[TokenGroup]:
    vocabulary = model.config.get_text_config().vocab_size
    length = max(4, min(LENGTH, WORK // model.num_parameters() // ROWS))
    rows = [[(length * row + place) % vocabulary for place in range(length)] for row in range(ROWS)]
    return [TokenGroup(tuple(ids[: length // 2]), (tuple(ids[length // 2 :]),)) for ids in rows]


@torch.inference_mode()
def _seconds(model: PreTrainedModel, groups: list[TokenGroup], threads: int, hopeless: float) -> float:
    """Return the fastest of a few passes, in seconds, or that of a pass which took longer than `hopeless`."""
    torch.set_num_threads(threads)
    fastest = math.inf
    began = time.perf_counter()
    for number in range(PASSES + 1):
        start = time.perf_counter()
        completion_logps(model, groups, layout="padded")
        seconds = time.perf_counter() - start
        if seconds > hopeless:
            return seconds
        if number > 0:  # the first pass warms up
            fastest = min(fastest, seconds)
            if time.perf_counter() - began > SECONDS:
                break
    return fastest
