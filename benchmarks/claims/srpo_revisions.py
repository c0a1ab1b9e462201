"""SRPO: its policy's self-revisions help more than those of a policy that DPO trained."""

from benchmarks.claims.engine.records import Arm, Claim, Comparison
from benchmarks.claims.engine.worlds import PLEASANT

NUMBERS = (0, 1, 2)

CLAIM = Claim(
    title="SRPO's revisions help more than DPO's",
    statement="A policy that SRPO trained on pairs gets better as it revises its own drafts; one that DPO trained on "
    "the same pairs does not.",
    source="arXiv 2406.01660",
    judge="vader",
    quality=PLEASANT,
    data="rated",
    common=("train.epochs=2", "eval_sampler={kind: hf}"),
    arms=(
        Arm("SRPO", "srpo", (), "drafts and revisions are trained", revisions=NUMBERS),
        Arm("DPO", "srpo", ("pair_builder={kind: ranked}", "loss={kind: dpo}"), "drafts only", revisions=NUMBERS),
    ),
    comparisons=(
        Comparison("two revisions gain more with SRPO", ("SRPO",), ("DPO",), "revision_gain"),
        Comparison("SRPO gains by two revisions", ("SRPO",), (), "revision_gain"),
        Comparison(
            "SRPO with two revisions beats DPO's drafts", ("SRPO",), ("DPO",), "revised", than_statistic="drafts"
        ),
    ),
    notes=(
        "The best against the worst of four completions of each prompt by the starting policy, rated by VADER, made "
        "anew for each seed; two passes over them.",
        "Both policies revise with the same prompt, which shows the draft and then the opening again. The story model "
        "has never seen such a prompt; only SRPO trains on it. An update of SRPO scores three times as many "
        "completions as one of DPO.",
        "Learning rates are chosen by the mean quality over 0, 1 and 2 revisions.",
    ),
)
