"""SPPO: sample K completions, fit each one's log-ratio to how often it wins, with the round's start as reference.

Source: Self-Play Preference Optimization, Wu et al. 2024, arXiv 2405.00675, and its code (uclaml/SPPO).

    for t in 1 … 3:
        y_1 … y_5 ~ π_t(· | x) for each prompt x, temperature 0.7, top-p 0.9
        P(y_i) = 1/K · Σ_j P(y_i beats y_j), itself counted as ½
        y_w = the highest, y_l = the lowest;  a, b = log π/π_t of them
        π_{t+1} = argmin (a − η(P_w − ½))² + (b − η(P_l − ½))²,   η = 1000

Departs from the source: completions of 256 tokens at most unless you set more (`sampler.max_new_tokens`; their script:
2,048); their PairRM becomes any judge. Where a judge gives scores only, P(y_i beats y_j) is
σ(scale · (s_i − s_j)), as with PairRM's, whose scores are log-odds; for another judge `pair_builder.scale` has to be
chosen. The two squares are rows of their own and the mean is over rows. RMSProp becomes AdamW; the policy is promoted
only if the gate accepts it; completions longer than the limit are dropped, not truncated.

How sure: K, temperature, top-p, beta, learning rate, batch and rounds are from the authors' code and paper; a third of
UltraFeedback's prompts for each round is about 20,000 (recalled); one epoch is a choice: an early configuration in
their repository says 6, with beta 0.01.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2405.00675"


def recipe() -> Recipe:
    """Return the paper's settings: 3 rounds of 20,000 prompts, K = 5, beta 0.001."""
    return Recipe(
        recipe="sppo",
        rounds=3,
        prompts_per_round=20_000,
        sampler=Spec.model_validate({"kind": "hf", "completions": 5, "temperature": 0.7, "top_p": 0.9}),
        pair_builder=Spec.model_validate({"kind": "win_rates", "keep": "best_and_worst"}),
        loss=Spec.model_validate({"kind": "sppo", "beta": 1e-3, "form": "soft"}),
        start_from="previous",
        reference="previous",
        train=TrainSettings(learning_rate=5e-7, epochs=1, pairs_per_step=128, schedule="linear", warmup=0.1),
    )
