"""DNPO goes on where SPIN stalls."""

from benchmarks.claims.engine.records import Arm, Claim, Comparison
from benchmarks.claims.engine.worlds import LANGUAGE

SELF_PLAY = (
    "rounds=4",
    "prompts_per_round=96",
    "replay=1",
    "loss.beta=0.1",
    "sampler.completions=1",
)
"""SPIN's loop for both methods: successive slices of 96 prompts, with the pairs of the round before."""
NOISE_RATE = "trainer.noise_learning_rate=1e-2"
"""What the recipe has on the story model."""
JUDGING = (
    "The training judge and one of the evaluation's are trigram models of disjoint halves of the same real stories. At "
    "the start they agree on 9 of 10 pairs of a human and an own answer, and hold about 4 of 10 own answers for the "
    "better one; stories260K, which wrote the human answers (at temperature 0.7), about 2 of 10. The paper says that "
    "its judge agrees with people on 95 % and finds 30 % of own answers at least as good.",
    "All three judges go by likelihood, which rewards predictable text: see repetition and length.",
    "One λ and one learning rate for all rounds, and pairs of the round before in both: SPIN's schedules and DNPO's "
    "lack of replay would be further differences. DNPO's noise is the recipe's own for this model.",
)

CLAIM = Claim(
    title="DNPO goes on where SPIN stalls",
    statement="SPIN's gain ends after the first rounds; with the judge's labels and learned noise it goes on.",
    source="arXiv 2502.05400",
    judge="stories-even",
    quality=LANGUAGE,
    common=SELF_PLAY,
    start="tuned",
    new_tokens=120,
    arms=(
        Arm("SPIN", "spin", (), "human answers chosen, no noise"),
        Arm("DNPO", "dnpo", (NOISE_RATE,), "a SPIN round, then the judge's labels and noise"),
    ),
    comparisons=(
        Comparison("DNPO gains more than SPIN after the first round", ("DNPO",), ("SPIN",), "later_gain"),
        Comparison("DNPO is better at the end", ("DNPO",), ("SPIN",)),
        Comparison("DNPO still gains in the last two rounds", ("DNPO",), (), "last_gain"),
    ),
    notes=JUDGING,
)
