"""sDPO: easy data first beats a random order, and all data at once."""

from benchmarks.claims.engine.records import Arm, Claim, Comparison
from benchmarks.claims.engine.worlds import PLEASANT

CLAIM = Claim(
    title="sDPO's order beats a random order and all data at once",
    statement="Preference sets in steps, the easy one first and each step's policy the reference of the next, end "
    "better than DPO on all of the data; a random partition does not.",
    source="arXiv 2403.19270",
    judge="vader",
    quality=PLEASANT,
    data="sources",
    common=("train.epochs=2",),
    arms=(
        Arm("easy first", "sdpo", (), "two steps, sources by falling accuracy of the start"),
        Arm("random steps", "sdpo", ("order=shuffled", "prompts_per_round=168"), "two steps, pairs divided at random"),
        Arm("at once", "sdpo", ("order=shuffled", "rounds=1"), "one step, all pairs"),
    ),
    comparisons=(
        Comparison("easy first beats random steps", ("easy first",), ("random steps",)),
        Comparison("easy first beats all at once", ("easy first",), ("at once",)),
    ),
    notes=(
        "Two sources, made anew for each seed: `writer` (reference continuation against garbled text, easy) and `mood` "
        "(happiest against saddest of four own samples by VADER, hard). Each teaches one half of the quality.",
        "All arms pass over the same pairs twice.",
    ),
)
