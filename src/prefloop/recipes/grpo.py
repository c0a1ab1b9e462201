"""GRPO: policy gradient on scores that are standardized within each prompt's group of completions.

Source: DeepSeekMath, Shao et al. 2024, arXiv 2402.03300, its section 4.

    y_1 … y_64 ~ π_old(· | x)
    A_i = (r_i − mean r)/std r,  the same for every token of y_i
    L = mean_i mean_t −min(ρ_t·A_i, clip(ρ_t, 1 ± ε)·A_i) + β·(π_ref/π − log π_ref/π − 1)

How sure: 64 completions, β 0.04, learning rate 1e-6, batch 1024 rollouts and one step for each batch are the paper's
(recalled). ε is not in what was at hand; 0.2 is TRL's. 16 prompts a round are 1024/64.

Departs from the source: no process rewards; every round is kept (`gate.kind=always`), and the reference stays the first
policy (theirs is moved up in outer iterations: `reference=previous` does so every round). Variants:
`trainer.average=token` and `trainer.scale=false`.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2402.03300"

EMBEDDED = {
    "prompts_per_round": 64,
    "sampler": {"completions": 8},
    "evaluate": {"prompts": 64},
    "train": {"learning_rate": 2e-4, "epochs": 1, "pairs_per_step": 64},
}
"""On the story model: groups of 8, and the step size of a tiny model."""


def recipe() -> Recipe:
    """Return the paper's settings: groups of 64, β 0.04 with k3 in the loss, 1024 rollouts a step."""
    return Recipe(
        recipe="grpo",
        rounds=8,
        prompts_per_round=16,
        sampler=Spec.model_validate({"kind": "hf", "completions": 64, "max_new_tokens": 1024}),
        pair_builder=Spec.model_validate({"kind": "rollouts", "min_group": 2}),
        loss=Spec.model_validate({"kind": "rollout_kl", "beta": 0.04, "estimator": "k3", "place": "loss"}),
        trainer=Spec.model_validate(
            {"kind": "group_advantage", "baseline": "mean", "scale": True, "ratio": "token", "clip": 0.2}
        ),
        gate=Spec(kind="always"),
        start_from="previous",
        reference="initial",
        train=TrainSettings(learning_rate=1e-6, epochs=1, pairs_per_step=1024, schedule="constant"),
    )
