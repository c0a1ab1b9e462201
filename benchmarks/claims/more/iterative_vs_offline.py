"""Iterative DPO beats one round of the same length on samples of the start."""

from benchmarks.claims.engine.records import Arm, Claim, Comparison
from benchmarks.claims.engine.worlds import PLEASANT

CLAIM = Claim(
    title="Iterative DPO beats one offline round",
    statement="New samples of the current policy in every round end better than DPO on samples of the start.",
    source="arXiv 2405.07863",
    judge="vader",
    quality=PLEASANT,
    common=("sampler.completions=4",),
    arms=(
        Arm("iterative", "iterative_dpo", ("rounds=4", "prompts_per_round=84"), "four rounds of 84 prompts"),
        Arm("offline", "iterative_dpo", ("rounds=1", "prompts_per_round=336"), "one round of the same 336 prompts"),
    ),
    comparisons=(Comparison("iterative beats offline", ("iterative",), ("offline",)),),
    beside=("vader",),
)
