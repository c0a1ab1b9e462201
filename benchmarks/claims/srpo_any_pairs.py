"""SRPO's optimum does not depend on which pairs are asked."""

from benchmarks.claims.engine.records import Arm, Claim, Comparison, Quality

CLAIM = Claim(
    title="SRPO's optimum does not depend on which pairs are asked",
    statement="Pairs that other policies wrote move the optimum of DPO and IPO, but not SRPO's.",
    source="arXiv 2406.01660",
    judge="",
    quality=Quality("how far the policy moves if other pairs are asked (%, total variation)", (), "percent"),
    exact="benchmarks.claims.engine.tabular:moved_by_other_pairs",
    arms=(
        Arm("SRPO", "srpo", (), "drafts and revisions"),
        Arm("IPO", "ipo", (), "drafts only"),
        Arm("DPO", "dpo", (), "drafts only"),
    ),
    comparisons=(
        Comparison("SRPO moves less than IPO", ("SRPO",), ("IPO",), sign=-1),
        Comparison("SRPO moves less than DPO", ("SRPO",), ("DPO",), sign=-1),
    ),
    notes=(
        "The world of nine answers of `exact_optima`, with preferences that have cycles: pairs asked evenly, against "
        "pairs of answers that another policy wrote. No sampling error: policies are trained on expectations.",
        "With preferences that a reward explains, DPO's optimum would not move either.",
    ),
)
