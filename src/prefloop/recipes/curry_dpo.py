"""Curry-DPO: several pairs of each prompt from rated responses, the easy ones first, against a moving reference.

Source: Pattnaik et al. 2024, arXiv 2403.07230 (EMNLP Findings 2024). Seen in third-party descriptions only; the paper's
hyper-parameters (beta, learning rate, epochs, prompt counts) were not found.

    responses of x sorted by rating: R1 ≥ R2 ≥ R3 ≥ R4
    for i in 1 … 3:
        pairs of bucket i: (R1, R4), then (R1, R3), then (R1, R2): the largest rating gap first
        π_i = argmin DPO(π; reference π_{i−1}, bucket i), started from π_{i−1}

Reads the responses and ratings of the data (`completions` and `scores`, or `chosen` and `rejected`); with
`sampler.kind=hf` and a judge it rates the policy's own samples instead, drawn anew each round: so it does on the story
model that prefloop ships.

Departs from the source: neutral defaults (ours) stand for the settings that were not found; ties with the best make no
pair (the paper's rule was not found); a round is promoted only if the gate accepts it. The paper's second measure of
difficulty, the gap in log-prob (recalled; how it is normalised was not found), is `pair_builder.by=logp`.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2403.07230"

EMBEDDED = {
    "prompts_per_round": None,
    "sampler": {"kind": "hf", "completions": 4, "max_new_tokens": 80},
    "eval_sampler": None,
}
"""On the story model: own samples, and the same prompts in every round, as the paper's buckets have."""


def recipe() -> Recipe:
    """Return three rounds over all prompts, one rung of each prompt's ladder at a time, beta 0.1."""
    return Recipe(
        recipe="curry_dpo",
        rounds=3,
        prompts_per_round=None,
        sampler=Spec(kind="given"),
        eval_sampler=Spec(kind="hf"),
        judge=Spec(kind="given"),
        pair_builder=Spec.model_validate({"kind": "curriculum", "steps": 3, "scope": "prompt"}),
        loss=Spec.model_validate({"kind": "dpo", "beta": 0.1}),
        start_from="previous",
        reference="previous",
        train=TrainSettings(learning_rate=5e-7, epochs=1, pairs_per_step=64),
    )
