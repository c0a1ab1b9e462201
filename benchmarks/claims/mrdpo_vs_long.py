"""mrDPO: rounds on fresh adapters that are merged beat one long run of DPO."""

from benchmarks.claims.engine.records import Arm, Claim, Comparison
from benchmarks.claims.engine.worlds import PLEASANT
from benchmarks.claims.ofs_vs_dpo import ADAPTER_RATES

ROUNDS = ("rounds=4", "prompts_per_round=84")
LONG = ("rounds=1", "prompts_per_round=336")

CLAIM = Claim(
    title="mrDPO beats one long run of DPO",
    statement="Rounds of guided DPO, each on a fresh adapter that is merged at its end, end better than one DPO run of "
    "the same length.",
    source="arXiv 2506.15220",
    judge="vader",
    quality=PLEASANT,
    common=("sampler.completions=4", "train.lora.rank=8", "train.lora.alpha=16", "train.epochs=2"),
    rates=(*ADAPTER_RATES, 3e-3),
    arms=(
        Arm("mrDPO", "mrdpo", ROUNDS, "four rounds, each on a fresh adapter, guided"),
        Arm("one long DPO", "mrdpo", (*LONG, "pair_builder={kind: ranked}", "loss={kind: dpo}"), "one round"),
        Arm("one long gDPO", "mrdpo", LONG, "one round, guided"),
        Arm(
            "one adapter",
            "mrdpo",
            (*ROUNDS, "round_exit=keep", "reference=adapter_off"),
            "four rounds on one adapter against the first policy, guided",
        ),
    ),
    comparisons=(
        Comparison("mrDPO beats one long DPO run", ("mrDPO",), ("one long DPO",)),
        Comparison("rounds help, with the guided term in both", ("mrDPO",), ("one long gDPO",)),
        Comparison("merging helps, with rounds in both", ("mrDPO",), ("one adapter",)),
    ),
    notes=(
        "Four rounds and no rebirth, which is a method of its own. λ 0.1 as in the paper; adapters of rank 8, as the "
        "recipe has on the story model.",
        "Rounds sample from the current policy, the long run from the start: that is a part of what is claimed. All "
        "arms see the same 336 prompts and their reference continuations, which only the guided term reads.",
    ),
)
