"""SPPO: sample K completions, fit each one's log-ratio to how often it wins, with the round's start as reference.

Source: Self-Play Preference Optimization, Wu et al. 2024, arXiv 2405.00675, and its code (uclaml/SPPO).

    for t in 1 … 3:
        y_1 … y_5 ~ π_t(· | x) for each prompt x, temperature 0.7, top-p 0.9
        y_w = argmax s(x, y_k),  y_l = argmin s(x, y_k)
        π_{t+1} = argmin (a − η/2)² + (b + η/2)²,   a, b = log π/π_t of y_w, y_l;  η = 1000

Departs from the source: the paper fits a and b to η·(P − ½), where P is a completion's win rate against all K
completions; a pair does not carry those, so this recipe uses the hard form, in which the winner always wins
(TRL's sppo_hard; it is twice the paper's loss at P = 1 and 0). With a judge that gives win probabilities set
`loss.form=single`, which uses P(chosen beats rejected) as the authors' sppo_single does. Their PairRM becomes any
judge; RMSProp becomes AdamW; the policy is promoted only if the gate accepts it; pairs longer than the limit are
dropped, not truncated.

How sure: K, temperature, top-p, beta, learning rate, batch and rounds are from the authors' code and paper; a third of
UltraFeedback's prompts for each round is about 20,000 (recalled); one epoch is a choice: an early configuration in
their repository says 6, with beta 0.01.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2405.00675"


def recipe() -> Recipe:
    """Return the paper's settings with the hard form: 3 rounds of 20,000 prompts, K = 5, beta 0.001."""
    return Recipe(
        recipe="sppo",
        rounds=3,
        prompts_per_round=20_000,
        sampler=Spec.model_validate({"kind": "hf", "completions": 5, "temperature": 0.7, "top_p": 0.9}),
        pair_builder=Spec.model_validate({"kind": "ranked", "rule": "best_vs_worst"}),
        loss=Spec.model_validate({"kind": "sppo", "beta": 1e-3, "form": "hard"}),
        start_from="previous",
        reference="previous",
        train=TrainSettings(learning_rate=5e-7, epochs=1, pairs_per_step=64, schedule="linear", warmup=0.1),
    )
