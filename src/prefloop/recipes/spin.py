"""SPIN: learn to tell human answers from the previous iterate's own, with nothing but the SFT data.

Source: Chen et al. 2024, arXiv 2401.01335, and its code (uclaml/SPIN). No judge takes part in training.

    for t in 0 … 3:
        y' ~ π_t(· | x) for every prompt x of the SFT set
        chosen = human y, rejected = y';  train on the pairs of rounds t and t−1
        π_{t+1} = argmin mean −log σ(λ [log π/π_t (y|x) − log π/π_t (y'|x)]),  started from π_t

With λ called beta, the loss is DPO's; the paper's ℓ(t) = log(1 + e^{−t}).

Departs from the source: AdamW instead of RMSProp (recalled, not seen); one epoch each round by default (the scripts set
6 with a checkpoint each, the config 3); a round is promoted only if the gate accepts it, for which `judge` measures
held-out completions (the paper evaluates on benchmarks); replayed pairs are scored under the round's own reference.

Needs a reference answer for each prompt: `prompts.gold` names the column.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2401.01335"

EMBEDDED = {
    "sampler": {"completions": 1},
    "per_round": {"train.learning_rate": [3e-4, 3e-4, 6e-5, 6e-5]},
}
"""On the story model: the paper's one sample for each prompt, and its fall of the learning rate to a fifth."""


def recipe() -> Recipe:
    """Return SPIN's settings: four rounds on 50,000 prompts, λ 0.1 and 5.0 in the last, one past round replayed."""
    return Recipe(
        recipe="spin",
        rounds=4,
        prompts_per_round=50_000,
        sampler=Spec.model_validate({"kind": "hf", "completions": 1, "temperature": 1.0, "max_new_tokens": 256}),
        pair_builder=Spec(kind="versus_gold"),
        loss=Spec.model_validate({"kind": "dpo", "beta": 0.1}),
        start_from="previous",
        reference="previous",
        replay=1,
        per_round={
            "loss.beta": (0.1, 0.1, 0.1, 5.0),
            "train.learning_rate": (5e-7, 5e-7, 1e-7, 1e-7),
        },
        train=TrainSettings(pairs_per_step=64, schedule="linear", warmup=0.1, max_tokens=1024),
    )
