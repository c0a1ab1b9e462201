"""Iterative RPO: sample chains of reasoning, pair right ones with wrong ones, train DPO with a likelihood term; again.

Source: Iterative Reasoning Preference Optimization, Pang et al. 2024, arXiv 2404.19733, version 3.

    for t in 1 … 4:
        y_1 … y_30 ~ π_t(· | x) for each question x;  r(y) = 1 if its final answer is right, else 0
        up to 10 pairs (y_w, y_l) with r(y_w) = 1, r(y_l) = 0;  questions all right or all wrong give none
        π_{t+1} = argmin −log σ(β·Δ) − α·log π(y_w|x)/|y_w|,   reference π_t, β = 0.1, α = 1

It needs questions with gold answers and a judge that says right or wrong: `judge: {kind: verifier, mode: number}` for
GSM8K. No judge is set here. Without policy and prompts it runs on sums that prefloop ships, with a model that gets
about half of them right and settings for its size.

How sure: α = 1 and the loss are the paper's; β, N = 30, 10 pairs, 4 rounds, batch 16 and learning rate 7e-7 are from
second-hand sources; temperature 0.8 is recalled (the paper raises it in later rounds).

Departs from the source: the paper draws its pairs at random, with an equal number for each question; here they are the
first ones by sample index (samples are exchangeable), so that one right chain may stand in several pairs. It trains
for up to 5,000 steps and keeps the best state by held-out questions; here it is one epoch and the gate. Pairs longer
than the limit are dropped, not truncated.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2404.19733"

EMBEDDED = {
    "policy": "embedded-sums",
    "prompts": "embedded-sums",
    "judge": {"kind": "sums"},
    "rounds": 2,
    "prompts_per_round": 1024,
    "sampler": {"completions": 8, "max_new_tokens": 80, "temperature": 1.0},
    "pair_builder": {"max_pairs": 4},
    "loss": {"alpha": 10.0},
    "train": {"learning_rate": 1e-3, "epochs": 2, "pairs_per_step": 64},
    "evaluate": {"prompts": 300},
}
"""On the sums world: fewer and smaller rounds, and a learning rate and a weight of the likelihood term for a tiny
model."""


def recipe() -> Recipe:
    """Return the paper's settings: 4 rounds, N = 30, up to 10 pairs a question, beta 0.1, alpha 1."""
    return Recipe(
        recipe="iterative_rpo",
        rounds=4,
        sampler=Spec.model_validate({"kind": "hf", "completions": 30, "temperature": 0.8}),
        pair_builder=Spec.model_validate({"kind": "ranked", "rule": "above_margin", "max_pairs": 10}),
        loss=Spec.model_validate({"kind": "rpo", "beta": 0.1, "alpha": 1.0}),
        start_from="previous",
        reference="previous",
        train=TrainSettings(learning_rate=7e-7, epochs=1, pairs_per_step=16),
    )
