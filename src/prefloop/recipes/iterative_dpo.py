"""Iterative DPO: sample K completions with the current policy, score them, train on best against worst, and again.

Source: RLHF Workflow, Dong et al. 2024, arXiv 2405.07863, and its code (RLHFlow/Online-RLHF); the loss is DPO,
Rafailov et al. 2023, arXiv 2305.18290, eq. 7.

    for t in 1 … 3:
        y_1 … y_K ~ π_t(· | x) for each fresh prompt x, temperature 1
        y_w = argmax r(x, y_k),  y_l = argmin r(x, y_k);  ties are dropped
        π_{t+1} = argmin DPO(π; reference π_t, pairs)

Departs from the source: their reward model becomes any judge; the round's policy is promoted only if the gate accepts
it (theirs always is); pairs longer than the limit are dropped, not truncated. Their paper says that the reference
stays the initial policy, their script passes the round's own start: `reference: previous` follows the script, set
`reference: initial` for the paper's text.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2405.07863 (RLHFlow), loss of 2305.18290"


def recipe() -> Recipe:
    """Return RLHFlow's settings: 3 rounds of 20,000 prompts, K = 8, best against worst, beta 0.1."""
    return Recipe(
        recipe="iterative_dpo",
        rounds=3,
        prompts_per_round=20_000,
        sampler=Spec.model_validate({"kind": "hf", "completions": 8, "temperature": 1.0, "top_p": 1.0}),
        pair_builder=Spec.model_validate({"kind": "ranked", "rule": "best_vs_worst"}),
        loss=Spec.model_validate({"kind": "dpo", "beta": 0.1}),
        start_from="previous",
        reference="previous",
        train=TrainSettings(learning_rate=5e-7, epochs=2, pairs_per_step=128, schedule="cosine"),
    )
