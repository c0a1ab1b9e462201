"""prefloop's gate: rounds that would have made the policy worse are not promoted."""

from benchmarks.claims.engine.records import Arm, Claim, Comparison
from benchmarks.claims.engine.worlds import PLEASANT

GATE = "the default gate, on VADER and validation prompts"
NO_GATE = "every round is promoted"

CLAIM = Claim(
    title="The gate prevents regressions",
    statement="With a learning rate that is too high, rounds make the policy worse; the gate refuses them. (prefloop's "
    "own claim: papers promote every round.)",
    source="prefloop, evaluate/gate.py",
    judge="vader",
    quality=PLEASANT,
    common=(
        "rounds=4",
        "prompts_per_round=84",
        "sampler.completions=4",
        "evaluate.prompts=120",
    ),
    arms=(
        Arm("gate, 1e-3", "iterative_dpo", ("gate=gate",), GATE, 1e-3),
        Arm("no gate, 1e-3", "iterative_dpo", ("gate=always",), NO_GATE, 1e-3),
        Arm("gate, 3e-3", "iterative_dpo", ("gate=gate",), GATE, 3e-3),
        Arm("no gate, 3e-3", "iterative_dpo", ("gate=always",), NO_GATE, 3e-3),
    ),
    comparisons=(
        Comparison("fewer rounds are made worse, 1e-3", ("gate, 1e-3",), ("no gate, 1e-3",), "regressions", -1),
        Comparison("fewer rounds are made worse, 3e-3", ("gate, 3e-3",), ("no gate, 3e-3",), "regressions", -1),
        Comparison("the policy at the end is better, 1e-3", ("gate, 1e-3",), ("no gate, 1e-3",)),
        Comparison("the policy at the end is better, 3e-3", ("gate, 3e-3",), ("no gate, 3e-3",)),
    ),
    notes=(
        "A round made the policy worse if quality on the reported prompts, which the gate does not see, is below "
        "that of the policy that the round started from, with a 95 % interval over prompts.",
        "The gate asks VADER, the training judge, beside its guards; quality is what other judges say.",
    ),
)
