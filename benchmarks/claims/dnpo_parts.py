"""DNPO's two parts, the judge's labels and the noise, taken apart."""

from benchmarks.claims.dnpo_vs_spin import JUDGING, NOISE_RATE, SELF_PLAY
from benchmarks.claims.engine.records import Arm, Claim, Comparison
from benchmarks.claims.engine.worlds import LANGUAGE

CLAIM = Claim(
    title="DNPO's labels and its noise each help",
    statement="Both parts help: the noise most in the first round, the labels most in the second, both together best.",
    source="arXiv 2502.05400",
    judge="stories-even",
    quality=LANGUAGE,
    common=SELF_PLAY,
    start="tuned",
    new_tokens=120,
    arms=(
        Arm("SPIN", "spin", (), "human answers chosen, no noise"),
        Arm("labels only", "dnpo", (NOISE_RATE, "trainer.bound=0"), "the judge's labels, no noise"),
        Arm("noise only", "dnpo", (NOISE_RATE, "per_round={pair_builder.prefer: [human]}"), "SPIN's labels, noise"),
        Arm("DNPO", "dnpo", (NOISE_RATE,), "both"),
    ),
    comparisons=(
        Comparison("the judge's labels help", ("labels only", "DNPO"), ("SPIN", "noise only")),
        Comparison("the noise helps", ("noise only", "DNPO"), ("SPIN", "labels only")),
    ),
    notes=(
        "Main effects of a 2 × 2 design: each part's mean with and without the other one.",
        *JUDGING,
    ),
)
