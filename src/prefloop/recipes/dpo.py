"""DPO: one pass over an existing preference data set, against the policy that it starts from.

Source: Rafailov et al. 2023, arXiv 2305.18290: equation 7 and appendix B, the latter by way of TRL's paper index.

    π = argmin −log σ(β·log π(y_w|x)/π_ref(y_w|x) − β·log π(y_l|x)/π_ref(y_l|x)),   π_ref: the policy as it came

Reads `prompt`, `chosen`, `rejected`. beta 0.1, learning rate 1e-6 and 64 pairs a step are the paper's.

Departs from the source: the paper's optimizer is RMSprop with 150 steps of warm-up (recalled), here it is AdamW with a
tenth of the steps; one epoch is ours; the policy is promoted only if the gate accepts it, for which `eval_judge`
measures held-out completions. This is the offline method; `iterative_dpo` draws its own pairs in every round.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2305.18290"

EMBEDDED = {
    "prompts": "embedded-preferences",
    "prompts_per_round": None,
    "sampler": {"kind": "given"},
    "eval_sampler": {"kind": "hf", "max_new_tokens": 80},
    "judge": {"kind": "given"},
    "eval_judge": {"kind": "lexicon"},
}
"""On the story model: the pairs that prefloop ships (see `tools/story_preferences.py`)."""


def recipe() -> Recipe:
    """Return the paper's settings: one round over all pairs, beta 0.1, learning rate 1e-6, 64 pairs a step."""
    return Recipe(
        recipe="dpo",
        rounds=1,
        prompts_per_round=None,
        sampler=Spec(kind="given"),
        eval_sampler=Spec(kind="hf"),
        judge=Spec(kind="given"),
        pair_builder=Spec.model_validate({"kind": "ranked", "rule": "best_vs_worst"}),
        loss=Spec.model_validate({"kind": "dpo", "beta": 0.1}),
        start_from="previous",
        reference="previous",
        train=TrainSettings(learning_rate=1e-6, epochs=1, pairs_per_step=64, schedule="constant", warmup=0.1),
    )
