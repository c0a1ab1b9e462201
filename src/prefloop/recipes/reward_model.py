"""Reward model: a classifier on the policy's backbone that learns from pairs which completion is better.

Source: Unpacking DPO and PPO, Ivison et al. 2024, arXiv 2406.09279, and its code (hamishivi/EasyLM, read second-hand);
the objective is Bradley-Terry, as in arXiv 2203.02155.

    r(x, y) = w · h_last(x, y)          w: fresh, no bias;  h: the policy's decoder, trained along
    minimise −log σ(r(x, y_w) − r(x, y_l)) over the pairs, once

What comes out is a `save_pretrained` folder for `judge: {kind: reward_model, path: …}`.

How sure: objective, one pass, learning rate 1e-5 falling with warm-up 0.03, batch 512, length 4096 and the start from
the SFT policy are seen in their code. Their learning rate falls to 1e-6, ours to 0, by a cosine.

Departs from the source: pairs that exceed the length are dropped; a model whose accuracy on held-out pairs cannot be
told from chance is refused. The accuracy of a rule on length alone stands beside it, and what the model's choice among
the policy's own completions is worth to `eval_judge` (`evaluate.completions` of 2 or more).
"""

from prefloop.recipe import EvaluateSettings, Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2406.09279"

EMBEDDED = {
    "prompts": "embedded-preferences",
    "prompts_per_round": None,
    "sampler": {"kind": "given"},
    "eval_sampler": {"kind": "hf", "max_new_tokens": 80},
    "judge": {"kind": "given"},
    "eval_judge": {"kind": "lexicon"},
    "train": {"learning_rate": 3e-4, "epochs": 2, "pairs_per_step": 16},
}
"""On the story model: the pairs that prefloop ships, and the step size of a tiny model."""


def recipe() -> Recipe:
    """Return one pass over existing pairs, 512 a step, learning rate 1e-5; no margins, no centring."""
    return Recipe(
        recipe="reward_model",
        trains="reward_model",
        rounds=1,
        prompts_per_round=None,
        sampler=Spec(kind="given"),
        eval_sampler=Spec(kind="hf"),
        judge=Spec(kind="given"),
        pair_builder=Spec.model_validate({"kind": "ranked", "rule": "best_vs_worst"}),
        trainer=Spec.model_validate({"kind": "reward_model", "margin": 0.0, "center": 0.0}),
        start_from="previous",
        train=TrainSettings(learning_rate=1e-5, epochs=1, pairs_per_step=512, warmup=0.03, max_tokens=4096),
        evaluate=EvaluateSettings(completions=4),
    )
