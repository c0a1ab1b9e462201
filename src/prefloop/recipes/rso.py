"""RSO: sample many completions, keep a few by statistical rejection sampling, and pair those by their scores.

Source: Statistical Rejection Sampling Improves Preference Optimization, Liu et al. 2023, arXiv 2309.06657, its text.

    y_1 … y_64 ~ π(· | x) for each prompt x, temperature 0.7, top-k 40
    Y = 8 of them, accepted with probability exp((r(x, y) − r_max)/β), a sample of π(y|x)·exp(r(x, y)/β);  β = 0.5
    (y_w, y_l): Y two by two, the higher score is chosen
    π = argmin −log σ(γ·(a − b)),   a, b = log π/π_start of y_w, y_l;  γ = 0.05, called loss.beta

The paper's other loss, hinge-norm, is `loss={kind: hinge, beta: 0.05}`; it finds that both perform alike.

How sure: 64, 8, temperature, top-k, β, γ, pairing and 32 pairs a step are the paper's. Not in it, and ours: one epoch,
schedule, warm-up, and the learning rate 5e-7. The paper's 1e-5 is for Adafactor on T5, whose step is as a rule relative
to the size of the weights (recalled); AdamW's is not.

Departs from the source: its pairwise reward model, read as log-odds against a random completion, becomes any judge's
score, so that β must fit the judge's scale; Adafactor becomes AdamW; it keeps the checkpoint with the best win rate,
here the policy is promoted only if the gate accepts it; pairs longer than the limit are dropped, not truncated. The
paper makes one round: with more, each refers to the policy that it sampled from.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2309.06657"

EMBEDDED = {"sampler": {"completions": 8}, "pair_builder": {"accept": 4}}
"""On the story model: 4 of 8 completions instead of 8 of 64."""


def recipe() -> Recipe:
    """Return the paper's settings: one round, 8 of 64 completions at beta 0.5, DPO's loss at 0.05."""
    return Recipe(
        recipe="rso",
        rounds=1,
        sampler=Spec.model_validate({"kind": "hf", "completions": 64, "temperature": 0.7, "top_k": 40}),
        pair_builder=Spec.model_validate({"kind": "rejection", "beta": 0.5, "accept": 8, "pairing": "first_round"}),
        loss=Spec.model_validate({"kind": "dpo", "beta": 0.05}),
        start_from="previous",
        reference="previous",
        train=TrainSettings(learning_rate=5e-7, epochs=1, pairs_per_step=32),
    )
