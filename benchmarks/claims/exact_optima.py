"""In a world of nine answers, trained policies reach the optimum that the papers derive."""

from benchmarks.claims.engine.records import Arm, Claim, Comparison, Quality

REACHED = 99.9
"""Percent of the way that counts as arrival."""
ABOUT = {
    "DPO": ("dpo", "π* ∝ π_ref·e^(r/β)"),
    "robust DPO": ("robust_dpo", "the same, with every fifth label wrong"),
    "LN-DPO": ("ln_dpo", "the same, with β for each token"),
    "SimPO": ("simpo", "π* ∝ e^(r/β), γ = 0"),
    "f-DPO": ("f_dpo", "π* = π_ref/(1 + c − r/β), c from the sum: forward KL"),
    "IPO": ("ipo", "π* ∝ π_ref·e^(p/β), p the mean probability to win"),
    "SRPO": ("srpo", "π* ∝ π_ref/Z, Z(d) the partition function of the revisions of d"),
    "SRPO's revisions": ("srpo", "π†*(y|d) ∝ π_ref(y)·e^(P(y beats d)/β)"),
}
"""Loss and optimum by arm, for the page."""

CLAIM = Claim(
    title="Trained policies reach their closed-form optimum",
    statement="Where every answer can be enumerated, minimising a loss over parameters ends at the optimum that its "
    "paper derives.",
    source="arXiv 2305.18290, 2403.00409, 2407.15229, 2405.14734, 2309.16240, 2310.12036, 2406.01660",
    judge="",
    quality=Quality("way covered from the uniform policy to the optimum (%, total variation)", (), "percent"),
    exact="benchmarks.claims.engine.tabular:way_covered",
    arms=tuple(Arm(name, loss, (), words) for name, (loss, words) in ABOUT.items()),
    comparisons=tuple(Comparison(f"{name} arrives", (name,), by=REACHED) for name in ABOUT),
    notes=(
        "Nine answers of two tokens; the policy is a table of logits, first token and second after each first. A seed "
        "draws the reference, rewards and preferences. Losses are prefloop's classes, minimised by L-BFGS over the "
        "expectation of all pairs.",
        "DPO, robust DPO, LN-DPO, SimPO and f-DPO get Bradley-Terry preferences of the rewards, IPO and SRPO "
        "preferences with cycles. β is 0.5. The recipe column names the loss.",
        "A check of the code more than of the papers: it has no sampling error, so seeds differ by the world only.",
    ),
)
