"""COFS-DPO: a module for each domain, and a weighted sum of them, forgets less than one module for all."""

from benchmarks.claims.engine.records import Arm, Claim, Comparison
from benchmarks.claims.engine.worlds import FLUENT, PLEASANT
from benchmarks.claims.ofs_vs_dpo import ADAPTER_RATES, CHECKS, DPO

ONE_MODULE = ("start_from=previous", "reference=adapter_off", "round_exit=keep")
"""The adapter goes on from domain to domain, as in OFS-DPO's recipe."""

CLAIM = Claim(
    title="COFS-DPO forgets less than one module for all domains",
    statement="With two domains in sequence, COFS-DPO's combination of both modules keeps more of the first one than "
    "DPO or OFS-DPO in sequence, and is better over both.",
    source="arXiv 2406.05534",
    judge="vader",
    quality=PLEASANT,
    data="sources",
    common=("order.names=[writer, mood]", "train.epochs=2"),
    rates=ADAPTER_RATES,
    arms=(
        Arm("COFS-DPO", "cofs_dpo", (CHECKS,), "a module for each domain, combined by a fit"),
        Arm("OFS-DPO", "cofs_dpo", (CHECKS, *ONE_MODULE), "one pair of modules, domain after domain"),
        Arm("DPO", "cofs_dpo", (DPO, *ONE_MODULE), "one module, domain after domain"),
    ),
    comparisons=(
        Comparison("less is forgotten than by DPO", ("COFS-DPO",), ("DPO",), "later_gain", quality=FLUENT),
        Comparison("less is forgotten than by OFS-DPO", ("COFS-DPO",), ("OFS-DPO",), "later_gain", quality=FLUENT),
        Comparison("it is better over both domains than DPO", ("COFS-DPO",), ("DPO",)),
        Comparison("it is better over both domains than OFS-DPO", ("COFS-DPO",), ("OFS-DPO",)),
    ),
    notes=(
        "Two domains, made anew for each seed: first `writer` (reference continuation against garbled text), then "
        "`mood` (happiest against saddest of four own samples by VADER). Each teaches one half of the quality. In this "
        "order, because mood learned first did not fall while the writer was learned, on a seed that is not reported: "
        "there was nothing to forget.",
        "What is forgotten is the fall of language, by a model that takes no part in training, while mood is learned. "
        "A method that learns little has little to forget, so quality over both domains at the end is compared too.",
        "COFS-DPO fits the weights of its modules on 64 pairs of each domain, as its recipe says: that is the method's "
        "memory, which the others do not have. How the paper chooses them was not found.",
    ),
)
