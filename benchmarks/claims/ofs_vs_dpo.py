"""OFS-DPO: two modules that chase each other learn more from a stream of pairs than one."""

from benchmarks.claims.engine.records import Arm, Claim, Comparison
from benchmarks.claims.engine.worlds import PLEASANT

ADAPTER_RATES = (1e-4, 3e-4, 1e-3)
"""Learning rates of a LoRA adapter: three times those of all weights."""
DPO = "trainer={kind: update}"
"""Plain minimisation with one module, in everything else OFS-DPO's recipe."""
CHECKS = "trainer.check_every=4"
"""What the recipe has on the story model, whose rounds are of a few steps."""

CLAIM = Claim(
    title="OFS-DPO beats DPO within a domain",
    statement="A fast and a slow module that chase each other keep gradients alive and end better than DPO on the same "
    "stream of pairs.",
    source="arXiv 2406.05534",
    judge="vader",
    quality=PLEASANT,
    data="rated",
    common=("rounds=3", "prompts_per_round=112", "train.epochs=2"),
    rates=ADAPTER_RATES,
    arms=(
        Arm("OFS-DPO", "ofs_dpo", (CHECKS,), "fast and slow module; the fast one is the policy"),
        Arm("DPO", "ofs_dpo", (DPO,), "one module"),
    ),
    comparisons=(Comparison("OFS-DPO beats DPO", ("OFS-DPO",), ("DPO",)),),
    notes=(
        "A stream of three slices; the best against the worst of four completions of each prompt by the starting "
        "policy, rated by VADER, made anew for each seed. Two passes over each slice, so that DPO's gradient has a "
        "chance to vanish.",
        "Both arms train a LoRA adapter of rank 16 against the first policy as reference. An update of OFS-DPO moves "
        "two modules and costs twice as much; it is counted as one.",
        "α 0.1 and ρ 0.1 are prefloop's defaults: the paper's numbers were not found.",
    ),
)
