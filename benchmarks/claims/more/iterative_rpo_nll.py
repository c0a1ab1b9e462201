"""Iterative RPO: the likelihood term on right chains is needed."""

from benchmarks.claims.engine.records import Arm, Claim, Comparison
from benchmarks.claims.engine.worlds import RIGHT

CLAIM = Claim(
    title="Iterative RPO's likelihood term helps",
    statement="DPO on right against wrong chains needs a likelihood term on the right ones; without it, much is lost.",
    source="arXiv 2404.19733",
    judge="sums",
    quality=RIGHT,
    world="sums",
    common=(
        "rounds=4",
        "prompts_per_round=120",
        "sampler.completions=8",
        "sampler.temperature=1.0",
        "pair_builder.max_pairs=2",
    ),
    new_tokens=96,
    arms=(
        Arm("with", "iterative_rpo", (), "alpha 1, the paper's"),
        Arm("without", "iterative_rpo", ("loss.alpha=0",), "alpha 0: DPO"),
    ),
    comparisons=(Comparison("the likelihood term helps", ("with",), ("without",)),),
    notes=("Right and wrong is checked by rule, so the judge of the training is that of the evaluation, too.",),
)
