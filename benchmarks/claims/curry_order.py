"""Curry-DPO: easy pairs first beats one pair of each prompt, and several pairs without an order."""

from benchmarks.claims.engine.records import Arm, Claim, Comparison
from benchmarks.claims.engine.worlds import PLEASANT

SHUFFLED = 'pair_builder={"kind": "{parts}/shuffled_ladder.py:ShuffledLadder"}'

CLAIM = Claim(
    title="Curry-DPO's order beats one pair and unordered pairs",
    statement="Several pairs of each prompt, those with the largest rating gap first and against a moving reference, "
    "end better than one pair of each prompt and than all pairs without an order.",
    source="arXiv 2403.07230",
    judge="vader",
    quality=PLEASANT,
    data="rated",
    common=("sampler.kind=given",),
    arms=(
        Arm("curriculum", "curry_dpo", (), "three rounds: (R1, R4), (R1, R3), (R1, R2)"),
        Arm(
            "one pair",
            "curry_dpo",
            ("pair_builder={kind: ranked, rule: best_vs_worst}", "rounds=1", "train.epochs=3"),
            "(R1, R4) only, three passes",
        ),
        Arm(
            "pooled",
            "curry_dpo",
            ("pair_builder={kind: curriculum, steps: 1, scope: global}", "rounds=1"),
            "all three pairs of each prompt in one round",
        ),
        Arm("random order", "curry_dpo", (SHUFFLED,), "three rounds, each prompt's pairs in random order"),
    ),
    comparisons=(
        Comparison("the curriculum beats one pair of each prompt", ("curriculum",), ("one pair",)),
        Comparison("the curriculum beats pooled pairs", ("curriculum",), ("pooled",)),
        Comparison("the order itself helps", ("curriculum",), ("random order",)),
    ),
    notes=(
        "Four completions of each prompt by the starting policy, rated by VADER, made anew for each seed.",
        "`random order` differs from the curriculum in nothing but the order; it is our addition to the paper's "
        "baselines.",
    ),
)
