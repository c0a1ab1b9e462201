"""SRPO: one policy that drafts and revises, trained offline on pairs; at sampling it may revise its own drafts.

Source: Choi et al. 2024, arXiv 2406.01660 (ICLR 2025). No code of the authors was found; the loss follows a pull
request to TRL (1772, never merged) and reviews of the paper.

    for each pair (x, y_w, y_l):
        r(y) of both under the prompt, ρ(a|b) of both after each of them as a draft
        minimise (1 − α)·[1 − β(ρ(w|l) + r(w) − ρ(l|w) − r(l))]² + α·L†
    at sampling: y_0 ~ π(·|x);  y_k ~ π(·| prompt that shows y_{k−1}), n times

How sure: the loss is the pull request's, and reviews agree; α, β (0.1 in its configuration, 0.01 in its code), learning
rate, cosine, weight decay and 128 pairs a step are the pull request's too. The paper's own values were not found.

Departs from the source: the wording of the revision prompt is ours (theirs was not found); all weights are trained,
where the pull request has LoRA of rank 16 (`train.lora.rank`); a tenth of the steps as warm-up instead of 150; one
round of one epoch instead of 5 epochs; the gate decides whether the policy is promoted. Held-out completions are
revised once by default (`eval_sampler.revisions`).

Reads `prompt`, `chosen` and `rejected`, or completions with scores.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2406.01660"

EMBEDDED = {
    "prompts": "embedded-preferences",
    "prompts_per_round": None,
    "sampler": {"kind": "given"},
    "eval_sampler": {"kind": "revise", "revisions": 1, "max_new_tokens": 80},
    "judge": {"kind": "given"},
    "eval_judge": {"kind": "lexicon"},
}
"""On the story model: the pairs that prefloop ships."""


def recipe() -> Recipe:
    """Return one round on existing pairs: α 0.8, β 0.1, learning rate 2e-5 with a cosine, weight decay 0.1."""
    return Recipe(
        recipe="srpo",
        rounds=1,
        prompts_per_round=None,
        sampler=Spec(kind="given"),
        eval_sampler=Spec.model_validate({"kind": "revise", "revisions": 1}),
        judge=Spec(kind="given"),
        pair_builder=Spec(kind="revisions"),
        loss=Spec.model_validate({"kind": "srpo", "beta": 0.1, "alpha": 0.8}),
        start_from="previous",
        reference="previous",
        train=TrainSettings(learning_rate=2e-5, pairs_per_step=128, schedule="cosine", weight_decay=0.1),
    )
