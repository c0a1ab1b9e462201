"""RLOO: REINFORCE whose baseline is the mean reward of a prompt's other completions.

Source: Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human Feedback in LLMs, Ahmadian et
al. 2024, arXiv 2402.14740.

    y_1 … y_K ~ π(· | x)
    R_i = r(x, y_i) − β·log π/π_ref(y_i)
    gradient: mean over i of (R_i − mean_{j ≠ i} R_j)·∇ log π(y_i)

The whole completion is one action; there is no value model. K is 2 or 4 in the paper.

How sure: the estimator and the KL in the reward are the paper's. Everything else is not: β 0.05, one pass and learning
rate 1e-6 are those of TRL 1.16 (`RLOOConfig`), clip 0.2 too, 512 prompts a round those of `ppo`.

Departs from the source: after the first step of a round the samples are not the policy's own any more; the ratio of the
whole completion's probabilities corrects for it and is clipped, as TRL does. `train.pairs_per_step` at the number of
rollouts gives the paper's one step for each batch. Every round is kept (`gate.kind=always`).
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2402.14740"

EMBEDDED = {
    "prompts_per_round": 128,
    "evaluate": {"prompts": 64},
    "loss": {"beta": 0.02},
    "train": {"learning_rate": 2e-4, "epochs": 1, "pairs_per_step": 64},
}
"""On the story model: the step size of a tiny model."""


def recipe() -> Recipe:
    """Return four completions for each of 512 prompts a round, KL 0.05 in the reward."""
    return Recipe(
        recipe="rloo",
        rounds=8,
        prompts_per_round=512,
        sampler=Spec.model_validate({"kind": "hf", "completions": 4}),
        pair_builder=Spec.model_validate({"kind": "rollouts", "min_group": 2}),
        loss=Spec.model_validate({"kind": "rollout_kl", "beta": 0.05, "estimator": "k1", "place": "reward"}),
        trainer=Spec.model_validate(
            {"kind": "group_advantage", "baseline": "leave_one_out", "scale": False, "ratio": "sequence", "clip": 0.2}
        ),
        gate=Spec(kind="always"),
        start_from="previous",
        reference="initial",
        train=TrainSettings(learning_rate=1e-6, epochs=1, pairs_per_step=256, schedule="constant"),
    )
