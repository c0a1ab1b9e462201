"""PPO: sample, score, estimate advantages with a value model, take clipped steps, and sample again.

Source: Unpacking DPO and PPO, Ivison et al. 2024, arXiv 2406.09279, and its code (hamishivi/EasyLM, read second-hand);
the algorithm is Schulman et al. 2017, arXiv 1707.06347.

    for each batch of 512 prompts:
        y ~ π(· | x),  one for each prompt
        reward of token t: −β·log π/π_ref(y_t);  at the last token, plus the reward model's score
        A = generalized advantage estimate with value model V, γ 1, λ 0.95; whitened
        8 steps on 64 rollouts each:  clipped policy loss + 0.1 · clipped value loss

One round is one batch of rollouts. The reference stays the first policy.

How sure: β 0.05, γ, λ, both clips, 0.1, 512 and 64, one pass and learning rate 1e-6 are seen in their code. Theirs and
not ours: temperature 0.7 (the ratio needs 1), score −10 for an answer that does not end (set
`pair_builder.unfinished=-10`), a value model that starts from the reward model. See `train/ppo.py` for what its code
does with the ratio.

Departs from the source: every round is kept (`gate.kind=always`), as theirs are, but each is measured on held-out
prompts; the number of rounds is ours: theirs is one pass over the prompts. The optimizer starts anew each round.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2406.09279, 1707.06347"

EMBEDDED = {
    "prompts_per_round": 128,
    "evaluate": {"prompts": 64},
    "loss": {"beta": 0.02},
    "trainer": {"value_learning_rate": 1e-3, "value_clip": None},
    "train": {"learning_rate": 2e-4, "epochs": 1, "pairs_per_step": 32},
}
"""On the story model: four rollouts for each of 128 prompts, and the step sizes of a tiny model. A value may move as
far as it likes, since 0.2 is a large share of the judge's scale there."""


def recipe() -> Recipe:
    """Return the settings of the paper's code: 512 prompts a round, minibatches of 64, β 0.05, γ 1, λ 0.95."""
    return Recipe(
        recipe="ppo",
        rounds=8,
        prompts_per_round=512,
        sampler=Spec.model_validate({"kind": "hf", "completions": 1, "max_new_tokens": 1024}),
        pair_builder=Spec(kind="rollouts"),
        loss=Spec.model_validate({"kind": "rollout_kl", "beta": 0.05, "estimator": "k1", "place": "reward"}),
        trainer=Spec.model_validate({"kind": "ppo", "clip": 0.2, "value_clip": 0.2, "value_weight": 0.1, "lam": 0.95}),
        gate=Spec(kind="always"),
        start_from="previous",
        reference="initial",
        train=TrainSettings(learning_rate=1e-6, epochs=1, pairs_per_step=64, schedule="constant"),
    )
