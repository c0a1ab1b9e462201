"""TSO's model matrix and its dual clip, taken apart, against plain iterative DPO."""

from benchmarks.claims.engine.records import Arm, Claim, Comparison
from benchmarks.claims.engine.worlds import PLEASANT

MATRIX = "per_round={sampler.completions: [2, 1]}"
"""Two completions of each prompt in every round: both by the policy while there is no earlier version."""
OWN = (
    "sampler={kind: hf, completions: 2}",
    "pair_builder={kind: ranked, rule: best_vs_worst}",
    "per_round={train.epochs: [2, 3]}",
)
"""The better one of two own completions. As many passes as the matrix makes pairs: two in its first round, then
three."""
NO_CLIP = "loss={kind: dpo}"

CLAIM = Claim(
    title="TSO's matrix and dual clip beat plain iterative DPO",
    statement="Pairs from a matrix of own versions and human answers, corrected by a judge, and a loss that is clipped "
    "on both sides end better than iterative DPO.",
    source="arXiv 2409.02118",
    judge="vader",
    quality=PLEASANT,
    common=("rounds=4", "prompts_per_round=80"),
    arms=(
        Arm("TSO", "tso", (MATRIX,), "matrix of versions and human answers, dual clip"),
        Arm("matrix only", "tso", (MATRIX, NO_CLIP), "the same pairs, DPO's loss"),
        Arm("clip only", "tso", OWN, "the better of two own completions, dual clip"),
        Arm("iterative DPO", "tso", (*OWN, NO_CLIP), "the better of two own completions, DPO's loss"),
    ),
    comparisons=(
        Comparison("TSO beats iterative DPO", ("TSO",), ("iterative DPO",)),
        Comparison("the matrix helps", ("TSO", "matrix only"), ("clip only", "iterative DPO")),
        Comparison("the dual clip helps", ("TSO", "clip only"), ("matrix only", "iterative DPO")),
    ),
    notes=(
        "Main effects of a 2 × 2 design: each part's mean with and without the other one.",
        "The matrix makes two or three pairs of a prompt, the better of two completions one: the latter are passed "
        "over two or three times, for the same number of updates.",
        "The matrix is across versions: the story model has no smaller sister. It brings the human answers along, as "
        "the paper's does. That the paper's clip has this form, and its thresholds, 1.0, are readings of ours.",
    ),
)
